"""What a run or model folder holds: names, writers and readers of checkpoints, metrics and events.

config.json, preprocessor_config.json, model.safetensors    what `from_pretrained` loads: the newest weights
recipe.yaml                                                  the resolved recipe, which starts the same run again
metrics.jsonl, events.jsonl, knn.jsonl, bad_images.jsonl     what happened, one JSON object per line
data.json                                                    what was found in the data set, and what was skipped why
results.json                                                 evaluations, appended by every command
checkpoint-N/                                                everything needed to resume after step N
    manifest.json                                            size and SHA-256 of every other file
"""

import json
import math
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .hints import describe_missing
from .results import RESULTS, read_results
from .storage import is_number, read_lines, sha256_of, write_json
from .yaml_files import read_yaml


CONFIG, PROCESSOR, RECIPE, CONVERSION = "config.json", "preprocessor_config.json", "recipe.yaml", "conversion.json"
METRICS, EVENTS, KNN, BAD_IMAGES = "metrics.jsonl", "events.jsonl", "knn.jsonl", "bad_images.jsonl"
DATA = "data.json"
MANIFEST, STATE, OPTIMIZER = "manifest.json", "state.json", "optimizer.safetensors"
TRACKERS, WEIGHTS = "trackers.json", "model.safetensors"
TRAINER_STATE = "trainer_state.json"  # of transformers' Trainer
LAST_STEP = 2**53  # steps beyond cannot be told apart as float64
CHECKPOINT_PREFIX = "checkpoint-"

# Keys of metrics.jsonl that had another name in earlier versions.
RENAMED_METRICS = {"momentum": "ema_decay"}
# Options in recipe.yaml that had another name in earlier versions.
RENAMED_OPTIONS = {"momentum": "ema_decay", "momentum_schedule": "ema_schedule", "model_name_or_path": "model"}


class CheckpointError(ValueError):
    """A checkpoint that is damaged or does not belong to the run; the message names it and says why."""


# Checkpoints


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The `checkpoint-N` folders in a folder, newest first, whole or not."""
    paths = [path for path in Path(folder).glob(f"{CHECKPOINT_PREFIX}*") if path.is_dir()]
    steps = [(step, path) for path in paths if (step := step_of(path)) is not None]
    return [path for _, path in sorted(steps, reverse=True)]


def step_of(checkpoint: Path) -> int | None:
    """The number of steps done at a checkpoint, from its name; None for any other name."""
    match = re.fullmatch(rf"{CHECKPOINT_PREFIX}([0-9]{{1,18}})", checkpoint.name)
    return int(match.group(1)) if match else None


def write_manifest(checkpoint: Path) -> None:
    """List size and SHA-256 of every file of a checkpoint; the last file to be written."""
    write_json(checkpoint / MANIFEST, {file.name: describe_file(file) for file in sorted(checkpoint.iterdir())})


def describe_file(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": sha256_of(file)}


def check_manifest(checkpoint: Path) -> None:
    """
    Compare a checkpoint with its manifest.

    Raises:
        CheckpointError: no valid manifest, or a file that is missing or differs from what was written.
    """
    manifest = read_manifest(checkpoint)
    for name, expected in manifest.items():
        file = checkpoint / name
        try:
            if not file.is_file():
                raise CheckpointError(f"{checkpoint} is damaged: {name} is missing")
            size = file.stat().st_size
            if size != expected["size"]:
                raise CheckpointError(
                    f"{checkpoint} is damaged: {name} has {size} bytes, expected {expected['size']!r}"
                )
            digest = sha256_of(file)
        except (OSError, UnicodeError) as error:
            raise CheckpointError(f"{checkpoint} is damaged: {name[:100]!r} cannot be read ({error})") from error
        if digest != expected["sha256"]:
            raise CheckpointError(f"{checkpoint} is damaged: the content of {name} is not what was written")


def read_manifest(checkpoint: Path) -> dict[str, dict[str, Any]]:
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint} is not complete: its {MANIFEST} cannot be read ({error})") from error
    is_valid = (
        isinstance(manifest, dict)
        and {WEIGHTS, OPTIMIZER, STATE, RECIPE, CONFIG} <= manifest.keys()
        and all(isinstance(entry, dict) and {"size", "sha256"} <= entry.keys() for entry in manifest.values())
        and all(name and Path(name).name == name for name in manifest)
    )
    if not is_valid:
        raise CheckpointError(f"{checkpoint} is damaged: its {MANIFEST} does not list the files of a checkpoint")
    return manifest


def is_file_whole(checkpoint: Path, name: str) -> bool:
    """Whether one file of a checkpoint is as it was written."""
    try:
        return read_manifest(checkpoint)[name] == describe_file(checkpoint / name)
    except (CheckpointError, OSError):
        return False


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is as it was written."""
    try:
        check_manifest(checkpoint)
    except CheckpointError:
        return False
    return True


