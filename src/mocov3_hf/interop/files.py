"""Reading checkpoint files of other codebases: nothing in them is executed, and nothing they claim is believed."""

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..hints import describe_missing
from .layouts import ConversionError, brief, enumerate_keys
from .pickled import KEYS, Call, checked_key
from .torch_files import MAX_SIZE, DamagedError, Payload, read_legacy, read_zip


# Entries with the state dict: of the official code and mmpretrain, of DeiT; then those that hold only an EMA of it.
WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema", "ema_state_dict")
MAX_TENSORS = 10_000  # the largest model of the paper has 1,300 with its momentum encoder
MAX_HEADER = 3 << 19  # of a safetensors file, in bytes: 10,000 tensors have 1.2 MB
# What a file is that does not begin like a checkpoint, by its first bytes.
SIGNATURES = {
    b"\x1f\x8b": "a gzip file: unpack it first",
    b"BZh": "a bzip2 file: unpack it first",
    b"\xfd7zXZ": "an xz file: unpack it first",
    b"\x28\xb5\x2f\xfd": "a Zstandard file: unpack it first",
    b"\x89HDF": "an HDF5 file, as Keras writes: convert it to safetensors first",
    b"\x93NUMPY": "a NumPy array: save a state dict with torch.save instead",
    b"GGUF": "a GGUF file: convert the original checkpoint instead",
}


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
    Read a `.pth`, `.pt`, `.pth.tar`, `.bin` or `.safetensors` file. Its format is found in its content.

    Sizes, offsets, names and checksums are checked before memory is taken. Nothing in the file is executed.

    Args:
        path (`str` or `Path`):
            The file.
        entry (`str`, *optional*):
            Name of the entry that holds the state dict; found automatically by default.

    Raises:
        ConversionError: No such file, or one that is not a checkpoint or contains code.
        DamagedError: A file that is truncated or damaged.
    """
    path = Path(path)
    try:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "is not a file" if path.exists() else ""
            is_other = f"checkpoint {path} {what}, expected a file"
            raise ConversionError(is_other if what else describe_missing(path, "checkpoint"))
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise ConversionError(f"checkpoint {brief(str(path))} cannot be read: {error.strerror or error}") from error
    try:
        if head.startswith(b"PK\x03\x04"):
            payload: Any = read_zip(path)
        elif head.startswith(b"\x80"):
            payload = read_legacy(path)
        elif path.suffix == ".safetensors" or head[8:9] == b"{":
            return unwrap(path, read_safetensors(path), entry)
        else:
            raise DamagedError(f"{path} is {described(head)}")
        return unwrap(path, payload, entry)
    except ConversionError:
        raise
    # Of a file with arbitrary content, any step may fail in its own way: in `zipfile`, in `pickletools` or in ours.
    except (ValueError, LookupError, TypeError, OSError, struct.error, RuntimeError, NotImplementedError) as error:
        raise DamagedError(f"{path} is truncated or damaged ({first_sentence(error)}); download it again") from error


def described(head: bytes) -> str:
    """What a file is that no checkpoint begins like."""
    if head[257:262] == b"ustar":
        return (
            "a tar archive: unpack it, or, if torch before 0.2 wrote it, load it with that version and save its state"
            " dict with torch.save"
        )
    known = next((text for signature, text in SIGNATURES.items() if head.startswith(signature)), None)
    return known or f"not a checkpoint: it begins with {head[:24]!r}, expected a file written by torch.save"


# safetensors


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= min(MAX_HEADER, path.stat().st_size - 8):
                raise ValueError(f"its header has {size:,} bytes, of {path.stat().st_size:,} in the file")
            names = [name for name, _ in json.loads(file.read(size), object_pairs_hook=list)]
        if len(names) > MAX_TENSORS or len(set(names)) < len(names):
            raise ValueError(f"its header has {len(names):,} names, of which {len(set(names)):,} differ")
        return load_file(path)
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise DamagedError(f"{path} cannot be read as a safetensors file ({first_sentence(error)})") from error


def first_sentence(error: Exception) -> str:
    """The first sentence of an error message, without the advice that torch appends."""
    return brief(re.split(r"[\n]|\. ", str(error).strip())[0] or type(error).__name__, 160)


def unwrap(path: Path, payload: "Payload | dict[str, torch.Tensor]", entry: str | None) -> Checkpoint:
    """Find the state dict and what a file says about it."""
    value = payload.value if isinstance(payload, Payload) else payload
    entries = as_mapping(value)
    if entries is None:
        kind = value.function if isinstance(value, Call) else type(value).__name__
        raise ConversionError(f"{path} holds a {brief(kind)}, expected a dictionary of tensors")
    listed = enumerate_keys([str(name) if isinstance(name, KEYS) else "?" for name in entries], 8) or "none"
    if entry is not None and as_mapping(entries.get(entry)) is None:
        raise ConversionError(f"{path} has no entry {entry!r} with tensors; its entries are {listed}")
    if entry is None:
        entry = next((name for name in WRAPPERS if as_mapping(entries.get(name)) is not None), None)
    if entry is None and not any(isinstance(value, Call | torch.Tensor) for value in entries.values()):
        raise ConversionError(f"{path} has no state dict; its entries are {listed}: pass the right one as --entry")
    found = entries if entry is None else as_mapping(entries[entry])
    if len(found) > MAX_TENSORS:
        raise ConversionError(f"{path} holds {len(found):,} tensors, expected at most {MAX_TENSORS:,}")
    state_dict = {
        name: payload.tensor(str(name), value) if isinstance(payload, Payload) else value
        for name, value in found.items()
    }
    if entry is None:
        return Checkpoint(state_dict)
    meta = as_mapping(entries.get("meta")) or {}
    return Checkpoint(
        state_dict,
        entry=entry,
        epochs=first_count(entries.get("epoch"), meta.get("epoch")),
        labels=find_labels(meta),
        linear="best_acc1" in entries or is_frozen(meta.get("cfg")),
        others={brief(str(name)): type_name(value) for name, value in list(entries.items())[:100] if name != entry},
    )


def as_mapping(value: Any) -> Mapping[Any, Any] | None:
    """A dictionary, also one in Python 2's form of an `OrderedDict`; None for anything else."""
    if isinstance(value, Call) and value.function == "collections.OrderedDict" and len(value.arguments) == 1:
        pairs = value.arguments[0]
        if isinstance(pairs, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            return {checked_key(key): item for key, item in pairs}
    return value if isinstance(value, dict) else None


def type_name(value: Any) -> str:
    """The name of the type of an entry; of what was not made, of what would have been."""
    if isinstance(value, Call):
        is_tensor = "_rebuild_" in value.function or value.function.endswith("Parameter")
        return "Tensor" if is_tensor else brief(value.function.rpartition(".")[2])
    return type(value).__name__


def is_frozen(settings: Any) -> bool:
    """Whether mmpretrain's settings say that the backbone was frozen."""
    return isinstance(settings, str) and bool(re.search(r"frozen_stages\s*=\s*[1-9]", settings))


def first_count(*values: Any) -> int | None:
    """The first number of epochs among values of any type."""
    return next((value for value in values if type(value) is int and 0 <= value < MAX_SIZE), None)


def find_labels(meta: Mapping[Any, Any]) -> list[str] | None:
    """Names of the classes, where mmpretrain and its predecessors write them."""
    for place in (as_mapping(meta.get("dataset_meta")) or {}, meta):
        for name in ("classes", "CLASSES"):
            labels = place.get(name)
            if isinstance(labels, list | tuple) and labels and all(isinstance(label, str) for label in labels):
                return list(labels)
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
    if path.exists() and not path.is_file():
        raise ConversionError(f"labels cannot be read from {path}, which is not a file: pass a text or JSON file")
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
