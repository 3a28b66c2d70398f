"""The images of a report: a sample of a split, balanced over its classes, with or without labels."""

from collections import Counter
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
    A sample of n images.

    Attributes:
        source: all images of the split.
        rows: (n,) int64, rows of the split. Sections that show only some images show the first.
        labels: (n,) int64, None without labels.
        class_names: by label, None without labels.
        why_unlabeled: a sentence, empty with labels.
        description: name and split of the dataset.
    """

    source: MapSource
    rows: np.ndarray
    labels: np.ndarray | None
    class_names: list[str] | None
    why_unlabeled: str
    description: str

    def __len__(self) -> int:
        return len(self.rows)

    def name_of(self, index: int) -> str:
        """Class of an image of the sample, or its row in the split without labels."""
        return f"row {self.rows[index]}" if self.labels is None else self.class_names[self.labels[index]]

    def decode(self, index: int) -> torch.Tensor:
        """
        An image of the sample, uint8 (3, H, W).

        Raises:
            ReportError: it cannot be decoded.
        """
        row = int(self.rows[index])
        try:
            return LabelledImages(self.source, np.zeros(1, dtype=np.int64), None).decode(row)
        except BadImageError as error:
            raise ReportError(f"image in row {row} of {self.description} {error}: repair or remove it") from error


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
    Sample a split, balanced over its classes.

    Args:
        dataset_name, config_name, split, image_column: as for `data.sources.open_dataset`.
        label_column: None to detect it; images without one are unlabeled.
        num_images: size of the sample; a smaller split is taken whole.

    Raises:
        ValueError: as `open_dataset`; a label column that does not exist or is not one; fewer than 2 images.
    """
    if num_images < 2:
        raise ReportError(f"--num_images must be at least 2, got {num_images}: a report compares images")
    dataset = open_dataset(dataset_name, config_name, split)
    description = f"{shown_name(dataset_name)}, split {split}"
    try:
        column, why = find_label_column(dataset, label_column), ""
    except ValueError as error:
        if label_column is not None:
            raise
        column, why = None, f"The images have no labels: {error}."
    if column is None:
        source = MapSource(dataset, image_column)
        samples = Samples(source, choose_rows(len(source), None, num_images, seed), None, None, why, description)
    else:
        images = open_labelled(dataset_name, config_name, split, image_column, column)
        rows = choose_rows(len(images), images.labels, num_images, seed)
        names = images.class_names or [str(number) for number in range(images.num_classes)]
        samples = Samples(images.source, rows, images.labels[rows], list(names), "", description)
    if len(samples) < 2:
        raise ReportError(f"{description} has {len(samples)} image, a report compares at least 2")
    return samples


def choose_rows(num_rows: int, labels: np.ndarray | None, num_images: int, seed: int) -> np.ndarray:
    """
    Rows of a split: one of every class, then a second of every class, and so on, each in random order.

    Args:
        num_rows: of the split.
        labels: (num_rows,) int64, or None.
        num_images: at most.

    Returns:
        (n,) int64 without repetition.
    """
    shuffled = np.random.default_rng(seed).permutation(num_rows)
    if labels is None:
        return shuffled[:num_images]
    rounds, seen = [], Counter()
    for label in labels[shuffled].tolist():
        rounds.append(seen[label])
        seen[label] += 1
    return shuffled[np.argsort(rounds, kind="stable")][:num_images]
