"""Labeled splits and their transforms, for evaluation and supervised training."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import datasets
import numpy as np
import torch
from torchvision.transforms import InterpolationMode, v2

from ..problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from ..processing import PixelFormat
from ..storage import is_local
from .account import Account
from .decode import BadImageError
from .image_files import NAMED_BUT_MISSING, NO_CLASS
from .memory import IN_MEMORY
from .photometric import IMAGENET_MEAN, IMAGENET_STD
from .pixels import RGB8, read_image
from .scan import SPLIT_NAMES
from .shards import encoded_image
from .sources import MapSource, open_table
from .targets import infer_problem_type, read_targets


# Names of a label column where no column is a ClassLabel.
_LABEL_NAMES = ("label", "labels", "class", "target", "cls")


class SelectedRows:
    """Some rows of a source, by index. `Dataset.select` would make `MapSource` copy the images."""

    def __init__(self, source: MapSource, rows: np.ndarray):
        self.source, self.rows = source, np.asarray(rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> bytes | str | None:
        """Encoded bytes or path of an image."""
        return self.source.read(int(self.rows[index]))

    def describe(self, index: int) -> str | None:
        """See `MapSource.describe`."""
        return self.source.describe(int(self.rows[index]))


class LabeledImages:
    """One labeled split, with images undecoded.

    Attributes:
        labels: int64 numpy (N,), from 0; of multi-label classification uint8 (N, C), 1 for the classes that apply; of
            regression float64 (N, T).
        class_names: List of str by label or target, or None without names.
        num_classes: Of classes or targets.
        account: What was found where the split was opened; None for images of another kind.
        superclasses: Class to superclass, of a split opened with a `superclass_column`; else empty.
    """

    def __init__(
        self,
        source: MapSource | SelectedRows,
        labels: np.ndarray,
        class_names: list[str] | None,
        account: Account | None = None,
        superclasses: dict[str, str] | None = None,
    ):
        self.source, self.labels, self.class_names, self.account = source, labels, class_names, account
        self.superclasses = superclasses or {}
        if labels.ndim == 2:
            self.num_classes = labels.shape[1]
        else:
            self.num_classes = len(class_names) if class_names is not None else int(labels.max()) + 1

    @property
    def problem_type(self) -> str:
        """What the labels are, in the words of `config.problem_type`."""
        if self.labels.ndim == 1:
            return SINGLE_LABEL
        return REGRESSION if self.labels.dtype.kind == "f" else MULTI_LABEL

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: np.ndarray) -> "LabeledImages":
        """The images of some rows, int64 (n,). Class numbers do not change."""
        source = SelectedRows(self.source, rows)
        return LabeledImages(source, self.labels[rows], self.class_names, self.account, self.superclasses)

    def relabel(self, labels: np.ndarray, class_names: list[str] | None) -> "LabeledImages":
        """The same images with other numbers of their classes."""
        return LabeledImages(self.source, labels, class_names, self.account, self.superclasses)

    def read(self, index: int) -> bytes | str | None:
        """Encoded bytes or path of an image."""
        return self.source.read(index)

    def decode(self, index: int, pixel_format: PixelFormat = RGB8) -> torch.Tensor:
        """
        An image for an image processor of this format, (C, H, W): uint8, or the values of the file for other formats.

        Raises:
            BadImageError: The image cannot be used.
        """
        try:
            return read_image(self.read(index), pixel_format)
        except BadImageError as error:
            raise BadImageError(error.reason, error.path or self.source.describe(index)) from error


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose rows to hold out: `fraction` of each class, rounded. Of images with several classes, the rarest counts.

    Args:
        labels: (N,) integers, or those of multi-label classification or regression.
        fraction: Between 0 and 1.
        seed: Seed of the split.

    Returns:
        bool (N,), True for held-out rows.
    """
    if labels.ndim == 2 and labels.dtype.kind == "f":
        labels = np.zeros(len(labels), dtype=np.int64)
    elif labels.ndim == 2:
        order = np.argsort(labels.sum(axis=0, dtype=np.int64), kind="stable")
        labels = np.where(labels.any(axis=1), order[labels[:, order].argmax(axis=1)], labels.shape[1])
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        draw = np.random.default_rng([seed, int(label)]).permutation(rows)
        held_out[draw[: round(len(rows) * fraction)]] = True
    return held_out


