"""
The published models by name, from one table (`zoo.yaml`), and `fetch`, which returns a folder for `from_pretrained`.
"""

import difflib
import hashlib
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub import get_hf_file_metadata
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock

from .hints import either
from .options import Command, parse
from .reporting import RunError, UsageError, one_line, quiet_hub, reporting
from .run_folder import CONVERSION
from .storage import INCOMPLETE, sha256_of


# OpenMMLab's file names end in the first 8 hexadecimal digits of the file's SHA-256, before the suffix.
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8})\.(?:pth|pt|bin|safetensors)$")
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
        hint = f"did you mean {either(close)}?" if close else "mocov3 zoo lists all"
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


def downloads_folder(name: str = "") -> Path:
    """Where a file is kept until it is converted."""
    return cache_folder() / "downloads" / name


def at_mirror(url: str, mirror: str | None) -> str:
    """`url` with its scheme and host replaced by `mirror`."""
    return url if mirror is None else mirror.rstrip("/") + urlsplit(url).path


def hash_in_name(name: str) -> str | None:
    """The beginning of the SHA-256 that a file name carries; None without one."""
    match = HASH_IN_NAME.search(name)
    return match.group(1) if match else None


def download(url: str, folder: str | Path, sha256: str | None = None) -> Path:
    """
    Download a file, verify its hash and return its path. A finished file is verified again, and downloaded again only
    if its hash is wrong.

    An interrupted download resumes, also in a later run, as long as the server has the same version of the file.

    Args:
        url: `http://` or `https://`.
        folder: Where the file is kept under its own name.
        sha256: Its SHA-256 or the beginning of it; read from the file name by default.

    Raises:
        UsageError: A URL of another kind or without a file name, or something that is no SHA-256.
        RunError: No connection, no such file, or a wrong hash; a file with a wrong hash is deleted.
    """
    name = name_in_url(url)
    expected = hash_in_name(name) or "" if sha256 is None else checked_hash(sha256)
    target = Path(folder) / name
    for is_kept in (True, False) if target.is_file() else (False,):
        if not is_kept:
            download_to(target, url)
        actual = sha256_of(target) if expected else ""
        if actual.startswith(expected):
            return target
        target.unlink()
    raise RunError(
        f"{url} has a wrong hash: its SHA-256 begins with {actual[: len(expected)]}, published is {expected}; the"
        " file was deleted"
    )


def checked_hash(sha256: str) -> str:
    """A SHA-256, or its beginning, in lower case; UsageError for anything else."""
    if not re.fullmatch(r"[0-9a-fA-F]{1,64}", sha256):
        raise UsageError(f"--sha256 {sha256!r} is not a SHA-256: pass up to 64 hexadecimal digits")
    return sha256.lower()


def name_in_url(url: str) -> str:
    """The file name at the end of an `http(s)` URL; UsageError without one."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise UsageError(f"{url} is not a URL: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UsageError(f"{url} cannot be downloaded: expected a URL that begins with https:// or http://")
    name = unquote(parts.path.rpartition("/")[2])
    if name in ("", ".", "..") or not name.isprintable() or re.search(r"[/\\]", name) or len(name.encode()) > 200:
        raise UsageError(f"{url} does not end in a file name")
    return name


def download_to(target: Path, url: str) -> None:
    """Download a file, continuing what is there of the same version; RunError as `download`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # No token: the server is not the Hub. The client follows redirects to http and https only.
        with quiet_hub():
            metadata = get_hf_file_metadata(url, token=False, retry_on_errors=True)
        # The name holds the version, so that the beginning of another version is never continued.
        version = hashlib.sha256(f"{metadata.etag} {metadata.size}".encode()).hexdigest()[:8]
        partial = target.with_name(f".{target.name}.{version}{INCOMPLETE}")
        with partial.open("wb" if metadata.size is None else "ab") as file:
            if file.tell() > (metadata.size or 0):  # more than there is: the server sent something else
                file.seek(0)
                file.truncate()
            http_get(url, file, resume_size=file.tell(), expected_size=metadata.size, displayed_filename=target.name)
    except OfflineModeIsEnabled as error:
        raise RunError(f"{url} cannot be downloaded: HF_HUB_OFFLINE is set") from error
    except HfHubHTTPError as error:
        status, reason = error.response.status_code, error.response.reason_phrase
        raise RunError(f"{url} cannot be downloaded: the server answers {status} {reason}") from error
    except (HTTPError, OSError) as error:
        raise RunError(
            f"{url} cannot be downloaded ({one_line(error)}): run the command again to resume the download"
        ) from error
    partial.rename(target)


def convert_url(url: str, folder: Path, output_dir: str | Path, sha256: str | None, **options: Any) -> dict[str, Any]:
    """Download a file, convert it to `output_dir` and return the report. A kept file that is damaged is downloaded
    again; one that arrives damaged is deleted."""
    # The only import uphill: fetching a model includes converting it.
    from .interop.convert import convert_checkpoint
    from .interop.torch_files import DamagedError

    is_kept = (folder / name_in_url(url)).is_file()
    file = download(url, folder, sha256)
    try:
        return convert_checkpoint(file, output_dir, **options)
    except DamagedError:
        file.unlink()
        if not is_kept:
            raise
    return convert_url(url, folder, output_dir, sha256, **options)


def convert_entry(
    name: str, output_dir: str | Path, mirror: str | None = None, sha256: str | None = None, **options: Any
) -> dict[str, Any]:
    """Download a published model into the cache, convert it to `output_dir` and return the report."""
    entry = find_entry(name)
    url, sha256 = at_mirror(entry.url, mirror), entry.sha256 if sha256 is None else sha256
    options = {"default_labels": entry.labels, "stage": entry.stage, "epochs": entry.epochs} | options
    origin = {"name": name, "url": entry.url}
    return convert_url(url, downloads_folder(name), output_dir, sha256, origin=origin, **options)


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