# Everything at once, for reports, cards and summaries


@dataclass
class RunFolder:
    """
    The content of a run or model folder, weights excepted.

    Attributes:
        path: The folder.
        kind: `"pretraining"`, `"classifier"`, `"encoder"`, or `"evaluation"` for a folder that holds only results.
        config: Of `config.json`; empty before the first checkpoint.
        recipe: Of `recipe.yaml`: flat, resolved, by the option names of today; empty without one.
        state: `run` of the newest checkpoint's `state.json`; empty without one.
        metrics, knn, events: Lines of `metrics.jsonl`, `knn.jsonl` and `events.jsonl`, oldest first.
        results: Evaluations of `results.json`, oldest first.
        data: Of `data.json`: images used and files skipped by reason; empty without it.
        conversion: Of `conversion.json`; empty for weights that were not converted.
        parameters: Number of parameters by the first part of their names; empty without weights.
        notes: What could not be read, one sentence each.
    """

    path: Path
    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    knn: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    conversion: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def architecture(self) -> str | None:
        """Name of the class that was saved, from `config.json`."""
        names = self.config.get("architectures")
        return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None

    @property
    def backbone(self) -> dict[str, Any]:
        """Configuration of the backbone: the one inside a `MoCoV3Config`, else the folder's own."""
        found = self.config.get("backbone_config") or self.config or self.recipe.get("backbone_config")
        return found if isinstance(found, dict) else {}

    @property
    def temperature(self) -> float | None:
        if self.kind != "pretraining":
            return None
        return _positive(self.config.get("temperature", self.recipe.get("temperature")))

    @property
    def global_batch_size(self) -> int | None:
        """Images per step over all processes; None where neither a checkpoint nor the recipe says."""
        if "global_batch_size" in self.state:
            return _positive(self.state["global_batch_size"])
        known = not self.recipe.get("per_device_train_batch_size")
        return _positive(self.recipe.get("train_batch_size")) if known else None


def _positive(value: Any) -> Any:
    """A positive finite number, None for anything else: the files may have been edited by hand."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and 0 < value <= sys.float_info.max else None


def read_run_folder(path: str | Path) -> RunFolder:
    """
    Read everything but the weights; what is damaged is left out and named in `notes`.

    Raises:
        ValueError: No such folder, or one that is neither a run nor a model.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        fix = "pass the output folder of a run, or a model folder"
        is_file = f"folder {str(path)!r} is a file: {fix}"
        raise ValueError(is_file if path.exists() else describe_missing(path, fix=fix))
    is_evaluation = not any((path / name).is_file() for name in (CONFIG, METRICS, RECIPE))
    if is_evaluation and not (path / RESULTS).is_file():
        raise ValueError(
            f"folder {str(path)!r} is neither a run nor a model (no {CONFIG}, {METRICS}, {RECIPE} or {RESULTS}): pass"
            " the output folder of mocov3 pretrain, knn, linear-probe or finetune, or a folder written by"
            " save_pretrained"
        )
    notes: list[str] = []
    config, recipe = read_object(path / CONFIG, notes), read_recipe(path / RECIPE, notes)
    architecture = RunFolder(path, "encoder", config=config).architecture or ""
    kind = "evaluation" if is_evaluation else "encoder"
    if architecture.endswith("ForImageClassification"):
        kind = "classifier"
    elif architecture == "MoCoV3ForPreTraining" or (path / RECIPE).is_file():
        kind = "pretraining"
    checkpoints = list_checkpoints(path)
    metrics = read_noted_lines(path / METRICS, notes)
    if kind == "classifier" and not metrics:
        metrics = _trainer_history(checkpoints, notes)
    state = next((read_object(folder / STATE, notes).get("run") for folder in checkpoints), None)
    try:
        results = read_results(path)
    except ValueError as error:
        results = []
        notes.append(f"{RESULTS} was left out: {error}.")
    events, knn = read_noted_lines(path / EVENTS, notes), read_noted_lines(path / KNN, notes)
    conversion, parameters = read_object(path / CONVERSION, notes), count_parameters(path, notes)
    return RunFolder(
        path=path,
        kind=kind,
        config=config,
        recipe=recipe,
        state=state if isinstance(state, dict) else {},
        metrics=[{RENAMED_METRICS.get(name, name): value for name, value in line.items()} for line in metrics],
        knn=knn,
        events=events,
        results=results,
        data=read_object(path / DATA, notes),
        conversion=conversion,
        parameters=parameters,
        # Reports and cards are published: notes name files without the folders above them.
        notes=[note.replace(f"{path}{os.sep}", "") for note in notes],
    )


