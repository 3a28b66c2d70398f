"""Reading checkpoint files of other codebases without executing code in them."""

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..hints import describe_missing
from .layouts import ConversionError


WRAPPERS = ("state_dict", "model")  # of the official code and mmpretrain; of DeiT
SAFETENSORS_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """
    The content of a checkpoint file.

    Attributes:
        state_dict: Tensors by name, mapped from disk where the format allows.
        entry: The entry of the file that holds the state dict; None if it is the whole file.
        epochs: Number of epochs trained; None if the file does not say.
        labels: Names of the classes in order; None if the file does not say.
        linear: Whether the file says that the backbone was frozen.
        others: The other entries, name to type: optimizer, scaler, ...
    """

    state_dict: dict[str, torch.Tensor] = field(repr=False)
    entry: str | None = None
    epochs: int | None = None
    labels: list[str] | None = None
    linear: bool = False
    others: dict[str, str] = field(default_factory=dict)


def read_checkpoint(path: str | Path, entry: str | None = None) -> Checkpoint:
    """
    Read a `.pth`, `.pt`, `.pth.tar`, `.bin` or `.safetensors` file.

    Args:
        path (`str` or `Path`):
            The file. Only tensors and plain containers are loaded (`torch.load(weights_only=True)`).
        entry (`str`, *optional*):
            Name of the entry that holds the state dict; found automatically by default.

    Raises:
        ConversionError: No such file, or one that is truncated, not a checkpoint, or contains code.
    """
    path = Path(path)
    if not path.is_file():
        is_folder = f"checkpoint {path} is a folder, expected a file"
        raise ConversionError(is_folder if path.is_dir() else describe_missing(path, "checkpoint"))
    if path.suffix == SAFETENSORS_SUFFIX:
        payload: Any = read_safetensors(path)
    else:
        payload = read_torch_file(path)
    if not isinstance(payload, Mapping):
        raise ConversionError(f"{path} holds a {type(payload).__name__}, expected a dictionary of tensors")
    return unwrap(path, payload, entry)


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} cannot be read as a safetensors file ({first_sentence(error)})") from error


def read_torch_file(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(64)
    zipped = head.startswith(b"PK\x03\x04")
    if zipped and not zipfile.is_zipfile(path):
        raise ConversionError(
            f"{path} is truncated: its zip archive has no end ({path.stat().st_size:,} bytes); download it again"
        )
    if not zipped and not head.startswith(b"\x80"):
        raise ConversionError(
            f"{path} is not a checkpoint: it begins with {head[:24]!r}, expected a file written by torch.save"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise ConversionError(refusal(path, zipped, error)) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        raise ConversionError(
            f"{path} is truncated or damaged ({first_sentence(error)}); download it again"
        ) from error


def refusal(path: Path, zipped: bool, error: Exception) -> str:
    """Why a file is not loaded: it contains objects other than tensors and plain containers."""
    names = []
    if zipped:
        try:
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except (pickle.UnpicklingError, RuntimeError, ValueError):
            names = []
    if not names:
        match = re.search(r"GLOBAL ([\w.]+)", str(error))
        if match is None:
            return f"{path} is damaged or not written by torch.save ({first_sentence(error)}); download it again"
        names = [match.group(1)]
    return (
        f"{path} is refused: besides tensors it contains {', '.join(names)}, which loading would execute. If you trust"
        " its origin, save only its state dict with torch.save and convert that file"
    )


def first_sentence(error: Exception) -> str:
    """The first sentence of an error message, without the advice that torch appends."""
    return re.split(r"[\n]|\. ", str(error).strip())[0][:160]


def unwrap(path: Path, payload: Mapping[str, Any], entry: str | None) -> Checkpoint:
    if entry is not None and not isinstance(payload.get(entry), Mapping):
        raise ConversionError(f"{path} has no entry {entry!r} with tensors; its entries are {enumerated(payload)}")
    if entry is None:
        entry = next((name for name in WRAPPERS if isinstance(payload.get(name), Mapping)), None)
    if entry is None:
        if not payload or not any(isinstance(value, torch.Tensor) for value in payload.values()):
            raise ConversionError(
                f"{path} has no state dict; its entries are {enumerated(payload)}: pass the right one as --entry"
            )
        return Checkpoint(dict(payload))
    meta = payload.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    return Checkpoint(
        dict(payload[entry]),
        entry=entry,
        epochs=first_int(payload.get("epoch"), meta.get("epoch")),
        labels=find_labels(meta),
        linear="best_acc1" in payload or bool(re.search(r"frozen_stages\s*=\s*[1-9]", str(meta.get("cfg", "")))),
        others={str(name): type(value).__name__ for name, value in payload.items() if name != entry},
    )


def enumerated(payload: Mapping[str, Any]) -> str:
    names = [str(name) for name in payload]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "none"


def first_int(*values: Any) -> int | None:
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


def find_labels(meta: Mapping[str, Any]) -> list[str] | None:
    """Names of the classes, where mmpretrain and its predecessors write them."""
    dataset = meta.get("dataset_meta")
    places = [dataset if isinstance(dataset, Mapping) else {}, meta]
    for place in places:
        for name in ("classes", "CLASSES"):
            labels = place.get(name)
            if isinstance(labels, list | tuple) and labels:
                return [str(label) for label in labels]
    return None


def read_labels(source: str | Path) -> list[str]:
    """
    Class names in order, from a text file (one per line), a JSON list, a JSON object `{"0": name}`, or
    `"imagenet-1k"`.

    Raises:
        ConversionError: No such file, or a file in another format.
    """
    if source == "imagenet-1k":
        from torchvision.models import ResNet50_Weights

        return list(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(
            f"labels cannot be read from {path} ({first_sentence(error)}): pass a text or JSON file, or imagenet-1k"
        ) from error
    if path.suffix != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        labels = json.loads(text)
        if isinstance(labels, dict):
            labels = [labels[str(index)] for index in range(len(labels))]
    except (ValueError, KeyError, RecursionError) as error:
        raise ConversionError(f"{path} is not a list of class names: {first_sentence(error)}") from error
    if not isinstance(labels, list):
        raise ConversionError(f"{path} holds a {type(labels).__name__}, expected a list of class names")
    return [str(label) for label in labels]