def open_labeled(
    dataset_name: str,
    config_name: str | None = None,
    split: str = "test",
    image_column: str | None = None,
    label_column: str | Sequence[str] | None = None,
    *,
    class_names: list[str] | None = None,
    revision: str | None = None,
    problem_type: str = SINGLE_LABEL,
    superclass_column: str | None = None,
    num_classes: int | None = None,
) -> LabeledImages:
    """Open a labeled split.

    Args:
        dataset_name, config_name, split, image_column, revision: As in `open_source`.
        label_column: None to detect it: the only ClassLabel column, or else a column named label, labels, class,
            target or cls. Several for multi-label classification or regression, see `read_targets`.
        class_names: Names by label that the split must match, for example those of the training split. Without them,
            text labels are numbered in alphabetical order.
        problem_type: "single_label_classification", "multi_label_classification", "regression", or "auto" to infer it
            (`infer_problem_type`).
        superclass_column: Column of the superclass of each class, text or classes; one per class.
        num_classes: As `read_targets`.

    Raises:
        ValueError: The column does not exist; labels are missing, negative, or neither ClassLabel, integers nor text;
            or a name is not in `class_names`.
    """
    dataset, image_column, account = open_table(dataset_name, config_name, split, image_column, revision)
    if account.skipped.get(NAMED_BUT_MISSING):
        raise ValueError(
            f"{account.skipped[NAMED_BUT_MISSING]} images of {dataset_name!r} are {NAMED_BUT_MISSING}, such as"
            f" {account.examples[NAMED_BUT_MISSING]}: restore them, or remove their rows"
        )
    source = MapSource(dataset, image_column, account)
    if is_local(dataset_name) and dataset_name != IN_MEMORY and not account.kind.startswith("CSV"):
        _check_class_folders(dataset, account, dataset_name, source.image_column)
    columns = _label_columns(dataset, label_column)
    if problem_type == "auto":
        problem_type = infer_problem_type(dataset, columns)
    if problem_type != SINGLE_LABEL:
        return LabeledImages(source, *read_targets(dataset, columns, problem_type, num_classes), account)
    if len(columns) > 1:
        raise ValueError(
            f"{len(columns)} label columns ({', '.join(columns)}) are for multi-label classification or regression:"
            " pass one --label_column, or another --problem_type"
        )
    if label_column is None and "folder" in account.kind:
        dataset, source, account = _without_loose_images(dataset, source, account, columns[0])
    labels, names = _labels(dataset, columns[0], class_names)
    superclasses = {} if superclass_column is None else _superclasses(dataset, superclass_column, labels, names)
    return LabeledImages(source, labels, names, account, superclasses)


def _label_columns(dataset: datasets.Dataset, label_column: str | Sequence[str] | None) -> list[str]:
    chosen = [label_column] if label_column is None or isinstance(label_column, str) else label_column
    return [find_label_column(dataset, name) for name in dict.fromkeys(chosen)]


def _superclasses(dataset: datasets.Dataset, column: str, labels: np.ndarray, names: list[str] | None) -> dict:
    """Class to superclass. Raises ValueError for a class with several."""
    numbers, parents = _labels(dataset, find_label_column(dataset, column), None)
    found: dict[str, str] = {}
    for label, number in np.unique(np.stack([labels, numbers], axis=1), axis=0).tolist():
        name, parent = (str(n) if known is None else known[n] for n, known in ((label, names), (number, parents)))
        if found.setdefault(name, parent) != parent:
            raise ValueError(
                f"column {column!r} has two superclasses of the class {name!r}, {found[name]!r} and {parent!r}: pass a"
                " --superclass_column with one for each class"
            )
    return found


def _without_loose_images(dataset: datasets.Dataset, source: MapSource, account: Account, column: str) -> tuple:
    """Leave out images that are in no class folder while others are."""
    if not isinstance(dataset.features[column], datasets.ClassLabel):
        return dataset, source, account
    values = dataset.data.column(column).combine_chunks()
    if values.null_count == 0:
        return dataset, source, account
    rows = np.flatnonzero(values.is_valid().to_numpy(zero_copy_only=False))
    skipped = {**account.skipped, NO_CLASS: values.null_count}
    loose = encoded_image(
        dataset[int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])][source.image_column]
    )
    examples = {**account.examples, NO_CLASS: str(loose) if isinstance(loose, str) else ""}
    account = replace(account, skipped=skipped, examples=examples, num_images=len(rows))
    dataset = dataset.select(rows)
    return dataset, MapSource(dataset, source.image_column, account), account