def read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON object; empty without the file, and with a note where it cannot be read."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} was left out, it cannot be read: {error}.")
        return {}
    if not isinstance(content, dict):
        notes.append(f"{path.name} was left out, it holds a {type(content).__name__} instead of an object.")
        return {}
    return content


def read_recipe(path: Path, notes: list[str]) -> dict[str, Any]:
    """The options in a recipe file by their names of today; empty without the file, with a note if it is damaged."""
    if not path.exists():
        return {}
    try:
        content = read_yaml(path)
    except ValueError as error:
        notes.append(f"{path.name} was left out: {error}.")
        return {}
    return {RENAMED_OPTIONS.get(name, name): value for name, value in content.items() if name != "command"}


def read_noted_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Lines of a JSON Lines file; damaged ones are left out with a note."""
    try:
        lines, damaged = read_lines(path)
    except OSError as error:
        notes.append(f"{path.name} was left out, it cannot be read: {error}.")
        return []
    if damaged:
        which = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        total = len(lines) + len(damaged)
        notes.append(f"{len(damaged)} of {total} lines of {path.name} were left out, they are damaged: line {which}.")
    possible = [line for line in lines if 0 <= line["step"] <= LAST_STEP]
    if len(possible) < len(lines):
        notes.append(f"{len(lines) - len(possible)} lines of {path.name} were left out, no run has their steps.")
    return possible


def _trainer_history(checkpoints: list[Path], notes: list[str]) -> list[dict[str, Any]]:
    """The log that `Trainer` keeps in its newest checkpoint, for classifiers without `metrics.jsonl`."""
    for folder in checkpoints:
        history = read_object(folder / TRAINER_STATE, notes).get("log_history")
        if isinstance(history, list):
            return [line for line in history if isinstance(line, dict) and is_number(line.get("step"))]
    return []


def has_throughput(line: dict[str, Any]) -> bool:
    return is_number(line.get("images_per_second")) and line["images_per_second"] > 0


def training_time(metrics: list[dict[str, Any]], global_batch_size: int) -> tuple[float, int]:
    """Seconds and images of all parts of an interrupted run together, from the lines that have a throughput, without
    the steps that a kill or a rollback undid, evaluations and saves."""
    steps = [line["step"] for line in metrics]
    images = [(step - before) * global_batch_size for step, before in zip(steps, [0, *steps[:-1]], strict=True)]
    seconds = sum(
        number / line["images_per_second"]
        for number, line in zip(images, metrics, strict=True)
        if has_throughput(line)
    )
    return seconds, sum(images)


def count_parameters(path: Path, notes: list[str]) -> dict[str, int]:
    """Number of parameters in the weight files by the first part of their names, read from the headers."""
    counts: dict[str, int] = {}
    for file in sorted(path.glob("model*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - not a mapping
                    # Running statistics of batch norm are buffers, not parameters.
                    if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
                        part = name.partition(".")[0]
                        counts[part] = counts.get(part, 0) + math.prod(weights.get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            notes.append(f"{file.name} cannot be read: {error}.")
    return counts
