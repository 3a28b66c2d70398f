"""The published models by name: where they are, how they are checked, and `fetch`, which gives back a folder."""

import difflib
import shutil
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from huggingface_hub.constants import HF_HOME
from huggingface_hub.utils import WeakFileLock

from .convert import convert_checkpoint
from .download import download
from .errors import CheckpointError
from .folders import REPORT_NAME, format_table


@dataclass(frozen=True)
class ZooEntry:
    """One published model; the fields are those of `zoo.yaml`, whose head explains them."""

    name: str
    source: str
    url: str
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


@cache
def load_zoo() -> dict[str, ZooEntry]:
    """Every published model by name, in the order of the table."""
    table = yaml.safe_load(files(__package__).joinpath("zoo.yaml").read_text(encoding="utf-8"))
    sources, zoo = table["sources"], {}
    for name, row in table["models"].items():
        url = sources[row["source"]]["url"] + row["path"]
        zoo[name] = ZooEntry(name=name, url=url, **{key: value for key, value in row.items() if key != "path"})
    return zoo


def find_entry(name: str) -> ZooEntry:
    """
    Raises:
        CheckpointError: no such model, with the closest names.
    """
    zoo = load_zoo()
    if name not in zoo:
        close = difflib.get_close_matches(name, zoo, n=3, cutoff=0.3)
        hint = f"did you mean {' or '.join(close)}?" if close else "scripts/convert_checkpoint.py --list shows all"
        raise CheckpointError(f"the zoo has no model {name!r}: {hint}")
    return zoo[name]


def list_zoo() -> str:
    """The zoo as a table."""
    rows = [
        {
            "name": entry.name,
            "architecture": entry.architecture,
            "stage": entry.stage,
            "epochs": entry.epochs,
            "params M": f"{entry.params_m:.2f}",
            "GFLOPs": f"{entry.gflops:.2f}",
            "top-1 %": f"{entry.top1:.1f}" if entry.top1 else "",
            "source": entry.source,
        }
        for entry in load_zoo().values()
    ]
    return format_table(rows, list(rows[0]))


def cache_folder() -> Path:
    """Where fetched models are kept: below the home of Hugging Face's caches (`HF_HOME`)."""
    return Path(HF_HOME) / "mocov3_hf"


def downloads_folder(name: str) -> Path:
    return cache_folder() / "downloads" / name


def at_mirror(url: str, mirror: str | None) -> str:
    """`url` with its scheme and host replaced by `mirror`."""
    return url if mirror is None else mirror.rstrip("/") + urlsplit(url).path


def convert_entry(name: str, output_dir: str | Path, mirror: str | None = None, **options: Any) -> dict[str, Any]:
    """Download a published model into the cache, convert it to `output_dir` and give back the report."""
    entry = find_entry(name)
    url = at_mirror(entry.url, mirror)
    file = download(url, downloads_folder(name), entry.sha256)
    options = {"default_labels": entry.labels, "stage": entry.stage, "epochs": entry.epochs} | options
    return convert_checkpoint(file, output_dir, origin={"name": name, "url": entry.url}, **options)


def fetch(name: str, *, cache_dir: str | Path | None = None, mirror: str | None = None) -> str:
    """
    The folder of a published model, ready for `from_pretrained` and `pipeline`; downloaded, verified and converted
    the first time, and found in the cache ever after, without a network.

    Args:
        name (`str`):
            A name of the zoo: `python scripts/convert_checkpoint.py --list` shows all.
        cache_dir (`str` or `Path`, *optional*):
            Where converted models are kept; `$HF_HOME/mocov3_hf/models` where left out.
        mirror (`str`, *optional*):
            A server with the same paths to download from instead of the publisher's.

    Raises:
        CheckpointError: no such model, no connection, a wrong hash, or a file that is not what was published.
    """
    find_entry(name)
    models = Path(cache_dir) if cache_dir is not None else cache_folder() / "models"
    folder = models / name
    if not (folder / REPORT_NAME).is_file():
        models.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(models / f".{name}.lock"):
            if not (folder / REPORT_NAME).is_file():  # another process may have fetched it meanwhile
                convert_entry(name, folder, mirror, overwrite=True)
                shutil.rmtree(downloads_folder(name))  # the converted folder holds the same tensors
    return str(folder)
