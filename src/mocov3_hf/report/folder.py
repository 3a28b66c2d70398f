"""The contents of the folder of a run or a model. Damaged files are left out and noted."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..storage import is_local
from ..recipe import RecipeError, load_recipe


RECORDS = ("config.json", "metrics.jsonl", "recipe.yaml")
Lines = list[dict[str, Any]]


class ReportError(ValueError):
    """A report that cannot be made; the message says why and how to fix it."""


@dataclass
class ModelFolder:
    """
    Attributes:
        path: the folder.
        kind: "pretraining", "classifier" or "encoder".
        config: `config.json`; empty before the first checkpoint.
        recipe: `recipe.yaml`, flat, with all defaults; empty if there is none.
        state: `run` in the `state.json` of the newest checkpoint; empty if there is none.
        metrics, knn, events: lines of `metrics.jsonl`, `knn.jsonl` and `events.jsonl`, oldest first.
        results: entries of `results.json`, oldest first.
        conversion: `conversion.json`; empty if the weights were not converted.
        parameters: number of parameters by the first part of their names; empty without weights.
        notes: sentences about what could not be read.
    """

    path: Path
    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    metrics: Lines = field(default_factory=list)
    knn: Lines = field(default_factory=list)
    events: Lines = field(default_factory=list)
    results: Lines = field(default_factory=list)
    conversion: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def has_model(self) -> bool:
        return bool(self.config)

    @property
    def architecture(self) -> str | None:
        """Name of the saved model class."""
        return (self.config.get("architectures") or [None])[0]

    @property
    def backbone(self) -> dict[str, Any]:
        """Configuration of the backbone: the one inside a `MoCoV3Config`, otherwise the whole configuration."""
        return self.config.get("backbone_config") or self.config or self.recipe.get("backbone_config") or {}

    @property
    def temperature(self) -> float | None:
        return self.config.get("temperature", self.recipe.get("temperature")) if self.kind == "pretraining" else None

    @property
    def global_batch_size(self) -> int | None:
        """Images per step over all processes; None if only the batch size per process is known."""
        if "global_batch_size" in self.state:
            return self.state["global_batch_size"]
        return None if self.recipe.get("per_device_train_batch_size") else self.recipe.get("train_batch_size")


def read_folder(path: str | Path) -> ModelFolder:
    """
    Read everything except the weights.

    Raises:
        ReportError: no such folder, or one that holds neither a run nor a model.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ReportError(f"{str(path)!r} {what}: pass the output folder of a run, or a model folder")
    if not any((path / name).is_file() for name in RECORDS):
        raise ReportError(
            f"{str(path)!r} is neither a run nor a model, it has none of {', '.join(RECORDS)}: pass the output folder"
            " of a training command, or a folder written by save_pretrained"
        )
    notes: list[str] = []
    config = read_json(path / "config.json", notes)
    metrics = read_lines(path / "metrics.jsonl", notes)
    architecture = str((config.get("architectures") or [""])[0])
    if architecture.endswith("ForImageClassification"):
        kind = "classifier"
    elif architecture == "MoCoV3ForPreTraining" or (path / "recipe.yaml").is_file():
        kind = "pretraining"
    else:
        kind = "encoder"
    checkpoints = newest_first(path)
    if kind == "classifier" and not metrics:
        metrics = trainer_history(checkpoints, notes)
    return ModelFolder(
        path=path,
        kind=kind,
        config=config,
        recipe=read_recipe(path / "recipe.yaml", notes),
        state=next((read_json(folder / "state.json", notes).get("run", {}) for folder in checkpoints), {}),
        metrics=metrics,
        knn=read_lines(path / "knn.jsonl", notes),
        events=read_lines(path / "events.jsonl", notes),
        results=read_results(path / "results.json", notes),
        conversion=read_json(path / "conversion.json", notes),
        parameters=count_parameters(path, notes),
        notes=notes,
    )


def newest_first(path: Path) -> list[Path]:
    """`checkpoint-N` folders."""
    found = [folder for folder in path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted(found, key=lambda folder: int(folder.name.split("-")[1]), reverse=True)


def read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON object; empty if the file does not exist, and with a note if it cannot be read."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read and is left out: {error}.")
        return {}
    if not isinstance(content, dict):
        notes.append(f"{path.name} holds a {type(content).__name__} instead of an object and is left out.")
        return {}
    return content


def read_lines(path: Path, notes: list[str]) -> Lines:
    """The objects in a file of JSON lines that have a step. Damaged lines, such as the last one of a killed run,
    are skipped with a note."""
    if not path.is_file():
        return []
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        notes.append(f"{path.name} cannot be read and is left out: {error}.")
        return []
    lines, damaged = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            content = json.loads(line) if line.strip() else None
        except ValueError:
            content = False
        if isinstance(content, dict) and isinstance(content.get("step"), int | float):
            lines.append(content)
        elif content is not None:
            damaged.append(number)
    if damaged:
        which = f"line {damaged[0]}" if len(damaged) == 1 else f"lines {', '.join(map(str, damaged[:5]))}"
        notes.append(
            f"{len(damaged)} of {len(lines) + len(damaged)} lines of {path.name} ({which}) cannot be read and"
            f" {'is' if len(damaged) == 1 else 'are'} left out."
        )
    return lines


def read_recipe(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return load_recipe(str(path)).to_dict()
    except (RecipeError, OSError, UnicodeDecodeError) as error:
        notes.append(f"The recipe cannot be read and is left out: {error}.")
        return {}


def read_results(path: Path, notes: list[str]) -> Lines:
    """Evaluations with metrics, oldest first."""
    content = read_json(path, notes)
    results = content.get("results", []) if isinstance(content.get("results", []), list) else []
    return [row for row in results if isinstance(row, dict) and isinstance(row.get("metrics"), dict)]


def trainer_history(checkpoints: list[Path], notes: list[str]) -> Lines:
    """The log in the newest checkpoint of `Trainer`, for classifiers without `metrics.jsonl`."""
    for folder in checkpoints:
        history = read_json(folder / "trainer_state.json", notes).get("log_history")
        if isinstance(history, list):
            return [line for line in history if isinstance(line, dict) and "step" in line]
    return []


def count_parameters(path: Path, notes: list[str]) -> dict[str, int]:
    """Number of parameters by the first part of their names, from the headers of the weight files."""
    counts: dict[str, int] = {}
    for file in sorted(path.glob("model*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - no mapping
                    # Statistics of batch normalization are buffers, not parameters.
                    if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
                        continue
                    size = 1
                    for length in weights.get_slice(name).get_shape():
                        size *= length
                    part = name.partition(".")[0]
                    counts[part] = counts.get(part, 0) + size
        except (OSError, SafetensorError) as error:
            notes.append(f"{file.name} cannot be read: {error}.")
    return counts


def shown_name(name: Any) -> str:
    """Name of a dataset or model; only the last part of a local path, because a report may be published."""
    name = str(name)
    return Path(name).name if is_local(name) else name
