"""The commands as Python calls: the same options, data in memory as well as paths, exceptions, no exit codes."""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import pandas as pd
    from transformers import BaseImageProcessor, PreTrainedModel, TrainerCallback

    from .curation import Neighbors


@dataclass(frozen=True)
class Run:
    """
    A finished run: its output folder, and what the folder holds, loaded on first access.

    Every function here that takes a model takes a `Run`, and so does `os.fspath`.

    Attributes:
        output_dir: The folder.
        results: Metrics of the test split; empty after pre-training, or if the run was stopped.
    """

    output_dir: Path
    results: dict[str, Any] = field(default_factory=dict)

    def __fspath__(self) -> str:
        return str(self.output_dir)

    @cached_property
    def model(self) -> "PreTrainedModel":
        """The trained encoder, or the classifier, in evaluation mode, on the CPU."""
        from .loading import load_classifier, load_encoder
        from .run_folder import read_run_folder

        is_classifier = read_run_folder(self.output_dir).kind == "classifier"
        return (load_classifier if is_classifier else load_encoder)(self.output_dir)

    @cached_property
    def processor(self) -> "BaseImageProcessor":
        """The image processor: from images to `pixel_values`."""
        from .loading import load_processor

        return load_processor(self.output_dir, self.model.config)

    @property
    def metrics(self) -> "pd.DataFrame":
        """
        The training log, a row for each line of `metrics.jsonl`, by step: `loss`, `learning_rate`, ...; after
        pre-training with `knn_steps` also `knn_top1`. docs/pretraining.md lists the columns.
        """
        import pandas as pd

        from .run_folder import read_run_folder

        folder = read_run_folder(self.output_dir)
        metrics, knn = pd.json_normalize(folder.metrics), pd.json_normalize(folder.knn)
        return metrics.merge(knn, how="outer", on=["step", "epoch"]) if len(knn) else metrics

    @cached_property
    def report(self) -> Path:
        """
        The HTML page about the run, which is written on first access. `mocov3_hf.report` takes options.

        Raises:
            ValueError: The packages of reports are missing: `pip install "mocov3_hf[report]"`.
        """
        from .report import report_on

        return report_on(self)


def pretrain(
    dataset: Any,
    recipe: str | os.PathLike | Mapping[str, Any] | None = None,
    output_dir: str | os.PathLike | None = None,
    callbacks: "Sequence[TrainerCallback | type[TrainerCallback]]" = (),
    **options: Any,
) -> Run:
    """
    Pre-train an encoder on unlabeled images: the command `mocov3 pretrain` as a Python call.

    Args:
        dataset: Path or Hub id, as for the command; a `Dataset`, `DatasetDict` or `IterableDataset`; a sequence of PIL
            images, arrays or tensors (H, W), (H, W, C) or (C, H, W), or paths, possibly in pairs (image, label);
            or a mapping of splits to these.
        recipe: Name of a recipe of the package (`mocov3 recipes`), path of a YAML file, or a mapping of options. None
            chooses all options for the images and the machine, and prints them with the reasons (docs/choosing.md).
        output_dir: Folder for weights, checkpoints, metrics and the resolved recipe.
        callbacks: Of the type `transformers.TrainerCallback`, see docs/python.md.
        options: Any option of `mocov3 pretrain --help all`, as a Python value: `max_steps=100`,
            `backbone_config={"model_type": "resnet"}`, `crop_scale=[0.2, 1.0]`, `torch_compile=True`.

    Returns:
        The run, with `model`, `processor`, `metrics` and `report`; also of a run stopped by a signal or a callback.

    Raises:
        UsageError, ValueError: an option that is not valid, no such data set, or a folder that holds a run.
        RunError, OSError: the run diverged, a checkpoint could not be written, or too many images are damaged.
        Exception: whatever a callback raises.

    Example:

    ```python
    >>> import mocov3_hf

    >>> run = mocov3_hf.pretrain("path/to/images", recipe="quickstart", output_dir="runs/first", max_steps=100)
    >>> run.metrics.plot(x="step", y="loss")
    ```
    """
    from .data.memory import named
    from .pretraining.pretrain import run_recipe
    from .pretraining.recipe import recipe_of_call
    from .reporting import UsageError

    with _own_processes(), named(dataset) as (name, split):
        options["dataset_name"] = name
        if split is not None:
            options.setdefault("train_split", split)
        resolved = recipe_of_call(recipe, options if output_dir is None else {**options, "output_dir": output_dir})
        if resolved.run.output_dir is None and not resolved.run.dry_run:
            raise UsageError("output_dir is missing: pass a folder for weights and metrics")
        return Run(run_recipe(resolved, _resume("pretrain"), callbacks=_instances(callbacks)))


