"""Labeled splits and their transforms, for evaluation and supervised training."""

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetGenerationError
from torchvision.transforms import InterpolationMode, v2

from ..storage import is_local
from .decode import decode_rgb
from .photometric import IMAGENET_MEAN, IMAGENET_STD
from .sources import MapSource, find_image_column, open_dataset


# Names of a label column where no column is a ClassLabel.
_LABEL_NAMES = ("label", "labels", "class", "target", "cls")
# Names of the column of image paths in a CSV file.
_PATH_NAMES = ("image", "image_path", "path", "file", "file_name", "filename", "filepath")
_SPLIT_NAME = "split"


class SelectedRows:
    """Some rows of a source, by index. `Dataset.select` would make `MapSource` copy the images."""

    def __init__(self, source: MapSource, rows: np.ndarray):
        self.source, self.rows = source, np.asarray(rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> bytes | str | None:
        """Encoded bytes or path of an image."""
        return self.source.read(int(self.rows[index]))


class LabelledImages:
    """One labeled split, with images undecoded.

    Attributes:
        labels: int64 numpy (N,), from 0.
        class_names: List of str by label, or None if labels are plain integers.
        num_classes: len(class_names), or the largest label + 1.
    """

    def __init__(self, source: MapSource | SelectedRows, labels: np.ndarray, class_names: list[str] | None):
        self.source, self.labels, self.class_names = source, labels, class_names
        self.num_classes = len(class_names) if class_names is not None else int(labels.max()) + 1

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: np.ndarray) -> "LabelledImages":
        """The images of some rows, int64 (n,). Class numbers do not change."""
        return LabelledImages(SelectedRows(self.source, rows), self.labels[rows], self.class_names)

    def read(self, index: int) -> bytes | str | None:
        """Encoded bytes or path of an image."""
        return self.source.read(index)

    def decode(self, index: int) -> torch.Tensor:
        """uint8 (3, H, W) RGB. Raises `BadImageError` if the image cannot be used."""
        return decode_rgb(self.read(index))


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose rows to hold out: `fraction` of each class, rounded.

    Args:
        labels: (N,) integers.
        fraction: Between 0 and 1.
        seed: Seed of the split.

    Returns:
        bool (N,), True for held-out rows.
    """
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        draw = np.random.default_rng([seed, int(label)]).permutation(rows)
        held_out[draw[: round(len(rows) * fraction)]] = True
    return held_out


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
    """Open a labeled split.

    Args:
        dataset_name, config_name, split, image_column, revision: As in `open_source`. `dataset_name` can also be a
            CSV file or a folder of CSV files, see `open_csv`.
        label_column: None to detect it: the only ClassLabel column, or else a column named label, labels, class,
            target or cls.
        class_names: Names by label that the split must match, for example those of the training split. Without them,
            text labels are numbered in alphabetical order.

    Raises:
        ValueError: The column does not exist; labels are missing, negative, or neither ClassLabel, integers nor text;
            or a name is not in `class_names`.
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


def find_csv_files(dataset_name: str, split: str) -> list[Path]:
    """The CSV files of a data set: the file itself, or those in the folder. Empty if it is another kind of data set.

    A CSV file beside image folders or parquet files is not the data set. In a folder with subfolders, at least one
    CSV file must have the name of the split, or a column `split`.
    """
    path = Path(os.path.expanduser(dataset_name))
    if path.is_file():
        return [path] if path.suffix.lower() == ".csv" else []
    # `metadata.csv` belongs to an image folder, and `datasets` reads it.
    if not path.is_dir() or any(
        (path / name).exists() for name in ("dataset_dict.json", "state.json", "metadata.csv")
    ):
        return []
    entries = sorted(path.iterdir())
    files = [entry for entry in entries if entry.is_file() and entry.suffix.lower() == ".csv"]
    if not files or any(entry.suffix == ".parquet" for entry in entries):
        return []
    parts = {part.strip() for part in split.split("+")}
    is_table = any(file.stem in parts or _SPLIT_NAME in _header(file) for file in files)
    return files if is_table or not any(entry.is_dir() for entry in entries) else []


