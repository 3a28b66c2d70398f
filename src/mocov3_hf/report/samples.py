"""Images to look at: some of a split, spread over its classes, labelled or not."""

from dataclasses import dataclass

import numpy as np
import torch

from ..data.decode import BadImageError
from ..data.labelled import LabelledImages, find_label_column, open_labelled
from ..data.sources import MapSource, open_dataset
from .folder import ReportError, shown_name


@dataclass(frozen=True)
class Samples:
    """
    Legend: n images.

    Attributes:
        source: all images of the split.
        rows: (n,) int64, those to look at. Whatever is shown only of some images is shown of the first.
        labels: (n,) int64, None without labels.
        class_names: by label, None without labels.
        why_unlabelled: a sentence, empty with labels.
        description: of the data set, in words.
    """

    source: MapSource
    rows: np.ndarray
    labels: np.ndarray | None
    class_names: list[str] | None
    why_unlabelled: str
    description: str

    def __len__(self) -> int:
        return len(self.rows)

    def name_of(self, index: int) -> str:
        """Class of image `index` of these n, or its row where there are no labels."""
        if self.labels is None:
            return f"row {self.rows[index]}"
        return self.class_names[self.labels[index]]

    def decode(self, index: int) -> torch.Tensor:
        """
        Image `index` of these n: uint8 (3, H, W).

        Raises:
            ReportError: it cannot be decoded.
        """
        row = int(self.rows[index])
        images = LabelledImages(self.source, np.zeros(1, dtype=np.int64), None)
        try:
            return images.decode(row)
        except BadImageError as error:
            raise ReportError(f"image in row {row} of {self.description} {error}: repair it or take it out") from error


def open_samples(
    dataset_name: str,
    config_name: str | None = None,
    split: str = "test",
    image_column: str | None = None,
    label_column: str | None = None,
    *,
    num_images: int = 500,
    seed: int = 0,
) -> Samples:
    """
    Choose images of a split: of every class as many as of the others, as far as they go.

    Args:
        dataset_name, config_name, split, image_column: of `data.sources.open_dataset`.
        label_column: None to find it; without one the images are taken as unlabelled.
        num_images: how many, all of a smaller split.
        seed: of the choice.

    Raises:
        ValueError: as `open_dataset`; a label column that does not exist or holds no labels; fewer than 2 images.
    """
    if num_images < 2:
        raise ReportError(f"--num_images must be at least 2, got {num_images}: one image has nothing to compare with")
    dataset = open_dataset(dataset_name, config_name, split)
    description = f"{shown_name(dataset_name)}, split {split}"
    try:
        column, why = find_label_column(dataset, label_column), ""
    except ValueError as error:
        if label_column is not None:
            raise
        column, why = None, f"The images are taken as unlabelled: {error}."
    if column is None:
        source = MapSource(dataset, image_column)
        rows = choose_rows(len(source), None, num_images, seed)
        samples = Samples(source, rows, None, None, why, description)
    else:
        images = open_labelled(dataset_name, config_name, split, image_column, column)
        rows = choose_rows(len(images), images.labels, num_images, seed)
        names = images.class_names or [str(number) for number in range(images.num_classes)]
        samples = Samples(images.source, rows, images.labels[rows], list(names), "", description)
    if len(samples) < 2:
        raise ReportError(f"{description} has {len(samples)} image: there is nothing to compare it with")
    return samples


def choose_rows(num_rows: int, labels: np.ndarray | None, num_images: int, seed: int) -> np.ndarray:
    """
    Rows of a split, class after class in turn, in an order drawn from `seed` within a class and among the classes.

    Args:
        num_rows: of the split.
        labels: (num_rows,) int64, or None.
        num_images: at most.

    Returns:
        (n,) int64 without repetition.
    """
    draw = np.random.default_rng(seed).permutation(num_rows)
    if labels is None:
        return draw[:num_images]
    # The turn of a row: how many of its class come before it. Within a turn the order of the draw stays.
    turns, seen = np.empty(num_rows, dtype=np.int64), {}
    for place, row in enumerate(draw):
        turns[place] = seen.get(labels[row], 0)
        seen[labels[row]] = turns[place] + 1
    return draw[np.argsort(turns, kind="stable")][:num_images]