def pretrain_command(arguments: Sequence[str]) -> None:
    """The command `mocov3 pretrain`. A finished run that named no recipe also gets its report."""
    from .pretraining.pretrain import main
    from .reporting import is_first_process, reporting

    arguments = list(arguments)
    recipe = main(arguments)
    is_named = any(argument.split("=")[0] == "--recipe" for argument in arguments)
    if is_named or recipe.run.dry_run or not is_first_process():
        return
    from .pretraining.checkpoint import read_state
    from .report import report_on
    from .requirements import MissingPackageError
    from .run_folder import list_checkpoints

    folder = str(recipe.run.output_dir)
    with reporting():
        states = [read_state(checkpoint) for checkpoint in list_checkpoints(folder)[:1]]
        if any(state.step == state.total_steps for state in states):
            try:
                print(f"report: {report_on(folder)}")
            except MissingPackageError as error:  # of an optional part of the installation
                print(f"report: {error}")


def knn(model: Any, dataset: Any, *, processor: Any = None, **options: Any) -> dict[str, float]:
    """
    Classify a test split by its nearest neighbors in a training split: the command `mocov3 knn` as a Python call.

    Args:
        model: A `Run`, folder, Hub id or published name, or a model of transformers.
        dataset: Labeled images, as for `pretrain`. Splits are `train` and `test` unless `train_split` and `test_split`
            name others; of data without splits, slices: `train_split="train[:80%]", test_split="train[80%:]"`.
        processor: Image processor of a model in memory.
        options: Any option of `mocov3 knn --help`, as a Python value: `k=[10, 20]`.

    Returns:
        `knn20_top1` and the other metrics, as `results.json` holds them. A model in memory is recorded only with
        `output_dir`.

    Raises:
        UsageError, ValueError: a user's mistake.
        RunError, OSError: a failure at run time.
    """
    from .evaluation import knn as command

    with _options_of_call(command.COMMAND, model, dataset, processor, options) as values:
        return command.run(_built(command.KNNOptions, values))


def evaluate(model: Any, dataset: Any, *, processor: Any = None, **options: Any) -> dict[str, Any]:
    """
    Test a classifier on labeled images: the command `mocov3 evaluate` as a Python call.

    Arguments, results and errors are those of `knn`; of data in memory with a single split, that one is used.
    """
    from .evaluation import evaluate as command

    with _options_of_call(command.COMMAND, model, dataset, processor, options, one_split=True) as values:
        return command.run(_built(command.EvaluateOptions, values))


def linear_probe(
    model: Any,
    dataset: Any,
    recipe: str | os.PathLike | Mapping[str, Any] | None = None,
    output_dir: str | os.PathLike | None = None,
    callbacks: "Sequence[TrainerCallback | type[TrainerCallback]]" = (),
    *,
    processor: Any = None,
    **options: Any,
) -> Run:
    """
    Train a linear classifier on a frozen encoder: the command `mocov3 linear-probe` as a Python call.

    Args:
        model, dataset, processor: As for `knn`.
        recipe: Name, YAML file, or mapping of options; None for the defaults.
        output_dir: Folder for the classifier; with `cached=True` only for results.
        callbacks: Of `Trainer`; none with `cached=True`, which does not use it.
        options: Any option of `mocov3 linear-probe --help`, as a Python value: `cached=True`, `few_shot=[1, 5]`.

    Returns:
        The run: `results` has the metrics of the test split, and `model` is the classifier (with `cached=True` the
        encoder).

    Raises:
        UsageError, ValueError: a user's mistake.
        RunError, OSError: a failure at run time, such as divergence.
    """
    from .evaluation import linear_probe as command
    from .evaluation.common import results_folder
    from .reporting import UsageError

    with _options_of_call(command.COMMAND, model, dataset, processor, options, recipe, output_dir) as values:
        chosen, added = command.choose_protocol(values), _instances(callbacks)
        if values.get("cached") and added:
            raise UsageError("callbacks are for training with augmentation: leave out cached, or the callbacks")
        return Run(Path(results_folder(chosen)), command.run(chosen, added, _resume("linear_probe")))


def finetune(
    model: Any,
    dataset: Any,
    recipe: str | os.PathLike | Mapping[str, Any] | None = None,
    output_dir: str | os.PathLike | None = None,
    callbacks: "Sequence[TrainerCallback | type[TrainerCallback]]" = (),
    *,
    processor: Any = None,
    **options: Any,
) -> Run:
    """
    Fine-tune an encoder as a classifier: the command `mocov3 finetune` as a Python call.

    Arguments, results and errors are those of `linear_probe`, without `cached`.
    """
    from .evaluation import finetune as command
    from .evaluation.common import results_folder

    with _options_of_call(command.COMMAND, model, dataset, processor, options, recipe, output_dir) as values:
        (group,) = command.COMMAND.groups
        chosen = _built(group, values)
        return Run(Path(results_folder(chosen)), command.run(chosen, _instances(callbacks), _resume("finetune")))


