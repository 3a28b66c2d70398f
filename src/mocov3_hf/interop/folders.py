"""Model folders written whole or not at all, with a report of what went where."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .checkpoints import Converted
from .errors import CheckpointError


REPORT_NAME = "conversion.json"


@contextlib.contextmanager
def atomic_folder(output_dir: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """
    A temporary folder beside `output_dir` that takes its place when the block ends, and vanishes when it fails.

    Raises:
        CheckpointError: `output_dir` holds something already and `overwrite` is False.
    """
    target = Path(output_dir).absolute()
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not overwrite)):
        raise CheckpointError(f"{output_dir} exists and is not an empty folder: choose another, or pass --overwrite")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        umask = current_umask()  # mkdtemp and safetensors make theirs private
        temporary.chmod(0o777 & ~umask)
        for path in temporary.rglob("*"):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        if target.exists():
            displaced = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            target.rename(displaced / target.name)
            temporary.rename(target)
            shutil.rmtree(displaced)
        else:
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def sha256_of(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def summarise(converted: Converted) -> list[dict[str, Any]]:
    """What went where: one row per part of the model with its origin, tensors, parameters and bytes."""
    rows: dict[str, dict[str, Any]] = {}
    for key, tensor in converted.state_dict.items():
        part = part_of(key)
        row = rows.setdefault(part, {"part": part, "from": [], "tensors": 0, "parameters": 0, "bytes": 0})
        origin = converted.sources[key]
        if origin not in row["from"]:
            row["from"].append(origin)
        row["tensors"] += 1
        row["parameters"] += tensor.numel() if is_parameter(key) else 0
        row["bytes"] += tensor.numel() * tensor.element_size()
    for row in rows.values():
        row["from"] = common_prefix(row["from"])
    return list(rows.values())


def part_of(key: str) -> str:
    """The part of the model that a key belongs to: an encoder's stem, blocks or norm, or a head."""
    module = key.split(".backbone.")[0] if ".backbone." in key else key.split(".layers.")[0]
    if key.startswith("backbone."):
        module = "backbone"
    return module.removesuffix(".weight").removesuffix(".bias")


def is_parameter(key: str) -> bool:
    return not key.endswith(("running_mean", "running_var", "num_batches_tracked"))


def common_prefix(names: list[str]) -> str:
    """The dotted path that names have in common, with `.*` for what differs."""
    if len(names) == 1:
        return names[0]
    shared = [parts[0] for parts in zip(*(name.split(".") for name in names), strict=False) if len(set(parts)) == 1]
    return ".".join([*shared, "*"])


def verify_folder(folder: Path, model_class: type[PreTrainedModel], expected: dict[str, torch.Tensor]) -> None:
    """
    Load a written folder as a user does and compare it with what was to be written, bit for bit.

    Raises:
        CheckpointError: a key is missing, unexpected or differs.
    """
    model, info = model_class.from_pretrained(folder, dtype="auto", output_loading_info=True)
    problems = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    if problems:
        raise CheckpointError(f"the written model does not load back: {problems}")
    loaded = model.state_dict()
    different = [key for key, value in expected.items() if not torch.equal(loaded[key], value)]
    if different or loaded.keys() != expected.keys():
        raise CheckpointError(f"the written model loads back differently: {', '.join(different[:8]) or 'other keys'}")


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def format_table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Rows as aligned text, numbers to the right."""
    cells = [[f"{row[c]:,}" if isinstance(row[c], int) else str(row[c]) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    numeric = [all(isinstance(row[c], int | float) for row in rows) for c in columns]
    lines = [
        "  ".join(text.rjust(w) if n else text.ljust(w) for text, w, n in zip(line, widths, numeric, strict=True))
        for line in [columns, *cells]
    ]
    return "\n".join(line.rstrip() for line in lines)
