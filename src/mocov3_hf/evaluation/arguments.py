"""What every evaluation on the command line is told: a model, a labelled data set, how to read it, where to write."""

import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from transformers import HfArgumentParser

from ..data.labelled import LabelledImages, open_labelled
from ..recipe import RECIPES
from ..storage import is_local
from .encoder import ProcessorTransform, check_model_path
from .features import data_fingerprint, joined_processes
from .results import FILE_NAME, append_result, table


@dataclass(frozen=True)
class SplitArguments:
    """A model and one labelled split: arguments common to all evaluations."""

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


@dataclass(frozen=True)
class EvaluationArguments(SplitArguments):
    """Arguments of the evaluations that learn from one split and classify another."""

    train_split: str = field(default="train", metadata={"help": "Split with the labels to learn from."})


@dataclass(frozen=True)
class FeatureArguments(EvaluationArguments):
    """Arguments of the evaluations on features."""

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


def evaluation_settings(arguments: SplitArguments) -> dict[str, Any]:
    """The arguments that have an influence on the metrics, as `results.json` holds them."""
    return {name: value for name, value in asdict(arguments).items() if name not in _NOT_SETTINGS}


def results_folder(arguments: SplitArguments) -> str:
    """Folder for `results.json`; ValueError for a model of the Hub without `--output_dir`."""
    if arguments.output_dir is not None:
        return os.path.expanduser(arguments.output_dir)
    if not is_local(arguments.model):
        raise ValueError(f"{arguments.model!r} is no local folder to put results.json in: add --output_dir")
    return os.path.expanduser(arguments.model)


@contextmanager
def evaluation_processes(arguments: SplitArguments):
    """The processes of an evaluation, once it is known where the result goes and that there is a model.

    Raises:
        ValueError: as `results_folder` and `check_model_path`.
    """
    results_folder(arguments)
    check_model_path(arguments.model)
    with joined_processes() as state:
        yield state


def record_and_print(
    arguments: SplitArguments,
    title: str,
    *,
    weights: str,
    transform: ProcessorTransform,
    settings: Mapping[str, Any] | None = None,
    name: str | None = None,
    notes: Sequence[str] = (),
    **result,
) -> None:
    """Add the result of an evaluation to `results.json` and print it.

    Args:
        arguments: of the command; those that have an influence on the metrics are recorded.
        title: of the table, before names of model and data set.
        weights: hash of the model's.
        transform: the preprocessing.
        settings: others to record.
        name: of the model where it is not `arguments.model`.
        notes: lines to print below the table.
        result: others of `append_result`.
    """
    name, folder = name or arguments.model, results_folder(arguments)
    append_result(
        folder,
        model={"name": name, "weights": weights},
        settings={**evaluation_settings(arguments), "transform": repr(transform), **(settings or {})},
        **result,
    )
    print(table(result["metrics"], f"{title}: {name} on {arguments.dataset_name}, split {arguments.test_split}"))
    for note in (*notes, f"recorded in {Path(folder) / FILE_NAME}"):
        print(note)


def open_splits(arguments: EvaluationArguments) -> tuple[LabelledImages, LabelledImages]:
    """Training and test split, classes numbered alike.

    Raises:
        ValueError: as `open_labelled`; classes of the test split that training does not know among them.
    """
    train = open_split(arguments, arguments.train_split)
    return train, open_split(arguments, arguments.test_split, train.class_names)


def open_split(arguments: SplitArguments, split: str, class_names: list[str] | None = None) -> LabelledImages:
    """One split of the data set, with the classes numbered as in `class_names`. Raises as `open_labelled`."""
    return open_labelled(
        arguments.dataset_name,
        arguments.dataset_config_name,
        split,
        arguments.image_column,
        arguments.label_column,
        class_names=class_names,
        revision=arguments.dataset_revision,
    )