def _check_class_folders(dataset: datasets.Dataset, account: Account, folder: str, image_column: str) -> None:
    """Raise ValueError for images without labels, and for folders of splits that were taken for classes."""
    others, inside = [name for name in dataset.features if name != image_column], ""
    if others == ["label"] and "folder" in account.kind:
        names = getattr(dataset.features["label"], "names", ())
        if not names or not all(os.fsencode(name.lower()) in SPLIT_NAMES for name in names):
            return
        inside = f"; {' and '.join(names)} are splits only at the top of the folder: pass the folder that holds them"
    elif others:
        return
    raise ValueError(
        f"folder {folder!r} holds images without labels: expected class folders ({account.split}/<class>/<image>),"
        f" parquet files, or CSV files with a column of paths and a column of labels{inside}"
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
        inner = {name: getattr(feature, "feature", None) for name, feature in features.items()}
        found = [name for name, feature in inner.items() if isinstance(feature, datasets.ClassLabel)]
    if not found:
        found = [name for name in features if name in _LABEL_NAMES]
    if not found:
        hint = "; several of 0 and 1 or of numbers can be named" if len(features) > 2 else ""
        raise ValueError(f"no label column found: name it with --label_column; columns: {columns}{hint}")
    if len(found) > 1:
        raise ValueError(f"several label columns ({', '.join(found)}): choose one with --label_column")
    return found[0]


def _labels(dataset, column, wanted) -> tuple[np.ndarray, list[str] | None]:
    feature = dataset.features[column]
    values = dataset.select_columns([column])[:][column]
    missing = [row for row, value in enumerate(values) if value is None]
    if missing:
        raise ValueError(
            f"column {column!r} has {len(missing)} missing labels, the first in row {missing[0]}: fill in or remove"
            " these rows, or pass --problem_type multi_label_classification if no class applies"
        )
    dtype = getattr(feature, "dtype", None)
    is_text = isinstance(feature, datasets.Value) and dtype in ("string", "large_string")
    is_integer = isinstance(feature, datasets.Value) and ("int" in dtype or dtype == "bool")
    if not (is_text or is_integer or isinstance(feature, datasets.ClassLabel)):
        raise ValueError(
            f"label column {column!r} must hold classes, integers or text, got {feature}: choose another with"
            " --label_column, or the --problem_type of these labels"
        )
    if is_text:
        names = sorted(set(values)) if wanted is None else list(wanted)
        return _renumber(values, names, column), names
    too_large = next((row for row, value in enumerate(values) if value > np.iinfo(np.int64).max), None)
    if too_large is not None:
        raise ValueError(
            f"label {values[too_large]} in row {too_large} of column {column!r} does not fit into 64 bits with a sign:"
            " number the classes from 0"
        )
    labels = np.asarray(values, dtype=np.int64)
    if labels.min() < 0:
        raise ValueError(
            f"column {column!r} has {(labels < 0).sum()} negative labels, the first in row {(labels < 0).argmax()}:"
            " choose a split with public labels, or --problem_type regression"
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
    """Random resized crop, flip, normalize: (C, H, W), uint8 or float32 in 0..1, to float32 (C, size, size).

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
    scaled = image.to(torch.float32) / 255 if image.dtype == torch.uint8 else image
    return v2.functional.normalize(scaled, list(mean), list(std))


class LabeledDataset(torch.utils.data.Dataset):
    """Pairs (transform(image), label) for a DataLoader or a Trainer.

    Args:
        images: Returned by `open_labeled`.
        transform: Image (C, H, W) to a tensor, with a `pixel_format` if it takes others than 8-bit RGB; None for
            `EvaluationTransform()`.
    """

    def __init__(self, images: LabeledImages, transform=None):
        self.images, self.transform = images, EvaluationTransform() if transform is None else transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.images.decode(index, getattr(self.transform, "pixel_format", RGB8))
        return self.transform(image), int(self.images.labels[index])
