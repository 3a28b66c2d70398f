"""
The published models by name, from one table (`zoo.yaml`), and `fetch`, which returns a folder for `from_pretrained`.
"""

import difflib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from huggingface_hub.constants import HF_HOME
from huggingface_hub.utils import WeakFileLock

from .options import Command, parse
from .reporting import UsageError, reporting
from .run_folder import CONVERSION


# Arguments of `MoCoV3ViTConfig` for the published ViTs, where they differ from its defaults.
VIT_SIZES = {
    "vit-small": {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "vit-base": {},
    "vit-large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}


@dataclass(frozen=True)
class Publisher:
    """Who published a model; the fields are those of `zoo.yaml`."""

    title: str
    url: str
    homepage: str
    license: str
    license_note: str


@dataclass(frozen=True)
class ZooEntry:
    """One published model; the fields are those of `zoo.yaml`, whose head explains them."""

    name: str
    source: str
    url: str
    publisher: Publisher
    architecture: str
    stage: str
    epochs: int
    params_m: float
    gflops: float
    pretrained: str | None = None
    top1: float | None = None
    labels: str | None = None
    sha256: str | None = None
    recipe: dict[str, Any] | None = None

    @property
    def is_classifier(self) -> bool:
        return self.stage != "pretrained"


@cache
def load_zoo() -> dict[str, ZooEntry]:
    """Every published model by name, in the order of the table."""
    table = yaml.safe_load(files(__package__).joinpath("zoo.yaml").read_text(encoding="utf-8"))
    publishers = {name: Publisher(**row) for name, row in table["sources"].items()}
    zoo = {}
    for name, row in table["models"].items():
        publisher = publishers[row["source"]]
        values = {key: value for key, value in row.items() if key != "path"}
        zoo[name] = ZooEntry(name=name, url=publisher.url + row["path"], publisher=publisher, **values)
    return zoo


def find_entry(name: str) -> ZooEntry:
    """
    A published model by name.

    Raises:
        UsageError: No such model; the message offers the closest names.
    """
    zoo = load_zoo()
    if name not in zoo:
        close = difflib.get_close_matches(name, zoo, n=3, cutoff=0.3)
        hint = f"did you mean {' or '.join(close)}?" if close else "mocov3 zoo lists all"
        raise UsageError(f"no published model is called {name!r}: {hint}")
    return zoo[name]


def list_zoo() -> str:
    """The published models as a table."""
    rows = [("name", "architecture", "stage", "epochs", "params M", "GFLOPs", "top-1 %", "source")]
    for entry in load_zoo().values():
        top1 = f"{entry.top1:.1f}" if entry.top1 else ""
        numbers = (str(entry.epochs), f"{entry.params_m:.2f}", f"{entry.gflops:.2f}", top1)
        rows.append((entry.name, entry.architecture, entry.stage, *numbers, entry.source))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def cache_folder() -> Path:
    """Where fetched models are kept: below the home of Hugging Face's caches (`HF_HOME`)."""
    return Path(HF_HOME) / "mocov3_hf"


def downloads_folder(name: str) -> Path:
    return cache_folder() / "downloads" / name


def at_mirror(url: str, mirror: str | None) -> str:
    """`url` with its scheme and host replaced by `mirror`."""
    return url if mirror is None else mirror.rstrip("/") + urlsplit(url).path


def convert_entry(name: str, output_dir: str | Path, mirror: str | None = None, **options: Any) -> dict[str, Any]:
    """Download a published model into the cache, convert it to `output_dir` and return the report."""
    # The only import uphill: fetching a model includes converting it.
    from .interop.convert import convert_checkpoint
    from .interop.download import download

    entry = find_entry(name)
    url = at_mirror(entry.url, mirror)
    file = download(url, downloads_folder(name), entry.sha256)
    options = {"default_labels": entry.labels, "stage": entry.stage, "epochs": entry.epochs} | options
    return convert_checkpoint(file, output_dir, origin={"name": name, "url": entry.url}, **options)


def fetch(name: str, *, cache_dir: str | Path | None = None, mirror: str | None = None) -> str:
    """
    The folder of a published model for `from_pretrained` and `pipeline`: downloaded, verified and converted the first
    time, afterwards found in the cache, without a network.

    Args:
        name (`str`):
            A name of the zoo: `mocov3 zoo` lists all.
        cache_dir (`str` or `Path`, *optional*):
            Where converted models are kept; `$HF_HOME/mocov3_hf/models` by default.
        mirror (`str`, *optional*):
            A server with the same paths to download from instead of the publisher's.

    Raises:
        UsageError: No such model.
        RunError: No connection, a wrong hash, or a file that is not what was published.
    """
    find_entry(name)
    models = Path(cache_dir) if cache_dir is not None else cache_folder() / "models"
    folder = models / name
    if not (folder / CONVERSION).is_file():
        models.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(models / f".{name}.lock"):
            if not (folder / CONVERSION).is_file():  # another process may have fetched it in the meantime
                convert_entry(name, folder, mirror, overwrite=True)
                shutil.rmtree(downloads_folder(name))  # the converted folder holds the same tensors
    return str(folder)


@dataclass(frozen=True)
class ZooOptions:
    """No options."""


def main(arguments: Iterable[str]) -> None:
    """The command `mocov3 zoo`."""
    with reporting():
        parse(
            Command("zoo", "List the published models; their names work wherever --model is taken.", (ZooOptions,)),
            arguments,
        )
        print(list_zoo())