def describe_splits(arguments: EvaluationArguments, train: LabelledImages, test: LabelledImages) -> dict[str, Any]:
    """The data set as `results.json` holds it."""
    return describe_split(arguments, test) | {
        "train_split": arguments.train_split,
        "train_size": len(train),
        "num_classes": train.num_classes,
        "train_fingerprint": data_fingerprint(train),
    }


def describe_split(arguments: SplitArguments, test: LabelledImages) -> dict[str, Any]:
    """The data set as `results.json` holds it, of an evaluation that learns nothing."""
    return {
        "name": arguments.dataset_name,
        "config": arguments.dataset_config_name,
        "revision": arguments.dataset_revision,
        "split": arguments.test_split,
        "size": len(test),
        "num_classes": test.num_classes,
        "fingerprint": data_fingerprint(test),
    }


EVALUATION_RECIPES = RECIPES / "evaluation"
Arguments = TypeVar("Arguments")


class _Parser(HfArgumentParser):
    """Raises where argparse would print its usage and end the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse_arguments(group: type[Arguments], argv: Sequence[str] | None, description: str) -> Arguments:
    """Arguments of a command, over those of `--recipe` where `group` has that option.

    Args:
        group: a dataclass.
        argv: None for those of the process. They win over the recipe's, whose values are converted and checked like
            them.
        description: for `--help`.

    Raises:
        ValueError: an option that does not exist (the nearest is offered), a value of another type, no such recipe.
    """
    parser = _Parser(group, description=description, allow_abbrev=False)
    argv = list(sys.argv[1:] if argv is None else argv)
    names = [field.name for field in fields(group)]
    recipe = _recipe_of(argv) if "recipe" in names else None
    from_recipe = [] if recipe is None else _recipe_arguments(find_evaluation_recipe(recipe), names)
    parsed, unknown = parser.parse_known_args([*from_recipe, *argv])
    unknown = [argument for argument in unknown if argument.startswith("-")] or unknown
    if unknown:
        raise ValueError(f"there is no option {unknown[0]}{_nearest(unknown[0].lstrip('-').split('=')[0], names)}")
    return group(**{name: value for name, value in vars(parsed).items() if name in names})


def evaluation_recipe_names() -> list[str]:
    """Names of the evaluation recipes that come with the package."""
    return sorted(path.stem for path in EVALUATION_RECIPES.glob("*.yaml"))


def find_evaluation_recipe(name: str) -> Path:
    """The file of an evaluation recipe given by name or path; ValueError offering the nearest name."""
    for path in (Path(name).expanduser(), EVALUATION_RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    known = evaluation_recipe_names()
    raise ValueError(f"there is no recipe {name!r}{_nearest(name, known)}; known are: {', '.join(known)}")


def _recipe_of(argv: list[str]) -> str | None:
    parser = _Parser([], add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    return parser.parse_known_args(argv)[0].recipe


def _recipe_arguments(path: Path, names: list[str]) -> list[str]:
    """A recipe as command line arguments: YAML itself would take 1e-4 for text."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"recipe {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"recipe {path} must hold a mapping of options, it holds a {type(values).__name__}")
    arguments = []
    for name, value in values.items():
        if name not in names or name == "recipe":
            raise ValueError(f"recipe {path}: there is no option {name!r}{_nearest(str(name), names)}")
        if isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        elif value is not None:
            arguments.append(f"--{name}={value}")
    return arguments


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else ""


def run_command(
    group: type[Arguments], argv: Sequence[str] | None, description: str, run: Callable[[Arguments], Any]
) -> Any:
    """A command line: `parse_arguments`, then `run`. Bad input ends the process with one line and status 1."""
    with ending_in_one_line():
        return run(parse_arguments(group, argv, description))


@contextmanager
def ending_in_one_line():
    """A ValueError ends the process with its message in one line, and status 1."""
    try:
        yield
    except ValueError as error:
        # From a process that loads images torch hands on a whole traceback: its last line is the message.
        message = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        sys.exit(f"error: {message.removeprefix('ValueError: ')}")
