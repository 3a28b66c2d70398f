"""
Checkpoints of supervised training: the newest that is not damaged is resumed, and loaded strictly. `Trainer` itself
only warns about keys that do not match.
"""

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ..loading import from_pretrained
from ..reporting import warn
from ..run_folder import TRAINER_STATE, CheckpointError, list_checkpoints
from ..storage import sha256_of, write_json


# `Trainer` loads optimizer states to "cpu:0" in several processes on CPUs, which early versions of torch do not know.
torch.serialization.register_package(
    100, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)

AVERAGE, SETTINGS, HASHES = "average.safetensors", "settings.json", "sha256"
# The settings that say which images a run is trained on: their number and their fingerprint.
DATA_SETTINGS = ("num_train_images", "train_fingerprint")


def reload_strictly(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """
    Load the weights of a folder into a model, through `from_pretrained` and a strict load.

    Raises:
        ValueError: Missing or unexpected weights, or other shapes; the model is unchanged then.
    """
    name = os.fspath(folder)
    loaded, info = from_pretrained(type(model), name, output_loading_info=True, ignore_mismatched_sizes=True)
    wrong = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": sorted(str(found[0]) for found in info["mismatched_keys"]),
    }
    named = "; ".join(f"{len(keys)} {what} ({', '.join(keys[:2])})" for what, keys in wrong.items() if keys)
    if named:
        raise ValueError(f"the weights in {name!r} do not match {type(model).__name__}: {named}")
    state = loaded.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if {name: tuple(tensor.shape) for name, tensor in state.items()} != expected:
        raise ValueError(f"{name!r} holds another model than the one in training: pass a new --output_dir")
    model.load_state_dict(state, strict=True)


def save_average(average: nn.Module, folder: str | os.PathLike) -> None:
    """Write the EMA of the weights, `average.safetensors`, into the folder of a checkpoint."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in average.state_dict().items()}
    save_file(state, Path(folder) / AVERAGE, metadata={"format": "pt"})


def load_average(average: nn.Module, folder: str | os.PathLike) -> None:
    """
    Read the EMA of the weights of a checkpoint.

    Raises:
        ValueError: The checkpoint has none, or they are damaged or of another model.
    """
    path = Path(folder) / AVERAGE
    if not path.is_file():
        raise ValueError(
            f"{os.fspath(folder)!r} has no EMA of the weights ({AVERAGE}), its run had no --ema_decay: pass a new"
            " --output_dir"
        )
    try:
        average.load_state_dict(load_file(path), strict=True)
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the EMA of the weights in {str(path)!r} does not match this model: {reason}") from error


def save_settings(settings: Mapping[str, Any], folder: str | os.PathLike) -> None:
    """Write `settings.json`, the options of a run and the hashes of the weights, into the folder of a checkpoint."""
    hashes = {path.name: sha256_of(path) for path in sorted(Path(folder).glob("*.safetensors"))}
    write_json(Path(folder) / SETTINGS, {**settings, HASHES: hashes})


def saved_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 by file name; empty for earlier versions, and where the options cannot be read."""
    try:
        hashes = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))[HASHES]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):  # `check_settings` reports it
        return {}
    return hashes if isinstance(hashes, dict) else {}


def check_settings(settings: Mapping[str, Any], folder: str | os.PathLike) -> None:
    """
    Compare the options of a run with those of the checkpoint it resumes.

    Raises:
        ValueError: Options that differ, by name, or that cannot be read.
    """
    try:
        saved = json.loads((Path(folder) / SETTINGS).read_text(encoding="utf-8"))
        if not isinstance(saved, dict):
            raise ValueError(f"it holds a {type(saved).__name__}, expected an object")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the options of the run of {os.fspath(folder)!r} cannot be read ({SETTINGS}): {error}"
        ) from error
    # Earlier versions had no such option, or one of another name.
    saved.setdefault("adapt_input_channels", False)
    saved.setdefault("class_balanced_sampling", False)
    saved.setdefault("on_bad_image", saved.get("bad_images", "stop"))
    if "ema_momentum" in saved:
        saved["ema_decay"] = decay_of_momentum(saved["ema_momentum"])
    # Checkpoints of earlier versions do not know their data.
    for name in DATA_SETTINGS:
        saved.setdefault(name, settings.get(name))
    changed = [name for name in settings if settings[name] != saved.get(name)]
    if changed and set(changed) <= set(DATA_SETTINGS):
        number, before = settings[DATA_SETTINGS[0]], saved[DATA_SETTINGS[0]]
        what = f"of {before} images, there are {number} now" if number != before else f"of other {number} images"
        raise ValueError(
            f"{os.fspath(folder)!r} was trained on a training split {what}: restore the data set, or pass a new"
            " --output_dir or --allow_data_change"
        )
    if changed:
        named = ", ".join(f"{name} ({saved.get(name)}, now {settings[name]})" for name in changed[:3])
        raise ValueError(
            f"{os.fspath(folder)!r} is of a run with other options, {named}: pass the same ones, or a new --output_dir"
        )


def saved_precision(folder: str | os.PathLike) -> str | None:
    """`mixed_precision` of the run of a checkpoint, None where its settings cannot be read."""
    try:
        saved = json.loads((Path(folder) / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # `check_settings` reports it
    value = saved.get("mixed_precision") if isinstance(saved, dict) else None
    return value if value in ("no", "bf16", "fp16") else None


def decay_of_momentum(momentum: float) -> float:
    """`ema_decay` for `ema_momentum` of earlier versions; 0 disables the EMA in both."""
    return 1.0 - momentum if momentum else 0.0


def newest_checkpoint(folder: str | os.PathLike) -> str | None:
    """
    The newest complete checkpoint of `Trainer`, which writes its state last; None without one. A line about each newer
    one that is damaged.

    Raises:
        CheckpointError: all are damaged.
    """
    damaged = None
    for path in list_checkpoints(folder):
        if (path / TRAINER_STATE).is_file():
            try:
                check_readable(path)
                return str(path)
            except CheckpointError as error:
                damaged = error
                warn(f"{error}; using an older one")
    if damaged is not None:
        raise damaged
    return None


def check_readable(checkpoint: Path) -> None:
    """
    Check the hashes of the weights, the checksums of the files of `torch.save` and the state of a checkpoint of
    `Trainer`.

    Raises:
        CheckpointError: a file that is damaged or missing.
    """
    hashes = saved_hashes(checkpoint)
    for name in hashes:
        if not (checkpoint / name).is_file():
            raise CheckpointError(f"{checkpoint} is damaged: {name} is missing")
    for path in sorted(checkpoint.iterdir()):
        try:
            if path.suffix in (".pt", ".pth"):
                with zipfile.ZipFile(path) as archive:
                    if (damaged := archive.testzip()) is not None:
                        raise ValueError(f"the checksum of {damaged} is wrong")
            elif path.name == TRAINER_STATE and not isinstance(json.loads(path.read_bytes()), dict):
                raise ValueError("it is not an object")
            elif path.name in hashes and sha256_of(path) != hashes[path.name]:
                raise ValueError("its content is not what was written")
        except (OSError, ValueError, RecursionError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{checkpoint} is damaged: {path.name} cannot be read ({error})") from error