def _header(file: Path) -> list[str]:
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as lines:
        return next(csv.reader(lines), [])


def open_csv(files: list[Path], split: str, image_column: str | None = None) -> tuple[datasets.Dataset, str]:
    """Open one split of a data set in CSV files, with images as absolute paths.

    Args:
        files: CSV files with a header. A column `split` names the split of each row; otherwise a file holds the split
            that it is named after, `train.csv`.
        split: Name of a split, or names joined by "+".
        image_column: Column of paths, relative to the CSV file or absolute. None to detect it by its name.

    Returns:
        The table, with the types that `datasets` infers, and the name of the image column.

    Raises:
        ValueError: A file is not a valid table; or the split, the column or an image does not exist.
    """
    tables: dict[str, list[tuple[datasets.Dataset, Path]]] = {}
    for file in files:
        table = _read_csv(file, image_column)
        names = table[_SPLIT_NAME][:] if _SPLIT_NAME in table.column_names else [""] * len(table)
        names = np.array([name or file.stem for name in names])
        for name in dict.fromkeys(names.tolist()):
            tables.setdefault(name, []).append((table.select(np.flatnonzero(names == name)), file))
    chosen = []
    for part in (part.strip() for part in split.split("+")):
        if part not in tables:
            raise ValueError(
                f"split {part!r} does not exist in {' and '.join(map(str, files))}; it has: {', '.join(tables)}. A "
                f"split is a value in the column {_SPLIT_NAME!r} or the name of a file"
            )
        chosen += tables[part]
    image_column = image_column or _find_path_column(chosen[0][0].column_names)
    with_paths = [_with_absolute_paths(table, image_column, file) for table, file in chosen]
    return datasets.concatenate_datasets(with_paths), image_column


def _read_csv(file: Path, image_column: str | None) -> datasets.Dataset:
    # These are text, even where all values look like numbers. Class names such as "null" or "NA" are not missing.
    text_columns = dict.fromkeys((*_PATH_NAMES, _SPLIT_NAME, image_column or _PATH_NAMES[0]), str)
    options = {"converters": text_columns, "keep_default_na": False, "na_values": [""], "skipinitialspace": True}
    try:
        # chunksize=None: otherwise types are inferred for each chunk of 10,000 rows.
        table = datasets.Dataset.from_csv(str(file), encoding="utf-8-sig", chunksize=None, **options)
        if "__index_level_0__" in table.column_names:
            raise ValueError("its rows are longer than its header")
        return table
    except (DatasetGenerationError, ValueError, OSError) as error:
        reason = str(error.__cause__ or error).strip()
        raise ValueError(f"{str(file)!r} is not a CSV table with a header and rows: {reason}") from error


def _find_path_column(columns: list[str]) -> str:
    found = [name for name in columns if name in _PATH_NAMES]
    if len(found) != 1:
        reason = f"several image columns ({', '.join(found)})" if found else "no image column found"
        raise ValueError(f"{reason}: name the column of paths with --image_column; columns: {', '.join(columns)}")
    return found[0]


def _with_absolute_paths(table: datasets.Dataset, image_column: str, file: Path) -> datasets.Dataset:
    listed = table[find_image_column(table, image_column)][:]
    paths = [os.path.join(file.parent, os.path.expanduser(path)) for path in listed]
    missing = next((name for name, path in zip(listed, paths, strict=True) if not os.path.isfile(path)), None)
    if missing is not None:
        reason = "paths must be absolute or relative to the CSV file"
        raise ValueError(f"image {missing!r} in {str(file)!r} does not exist: {reason}")
    return datasets.Dataset.from_dict(table.to_dict() | {image_column: paths})


def _check_class_folders(dataset: datasets.Dataset, folder: str, split: str, image_column: str) -> None:
    """Raise ValueError for an image folder without labels.

    `datasets` returns no label column for it, or takes the folders of its splits for classes.
    """
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
        " files, or CSV files with a column of paths and a column of labels"
    )


