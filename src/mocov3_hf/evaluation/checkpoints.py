"""Checkpoints of supervised training: written whole, found again, loaded strictly."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME

from .encoder import load_any, quiet_transformers


AVERAGE_NAME = "average.safetensors"
SETTINGS_NAME = "settings.json"


def reload_strictly(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Load the weights of a folder into a model, through `from_pretrained` and a strict load.

    Raises:
        ValueError: weights that are missing, left over, or of another shape: nothing was loaded then.
    """
    with quiet_transformers():
        loaded, info = load_any(os.fspath(folder), type(model), ignore_mismatched_sizes=True)
    wrong = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": sorted(str(found[0]) for found in info["mismatched_keys"]),
    }
    named = "; ".join(f"{len(keys)} {what} ({', '.join(keys[:2])})" for what, keys in wrong.items() if keys)
    if named:
        raise ValueError(f"weights in {os.fspath(folder)!r} are not those of {type(model).__name__}: {named}")
    state = loaded.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if {name: tuple(tensor.shape) for name, tensor in state.items()} != expected:
        raise ValueError(
            f"{os.fspath(folder)!r} holds another model than the one in training: start a new --output_dir"
        )
    model.load_state_dict(state, strict=True)


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest complete `checkpoint-N` of a folder, None without one.

    One that a crash left half-written is passed over: `Trainer` writes the state of the run last.
    """
    found = {
        int(path.name.removeprefix("checkpoint-")): str(path)
        for path in Path(output_dir).glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit() and (path / TRAINER_STATE_NAME).is_file()
    }
    return found[max(found)] if found else None


def save_average(average: nn.Module, folder: str | os.PathLike) -> None:
    """Write the averaged weights of a run, `average.safetensors`, into the folder of a checkpoint."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in average.state_dict().items()}
    save_file(state, Path(folder) / AVERAGE_NAME, metadata={"format": "pt"})


def load_average(average: nn.Module, folder: str | os.PathLike) -> None:
    """Read the averaged weights of a checkpoint.

    Raises:
        ValueError: the checkpoint has none, they are damaged, or are of another model.
    """
    path = Path(folder) / AVERAGE_NAME
    if not path.is_file():
        raise ValueError(
            f"{os.fspath(folder)!r} holds no averaged weights ({AVERAGE_NAME}): its run had no --ema_momentum; start"
            " a new --output_dir"
        )
    try:
        average.load_state_dict(load_file(path), strict=True)
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the averaged weights in {str(path)!r} are not those of this model: {reason}") from error


def save_settings(settings: Mapping[str, Any], folder: str | os.PathLike) -> None:
    """Write what a run was told, `settings.json`, into the folder of a checkpoint."""
    (Path(folder) / SETTINGS_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def check_settings(settings: Mapping[str, Any], folder: str | os.PathLike) -> None:
    """
    Raises:
        ValueError: the run of a checkpoint was told something else, which is named: to go on would be neither run.
    """
    try:
        saved = json.loads((Path(folder) / SETTINGS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(folder)!r} does not say what its run was told ({SETTINGS_NAME}): {error}"
        ) from error
    changed = [name for name in settings if settings[name] != saved.get(name)]
    if changed:
        named = ", ".join(f"{name} ({saved.get(name)}, now {settings[name]})" for name in changed[:3])
        raise ValueError(
            f"{os.fspath(folder)!r} is of a run with other options, {named}: pass the same ones, or start a new"
            " --output_dir"
        )
