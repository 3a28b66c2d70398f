"""Labelled splits and their transforms, for evaluation and supervised training."""

from dataclasses import dataclass

import datasets
import numpy as np
import torch
from torchvision.transforms import InterpolationMode, v2

from .csv_images import find_csv_files, open_csv
from .decode import decode_rgb
from .photometric import IMAGENET_MEAN, IMAGENET_STD
from .sources import MapSource, is_local, open_dataset


# Names that mean the label when no column is a ClassLabel.
_LABEL_NAMES = ("label", "labels", "class", "target", "cls")


class SelectedRows:
    """Some rows of a source. The rows stay where they are: `Dataset.select` would have `MapSource` copy the images."""

    def __init__(self, source: MapSource, rows: np.ndarray):
        self.source, self.rows = source, np.asarray(rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> bytes | str | None:
        """Encoded bytes or path of an image."""
        return self.source.read(int(self.rows[index]))


class LabelledImages:
    """One labelled split, images undecoded.

    Attributes:
        labels: int64 numpy (N,), from 0.
        class_names: list of str by label, or None when labels are bare integers.
        num_classes: len(class_names), or the largest label + 1.
    """

    def __init__(self, source: MapSource | SelectedRows, labels: np.ndarray, class_names: list[str] | None):
        self.source, self.labels, self.class_names = source, labels, class_names
        self.num_classes = len(class_names) if class_names is not None else int(labels.max()) + 1

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: np.ndarray) -> "LabelledImages":
        """Some of the images, int64 (n,) row numbers, classes numbered as before."""
        return LabelledImages(SelectedRows(self.source, rows), self.labels[rows], self.class_names)

    def read(self, index: int) -> bytes | str | None:
        """Encoded bytes or path of an image."""
        return self.source.read(index)

    def decode(self, index: int) -> torch.Tensor:
        """uint8 (3, H, W) RGB; `BadImageError` when the image cannot be used."""
        return decode_rgb(self.read(index))


def open_labelled(
    dataset_name: str,
    config_name: str | None = None,
    split: str = "test",
    image_column: str | None = None,
    label_column: str | None = None,
    *,
    class_names: list[str] | None = None,
    revision: str | None = None,
) -> LabelledImages:
    """Open a labelled split.

    Args:
        dataset_name, config_name, split, image_column, revision: as `open_source`; or a CSV file, or a folder of CSV
            files, as `open_csv` reads them.
        label_column: None to find it: the only ClassLabel column, else one called label, labels, class, target or cls.
        class_names: names by label that the split must agree with (those of the training split, say). Text labels are
            otherwise numbered in alphabetical order of the names that occur.

    Raises:
        ValueError: no such column, labels missing or negative, labels neither ClassLabel, integers nor text, or names
            not among `class_names`.
    """
    files = find_csv_files(dataset_name, split)
    if files:
        dataset, image_column = open_csv(files, split, image_column)
    else:
        dataset = open_dataset(dataset_name, config_name, split, revision=revision)
    source = MapSource(dataset, image_column)
    if not files and is_local(dataset_name):
        _check_class_folders(dataset, dataset_name, split, source.image_column)
    column = find_label_column(dataset, label_column)
    labels, names = _labels(dataset, column, class_names)
    return LabelledImages(source, labels, names)


def _check_class_folders(dataset: datasets.Dataset, folder: str, split: str, image_column: str) -> None:
    """ValueError for a folder of images without labels: `datasets` gives it no column of labels, or takes the folders
    of its splits for classes."""
    others = [name for name in dataset.features if name != image_column]
    if others == ["label"]:
        feature = dataset.features["label"]
        names = set(getattr(feature, "names", ()))
        if not names or not names <= {"train", "test", "validation", "valid", "val", "dev", split}:
            return
    elif others:
        return
    raise ValueError(
        f"folder {folder!r} holds images without labels: expected class folders ({split}/<class>/<image>), parquet"
        " files, or CSV files with a column of paths and one of labels"
    )


def find_label_column(dataset: datasets.Dataset, label_column: str | None = None) -> str:
    """Name of the label column; ValueError naming the columns when it is missing or ambiguous."""
    features = dataset.features
    columns = ", ".join(features)
    if label_column is not None:
        if label_column not in features:
            raise ValueError(f"label column {label_column!r} does not exist; columns: {columns}")
        return label_column
    found = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not found:
        found = [name for name in features if name in _LABEL_NAMES]
    if not found:
        raise ValueError(f"no label column found; name it with --label_column; columns: {columns}")
    if len(found) > 1:
        raise ValueError(f"several label columns ({', '.join(found)}): choose one with --label_column")
    return found[0]


