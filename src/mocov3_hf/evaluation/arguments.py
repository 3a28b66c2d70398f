"""What every evaluation on the command line is told: a model, a labelled data set, how to read it, where to write."""

import os
from dataclasses import asdict, dataclass, field
from typing import Any

from ..data.labelled import LabelledImages, open_labelled
from ..data.sources import is_local
from .features import data_fingerprint


@dataclass(frozen=True)
class EvaluationArguments:
    """Arguments common to the evaluations."""

    model: str = field(
        metadata={
            "help": "Folder or Hub id of the model: of pre-training, a bare encoder, a classifier, or any other."
        }
    )
    dataset_name: str = field(metadata={"help": "Labelled data set: Hub id, or folder (of images, parquet, Arrow)."})
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a data set that has several."}
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub data set."})
    train_split: str = field(default="train", metadata={"help": "Split with the labels to learn from."})
    test_split: str = field(default="test", metadata={"help": "Split to classify."})
    image_column: str | None = field(default=None, metadata={"help": "Column of images; found where there is one."})
    label_column: str | None = field(default=None, metadata={"help": "Column of labels; found where there is one."})
    batch_size: int = field(default=64, metadata={"help": "Images per forward pass and process."})
    num_workers: int = field(default=0, metadata={"help": "Processes that decode images, for each process."})
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the images in pixels; as saved with the model by default."}
    )
    mixed_precision: str = field(
        default="no", metadata={"help": "Precision of the forward pass.", "choices": ["no", "bf16", "fp16"]}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Where results.json goes; the model's folder by default."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Keep features here and use those that are there."})


# Of no influence on a metric, or recorded under another key.
_NOT_SETTINGS = frozenset(
    (
        "model",
        "dataset_name",
        "dataset_config_name",
        "dataset_revision",
        "train_split",
        "test_split",
        "num_workers",
        "output_dir",
        "cache_dir",
    )
)


def evaluation_settings(arguments: EvaluationArguments) -> dict[str, Any]:
    """The arguments that have an influence on the metrics, as `results.json` holds them."""
    return {name: value for name, value in asdict(arguments).items() if name not in _NOT_SETTINGS}


def results_folder(arguments: EvaluationArguments) -> str:
    """Folder for `results.json`; ValueError for a model of the Hub without `--output_dir`."""
    if arguments.output_dir is not None:
        return os.path.expanduser(arguments.output_dir)
    if not is_local(arguments.model):
        raise ValueError(f"{arguments.model!r} is no local folder to put results.json in: add --output_dir")
    return os.path.expanduser(arguments.model)


def open_splits(arguments: EvaluationArguments) -> tuple[LabelledImages, LabelledImages]:
    """Training and test split, classes numbered alike.

    Raises:
        ValueError: as `open_labelled`; classes of the test split that training does not know among them.
    """

    def opened(split: str, class_names: list[str] | None) -> LabelledImages:
        return open_labelled(
            arguments.dataset_name,
            arguments.dataset_config_name,
            split,
            arguments.image_column,
            arguments.label_column,
            class_names=class_names,
            revision=arguments.dataset_revision,
        )

    train = opened(arguments.train_split, None)
    return train, opened(arguments.test_split, train.class_names)


def describe_splits(arguments: EvaluationArguments, train: LabelledImages, test: LabelledImages) -> dict[str, Any]:
    """The data set as `results.json` holds it."""
    return {
        "name": arguments.dataset_name,
        "config": arguments.dataset_config_name,
        "revision": arguments.dataset_revision,
        "train_split": arguments.train_split,
        "split": arguments.test_split,
        "train_size": len(train),
        "size": len(test),
        "num_classes": train.num_classes,
        "train_fingerprint": data_fingerprint(train),
        "fingerprint": data_fingerprint(test),
    }
