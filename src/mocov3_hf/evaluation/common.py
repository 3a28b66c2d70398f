"""What all evaluations share: options, labeled splits, and the record of the result."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate import PartialState

from ..data.classes import open_labeled_splits
from ..data.labeled import LabeledImages, open_labeled, stratified_split
from ..data.splits import split_option
from ..data.targets import looks_numeric, several_names
from ..data.workers import cores_shared_with, default_workers
from ..hints import describe_missing
from ..loading import MODEL_IN_MEMORY, resolve_model
from ..options import option
from ..precision import resolve_precision, this_device
from ..problem_types import REGRESSION, SINGLE_LABEL
from ..process_group import joined_processes
from ..processing import ProcessorTransform
from ..reporting import UsageError, is_first_process
from ..results import RESULTS, append_result, is_share
from .feature_cache import data_fingerprint
from .usable_images import without_bad_images


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Model"""

    model: str = option(help="Folder, Hub id or published name of a model.", metavar="MODEL")
    image_size: int | None = option(
        None, "Side of the images in pixels. Defaults to that of the saved image processor.", at_least=1
    )
    pixel_range: list[float] | Literal["auto"] | None = option(
        None,
        "Values of images with more than 8 bits that become 0 and 1. Defaults to that of the saved image processor;"
        " auto, the default for models of 8-bit images, is percentiles 0.5 and 99.5 of a sample.",
        metavar="auto|LOW HIGH",
    )
    input_data_format: Literal["channels_first", "channels_last"] | None = option(
        None, "Axis of the channels of arrays, where the number of channels does not decide."
    )


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Data"""

    dataset_name: str = option(
        help="Labeled data set: Hub id, CSV file, or folder of class folders, parquet, Arrow or CSV.",
        metavar="DATASET",
    )
    dataset_config_name: str | None = option(None, "Configuration of a data set that has several.")
    dataset_revision: str | None = option(None, "Branch, tag or commit of a data set on the Hub.")
    test_split: str = option("test", "Split to test on.")
    image_column: str | None = option(None, "Column of images. Found if there is only one.")
    label_column: list[str] | None = option(
        None, "Column of labels, or several of 0 and 1 or of numbers. Found if there is only one."
    )
    problem_type: Literal["auto", "single_label_classification", "multi_label_classification", "regression"] = option(
        "auto", "One class per image, several, or numbers. auto infers it from the labels."
    )
    on_bad_image: Literal["stop", "skip"] = option(
        "stop",
        "What to do with images that cannot be decoded. skip leaves them out of the metrics and names them.",
        old=["bad_images"],
    )


@dataclass(frozen=True, kw_only=True)
class ComputationOptions:
    """Computation"""

    batch_size: int = option(64, "Images per forward pass and process, without training.", at_least=1)
    dataloader_num_workers: int | None = option(
        None,
        "Data-loading workers per process, 0 for none. Defaults to a quarter of its cores, beside a GPU all but one.",
        at_least=0,
        old=["num_workers"],
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "auto", "Autocast precision. auto is bf16 or fp16 where the device has instructions for it, else no (float32)."
    )

    @property
    def num_workers(self) -> int:
        """Data-loading workers of this process."""
        return default_workers() if self.dataloader_num_workers is None else self.dataloader_num_workers

    @cached_property
    def precision(self) -> str:
        """`mixed_precision` on this machine."""
        return resolve_precision(self.mixed_precision, this_device())[0]

    def of_pass(self) -> dict[str, Any]:
        """As arguments of `rows_of_split`."""
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "mixed_precision": self.precision,
        }


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Output"""

    output_dir: str | None = option(
        None,
        f"Folder of {RESULTS}. Defaults to the folder of the model.",
        metavar="DIR",
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(OutputOptions, ComputationOptions, DataOptions, ModelOptions):
    """Options of every evaluation."""


@dataclass(frozen=True, kw_only=True)
class TrainSplitOptions:
    """Data"""

    train_split: str = option("train", "Split with the labels to learn from.")


# Options without influence on a metric, or recorded under another key.
_NOT_SETTINGS = frozenset(
    (
        "model",
        "dataset_name",
        "dataset_config_name",
        "dataset_revision",
        "train_split",
        "test_split",
        "dataloader_num_workers",
        "output_dir",
        "cache_dir",
    )
)


_RECORDED_IF_USED = ("class_balanced_sampling", "superclass_column")


def evaluation_settings(options: EvaluationOptions) -> dict[str, Any]:
    """The options that have an influence on the metrics, as `results.json` holds them."""
    settings = {name: value for name, value in plain_options(options).items() if name not in _NOT_SETTINGS}
    return settings | {"mixed_precision": options.precision}


def plain_options(options: EvaluationOptions) -> dict[str, Any]:
    """Options as they are recorded: one label column as text, and later additions only where they are used."""
    given = {name: value for name, value in asdict(options).items() if value or name not in _RECORDED_IF_USED}
    if isinstance(columns := given["label_column"], list) and len(columns) == 1:
        given["label_column"] = columns[0]
    del given["problem_type"]  # recorded with the data
    return given


def results_folder(options: EvaluationOptions) -> str:
    """The folder for `results.json`; UsageError for a model on the Hub without `--output_dir`."""
    if options.output_dir is not None:
        return folder_to_write(options.output_dir)
    folder = resolve_model(options.model)
    if not os.path.isdir(folder):
        missing = describe_missing(options.model, "model folder")
        raise UsageError(f"{missing}; for a model on the Hub pass --output_dir for {RESULTS}")
    return folder


def folder_to_write(folder: str, option: str = "--output_dir") -> str:
    """A folder with `~` expanded; UsageError for a file, before hours of work."""
    folder = os.path.expanduser(folder)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UsageError(f"{option} {folder!r} is a file: pass a folder")
    return folder


@contextmanager
def evaluation_processes(options: EvaluationOptions) -> Iterator[PartialState]:
    """
    The processes of an evaluation, joined after the model and the folder of the result have been found.

    Raises:
        ValueError: As `results_folder` and `resolve_model`.
    """
    results_folder(options)
    if (cache_dir := getattr(options, "cache_dir", None)) is not None:
        folder_to_write(cache_dir, "--cache_dir")
    resolve_model(options.model)
    with joined_processes() as state, cores_shared_with(options.num_workers, state.num_processes):
        yield state


def open_splits(options: EvaluationOptions) -> tuple[LabeledImages, LabeledImages]:
    """
    Training and test split with the same numbering of classes.

    Raises:
        ValueError: As `open_labeled`; classes that only the test split has, or a single class.
    """
    train, test = open_labeled_splits(
        options.dataset_name,
        options.dataset_config_name,
        options.train_split,
        options.test_split,
        options.image_column,
        options.label_column,
        revision=options.dataset_revision,
        problem_type=options.problem_type,
        superclass_column=getattr(options, "superclass_column", None),
    )
    print_accounts(train, test)
    return usable(options, train, options.train_split), usable(options, test, options.test_split)


def open_test_split(options: EvaluationOptions, problem_type: str, num_classes: int) -> LabeledImages:
    """The test split for a classifier, without what `--on_bad_image skip` leaves out. Raises as `open_labeled`."""
    with split_option("--test_split"):
        images = open_labeled(
            options.dataset_name,
            options.dataset_config_name,
            options.test_split,
            options.image_column,
            options.label_column,
            revision=options.dataset_revision,
            problem_type=problem_type,
            num_classes=num_classes,
        )
    print_accounts(images)
    return usable(options, images, options.test_split)


def held_out_rows(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """`stratified_split` for validation; UsageError if it holds out nothing or everything."""
    held_out = stratified_split(labels, fraction, seed)
    if held_out.all() or not held_out.any():
        largest = f" (the largest class has {np.bincount(labels).max()})" if labels.ndim == 1 else ""
        raise UsageError(
            f"--validation_fraction {fraction:g} holds out {held_out.sum()} of {len(labels)} images: pass another"
            f" fraction, or a training split with more images of each class{largest}"
        )
    return held_out


def usable(options: EvaluationOptions, images: LabeledImages, split: str) -> LabeledImages:
    """A split without the images that `--on_bad_image skip` leaves out."""
    if options.on_bad_image == "stop":
        return images
    return without_bad_images(images, split, options.num_workers)


def print_accounts(*splits: LabeledImages) -> None:
    """What was found in each split, and what its labels are, on stderr."""
    if is_first_process():
        for images in splits:
            for line in images.account.lines() if images.account is not None else ():
                print(line, file=sys.stderr)
        first = splits[0]
        names = first.class_names or range(first.num_classes)
        some = f"{', '.join(map(str, names[:3]))}{', ...' if len(names) > 3 else ''}"
        what = "targets" if first.problem_type == REGRESSION else "classes"
        print(f"labels: problem_type={first.problem_type}, {what}={len(names)} ({some})", file=sys.stderr)
        if first.problem_type == SINGLE_LABEL and (hint := _other_meaning(first)):
            print(f"labels: {hint}", file=sys.stderr)


def _other_meaning(images: LabeledImages) -> str | None:
    """What single classes may be instead, by their names and numbers."""
    names = images.class_names or []
    if (name := several_names(names)) is not None:
        return f"{name!r} is one class: --problem_type multi_label_classification takes it for several"
    if names and looks_numeric(names):
        return "most classes look like numbers, not all: repair the other rows for --problem_type regression"
    if all(map(str.isdecimal, names)) and 2 * len(np.unique(images.labels)) > len(images):
        return "most images have a number of their own: for quantities pass --problem_type regression"
    return None


def describe_splits(options: EvaluationOptions, train: LabeledImages, test: LabeledImages) -> dict[str, Any]:
    """The data set as `results.json` holds it."""
    return describe_split(options, test) | {
        "train_split": options.train_split,
        "train_size": len(train),
        "num_classes": train.num_classes,
        "train_fingerprint": data_fingerprint(train),
    }


def describe_split(options: EvaluationOptions, test: LabeledImages) -> dict[str, Any]:
    """The data set as `results.json` holds it, of an evaluation without training."""
    return {
        "name": options.dataset_name,
        "config": options.dataset_config_name,
        "revision": options.dataset_revision,
        "split": options.test_split,
        "size": len(test),
        "num_classes": test.num_classes,
        **({} if test.problem_type == SINGLE_LABEL else {"problem_type": test.problem_type}),
        "fingerprint": data_fingerprint(test),
        "skipped": {} if test.account is None else test.account.skipped,
    }


def record_and_print(
    options: EvaluationOptions,
    title: str,
    *,
    weights: str,
    transform: ProcessorTransform,
    settings: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    **result: Any,
) -> None:
    """
    Print the result of an evaluation as a table and append it to `results.json`.

    Args:
        options: Of the command; those with an influence on the metrics are recorded.
        title: Of the table.
        weights: Hash of the model's weights.
        transform: Preprocessing.
        settings: More settings to record.
        notes: Lines to print below the table.
        result: Other arguments of `append_result`.
    """
    folder = results_folder(options)
    print_metrics(options, title, result["metrics"])  # first, as the disk may be full
    append_result(
        folder,
        model={"name": options.model, "weights": weights},
        settings={**evaluation_settings(options), "transform": repr(transform), **(settings or {})},
        **result,
    )
    is_kept = options.output_dir is not None or options.model != MODEL_IN_MEMORY
    for note in (*notes, *([f"recorded in {Path(folder) / RESULTS}"] if is_kept else [])):
        print(note)


def print_metrics(options: EvaluationOptions, title: str, metrics: Mapping[str, Any]) -> None:
    """Print metrics under the names of model, data set and split."""
    print(table(metrics, f"{title}: {options.model} on {options.dataset_name}, split {options.test_split}"))


def table(metrics: Mapping[str, Any], title: str) -> str:
    """
    Metrics as text: accuracies and other shares (`is_share`) in percent, other numbers as they are.
    Values that are not numbers, such as the accuracy of every class, are left out.
    """
    metrics = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    width = max(map(len, metrics), default=0)
    lines = [
        f"  {name:<{width}}  {100 * value:7.2f} %" if is_share(name) else f"  {name:<{width}}  {value:7.4g}"
        for name, value in metrics.items()
    ]
    return "\n".join([title, *lines])