def _labels(dataset, column, wanted) -> tuple[np.ndarray, list[str] | None]:
    feature = dataset.features[column]
    values = dataset.select_columns([column])[:][column]
    missing = [row for row, value in enumerate(values) if value is None]
    if missing:
        raise ValueError(
            f"{len(missing)} labels are missing in column {column!r} (first in row {missing[0]}): fill or drop them"
        )
    dtype = getattr(feature, "dtype", None)
    is_text = isinstance(feature, datasets.Value) and dtype in ("string", "large_string")
    is_integer = isinstance(feature, datasets.Value) and "int" in dtype
    if not (is_text or is_integer or isinstance(feature, datasets.ClassLabel)):
        raise ValueError(f"label column {column!r} must hold classes, integers or text, it holds {feature}")
    if is_text:
        names = sorted(set(values)) if wanted is None else list(wanted)
        return _renumber(values, names, column), names
    labels = np.asarray(values, dtype=np.int64)
    if labels.min() < 0:
        raise ValueError(
            f"{(labels < 0).sum()} labels in column {column!r} are negative (first in row {(labels < 0).argmax()}): "
            f"is this a split without public labels?"
        )
    names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    if wanted is not None and names is not None and names != list(wanted):
        return _renumber([names[label] for label in labels], list(wanted), column), list(wanted)
    if wanted is not None and labels.max() >= len(wanted):
        raise ValueError(f"label {labels.max()} in column {column!r} has no name among the {len(wanted)} class names")
    return labels, names if wanted is None else list(wanted)


def _renumber(values: list[str], names: list[str], column: str) -> np.ndarray:
    numbers = {name: number for number, name in enumerate(names)}
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise ValueError(f"labels in column {column!r} that are not among the class names: {', '.join(unknown[:5])}")
    return np.asarray([numbers[value] for value in values], dtype=np.int64)


@dataclass(frozen=True)
class EvaluationTransform:
    """Resize the short side, crop the centre, normalise: uint8 (3, H, W) to float32 (3, size, size).

    Args:
        size: of the crop in pixels.
        resize: short side before the crop; None for size * 256 / 224, the usual proportion.
        interpolation: "bilinear" or "bicubic", antialiased.
        mean, std: None for both gives uint8 back, not normalised.
    """

    size: int = 224
    resize: int | None = None
    interpolation: str = "bilinear"
    mean: tuple[float, ...] | None = IMAGENET_MEAN
    std: tuple[float, ...] | None = IMAGENET_STD

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        short = self.resize if self.resize is not None else round(self.size * 256 / 224)
        image = v2.functional.resize(image, [short], InterpolationMode(self.interpolation), antialias=True)
        image = v2.functional.center_crop(image, [self.size, self.size])
        return _normalise(image, self.mean, self.std)


@dataclass(frozen=True)
class TrainingTransform:
    """Random resized crop and flip, normalise: uint8 (3, H, W) to float32 (3, size, size). Draws from torch's
    generator of the process.

    Args:
        size: of the crop in pixels.
        scale: range of the crop's share of the area.
        interpolation, mean, std: as `EvaluationTransform`.
    """

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    flip_probability: float = 0.5
    interpolation: str = "bilinear"
    mean: tuple[float, ...] | None = IMAGENET_MEAN
    std: tuple[float, ...] | None = IMAGENET_STD

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        box = v2.RandomResizedCrop((self.size, self.size), scale=self.scale).make_params([image])
        image = v2.functional.resized_crop(
            image,
            box["top"],
            box["left"],
            box["height"],
            box["width"],
            [self.size, self.size],
            InterpolationMode(self.interpolation),
            antialias=True,
        )
        if torch.rand(()) < self.flip_probability:
            image = image.flip(-1)
        return _normalise(image, self.mean, self.std)


def _normalise(image: torch.Tensor, mean, std) -> torch.Tensor:
    if mean is None or std is None:
        return image
    return v2.functional.normalize(image.to(torch.float32) / 255, list(mean), list(std))


class LabelledDataset(torch.utils.data.Dataset):
    """(transform(image), label) by index, for a DataLoader or a Trainer.

    Args:
        images: as `open_labelled` gives them.
        transform: uint8 (3, H, W) to a tensor.
    """

    def __init__(self, images: LabelledImages, transform=None):
        self.images, self.transform = images, EvaluationTransform() if transform is None else transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images.decode(index)), int(self.images.labels[index])