def find_label_column(dataset: datasets.Dataset, label_column: str | None = None) -> str:
    """Name of the label column. Raises ValueError with the existing columns if it is missing or ambiguous."""
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
        raise ValueError(f"no label column found: name it with --label_column; columns: {columns}")
    if len(found) > 1:
        raise ValueError(f"several label columns ({', '.join(found)}): choose one with --label_column")
    return found[0]


def _labels(dataset, column, wanted) -> tuple[np.ndarray, list[str] | None]:
    feature = dataset.features[column]
    values = dataset.select_columns([column])[:][column]
    missing = [row for row, value in enumerate(values) if value is None]
    if missing:
        raise ValueError(
            f"column {column!r} has {len(missing)} missing labels, the first in row {missing[0]}: fill in or remove "
            f"these rows"
        )
    dtype = getattr(feature, "dtype", None)
    is_text = isinstance(feature, datasets.Value) and dtype in ("string", "large_string")
    is_integer = isinstance(feature, datasets.Value) and ("int" in dtype or dtype == "bool")
    if not (is_text or is_integer or isinstance(feature, datasets.ClassLabel)):
        raise ValueError(f"label column {column!r} must hold classes, integers or text, got {feature}")
    if is_text:
        names = sorted(set(values)) if wanted is None else list(wanted)
        return _renumber(values, names, column), names
    labels = np.asarray(values, dtype=np.int64)
    if labels.min() < 0:
        raise ValueError(
            f"column {column!r} has {(labels < 0).sum()} negative labels, the first in row {(labels < 0).argmax()}: "
            f"choose a split with public labels"
        )
    names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    if wanted is not None and names is not None and names != list(wanted):
        return _renumber([names[label] for label in labels], list(wanted), column), list(wanted)
    if wanted is not None and labels.max() >= len(wanted):
        raise ValueError(f"label {labels.max()} in column {column!r} has no name: there are {len(wanted)} class names")
    return labels, names if wanted is None else list(wanted)


def _renumber(values: list[str], names: list[str], column: str) -> np.ndarray:
    numbers = {name: number for number, name in enumerate(names)}
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise ValueError(f"column {column!r} has labels that are not class names: {', '.join(unknown[:5])}")
    return np.asarray([numbers[value] for value in values], dtype=np.int64)


@dataclass(frozen=True)
class EvaluationTransform:
    """Resize the short side, crop the center, normalize: uint8 (3, H, W) to float32 (3, size, size).

    Args:
        size: Side length of the crop in pixels.
        resize: Short side before the crop; None for the usual size * 256 / 224.
        interpolation: "bilinear" or "bicubic", with antialiasing.
        mean, std: None for both returns uint8, not normalized.
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
        return _normalize(image, self.mean, self.std)


@dataclass(frozen=True)
class TrainingTransform:
    """Random resized crop, flip, normalize: uint8 (3, H, W) to float32 (3, size, size).

    Uses torch's global random generator.

    Args:
        size: Side length of the crop in pixels.
        scale: Range of the crop's area, as a fraction of the image.
        flip_probability: Probability of a horizontal flip.
        interpolation, mean, std: As in `EvaluationTransform`.
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
        return _normalize(image, self.mean, self.std)


def _normalize(image: torch.Tensor, mean, std) -> torch.Tensor:
    if mean is None or std is None:
        return image
    return v2.functional.normalize(image.to(torch.float32) / 255, list(mean), list(std))


class LabelledDataset(torch.utils.data.Dataset):
    """Pairs (transform(image), label) for a DataLoader or a Trainer.

    Args:
        images: Returned by `open_labelled`.
        transform: uint8 (3, H, W) to a tensor; None for `EvaluationTransform()`.
    """

    def __init__(self, images: LabelledImages, transform=None):
        self.images, self.transform = images, EvaluationTransform() if transform is None else transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images.decode(index)), int(self.images.labels[index])