def neighbors(
    dataset: Any,
    model: Any = None,
    output_dir: str | os.PathLike | None = None,
    query: Any = (),
    *,
    processor: Any = None,
    **options: Any,
) -> "Neighbors":
    """
    Find nearest images, near-duplicates and outliers: the command `mocov3 neighbors` as a Python call.

    Args:
        dataset: A folder of features of `mocov3 extract`; or, with a model, images: a folder, archive or file, a Hub
            id with its `test_split`, or data in memory as for `pretrain`.
        model: As for `knn`; None for features.
        output_dir: Folder for the tables and the page.
        query: Images to search for, or one of them: paths, bytes, PIL images, arrays or tensors.
        processor: Image processor of a model in memory.
        options: Any option of `mocov3 neighbors --help`, as a Python value: `threshold=0.97`.

    Returns:
        `images`, `duplicates`, `outliers` and `queries` as data frames, the `summary`, and the path of the `gallery`.

    Raises:
        UsageError, ValueError: a user's mistake.
        RunError, OSError: a failure at run time.
    """
    from .curation import run_call
    from .reporting import UsageError

    if output_dir is None:
        raise UsageError("output_dir is missing: pass a folder for the tables and the page")
    given_model = nullcontext(None) if model is None else named_model(model, processor)
    with given_model as model_name:
        return run_call(dataset, model_name, query, {**options, "output_dir": output_dir})


@contextmanager
def _own_processes() -> Iterator[None]:
    """Leave no state of accelerate behind that was not there: `notebook_launcher` then starts processes again."""
    from accelerate.state import AcceleratorState, PartialState

    from .process_group import is_joined

    was_there = bool(PartialState._shared_state)
    try:
        yield
    finally:
        if not was_there and not is_joined():
            AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def _options_of_call(
    command: Any,
    model: Any,
    dataset: Any,
    processor: Any,
    options: dict[str, Any],
    recipe: Any = None,
    output_dir: Any = None,
    one_split: bool = False,
) -> Iterator[dict[str, Any]]:
    """The options of an evaluation, converted, without defaults; inside the block, model and data have names."""
    from .data.memory import named
    from .options import values_of_keywords

    with _own_processes(), named_model(model, processor) as model_name, named(dataset) as (name, split):
        given = {**options, "model": model_name, "dataset_name": name}
        if output_dir is not None:
            given["output_dir"] = output_dir
        if one_split and split is not None:
            given.setdefault("test_split", split)
        yield values_of_keywords(command, given, recipe)


@contextmanager
def named_model(model: Any, processor: Any = None) -> Iterator[str]:
    """
    The name by which `resolve_model` finds a model inside the block: of one in memory `MODEL_IN_MEMORY`.

    Args:
        model: As `resolve_model`, or a model of transformers, possibly wrapped.
        processor: Saved with a model in memory.

    Raises:
        UsageError: A model of another library; a processor for a folder, which has its own.
    """
    from transformers import PreTrainedModel

    from .loading import MODEL_IN_MEMORY, WHAT_LOADS, extract_model_from_parallel, folder_of_model
    from .reporting import UsageError

    if isinstance(model, str | os.PathLike):
        if processor is not None:
            raise UsageError("processor is for a model in memory: a folder has its own")
        yield os.fspath(model)
        return
    inner = extract_model_from_parallel(model, keep_torch_compile=False) if hasattr(model, "parameters") else model
    if not isinstance(inner, PreTrainedModel):
        raise UsageError(f"model takes {WHAT_LOADS}, or a model of transformers, got a {type(inner).__name__}")
    with tempfile.TemporaryDirectory(prefix="mocov3_hf_") as folder:
        for part in (inner, processor):
            if part is not None:
                part.save_pretrained(folder)
        token = folder_of_model.set(folder)
        try:
            yield MODEL_IN_MEMORY
        finally:
            folder_of_model.reset(token)


def _built(group: type, values: dict[str, Any]) -> Any:
    from .options import build

    return build(group, values)


def _instances(callbacks: Sequence[Any]) -> "list[TrainerCallback]":
    """Callbacks, of which those given as a class are created. UsageError for anything else."""
    from transformers import TrainerCallback

    from .reporting import UsageError

    if not isinstance(callbacks, list | tuple):
        raise UsageError(f"callbacks takes a list of transformers.TrainerCallback, got a {type(callbacks).__name__}")
    created = [callback() if isinstance(callback, type) else callback for callback in callbacks]
    for callback in created:
        if not isinstance(callback, TrainerCallback):
            raise UsageError(
                f"callbacks takes a list of transformers.TrainerCallback, got a {type(callback).__name__}"
            )
    return created


def _resume(function: str) -> str:
    return f'the same mocov3_hf.{function}(...) with resume_from_checkpoint="auto"'
