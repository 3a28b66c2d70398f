"""Files from the web: with progress, resumed where they broke off, and checked against a published hash."""

import json
import re
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from .errors import CheckpointError
from .folders import sha256_of


BLOCK = 1 << 20
TIMEOUT_SECONDS = 30
# OpenMMLab's published files end in the first 8 hexadecimal digits of their SHA-256, before the suffix.
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8})\.(?:pth|pt|bin|safetensors)$")


def file_name(url: str) -> str:
    """
    Raises:
        CheckpointError: a URL without a file name.
    """
    name = unquote(urlsplit(url).path).rpartition("/")[2]
    if not name:
        raise CheckpointError(f"{url} names no file")
    return name


def hash_in_name(name: str) -> str | None:
    """The beginning of the SHA-256 that a file name carries, None where it carries none."""
    match = HASH_IN_NAME.search(name)
    return match.group(1) if match else None


def download(
    url: str, folder: str | Path, sha256: str | None = None, attempts: int = 5, pause_seconds: float = 1.0
) -> Path:
    """
    Download a file once and give back its path; a finished file is only checked again.

    Args:
        url (`str`):
            `http://` or `https://`.
        folder (`str` or `Path`):
            Where the file is kept under its own name; what is not finished ends in `.incomplete` and is resumed.
        sha256 (`str`, *optional*):
            Its SHA-256 or the beginning of it; read off the file name where left out.
        attempts (`int`, *optional*, defaults to 5):
            How often in a row a connection may break without a byte gained; the pauses between double.

    Raises:
        CheckpointError: the server has no such file or stays away, or the file's hash is another (it is deleted).
    """
    name = file_name(url)
    expected = sha256 or hash_in_name(name)
    target = Path(folder) / name
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(name + ".incomplete")
        failures, size = 0, current_size(partial)
        while True:
            try:
                receive(url, partial)
                break
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code != 429:
                    raise CheckpointError(f"{url} answers {error.code} {error.reason}") from error
                reason = f"{error.code} {error.reason}"
            except (OSError, HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            failures = failures + 1 if current_size(partial) <= size else 1
            size = current_size(partial)
            if failures >= attempts:
                raise CheckpointError(f"{url} cannot be downloaded ({reason}); what came is kept: run again to resume")
            time.sleep(pause_seconds * 2 ** (failures - 1))
        check_hash(partial, expected, url)
        partial.rename(target)
        state_file(partial).unlink(missing_ok=True)
    else:
        check_hash(target, expected, url)
    return target


def current_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def state_file(partial: Path) -> Path:
    """Where the server's mark of the version that `partial` is the beginning of is kept."""
    return partial.with_name(partial.name + ".json")


def receive(url: str, partial: Path) -> None:
    """
    Receive the rest of a file. The server is asked for it only if the file is still the same version.

    Raises:
        OSError: the connection broke, or ended before the announced length.
    """
    have = current_size(partial)
    request = urllib.request.Request(url, headers={"User-Agent": "mocov3_hf"})
    if have and state_file(partial).exists():
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", json.loads(state_file(partial).read_text())["version"])
    else:
        have = 0
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # the range is not satisfiable: what is here is not the beginning of that file
            raise
        partial.unlink()
        raise OSError("the server cannot resume this file") from error
    with response:
        resumed = response.status == 206
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        version = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if version and not version.startswith("W/"):
            state_file(partial).write_text(json.dumps({"version": version}))
        else:
            state_file(partial).unlink(missing_ok=True)
        with (
            partial.open("ab" if resumed else "wb") as file,
            tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=partial.stem) as progress,
        ):
            while block := response.read(BLOCK):
                file.write(block)
                progress.update(len(block))
    if total is not None and current_size(partial) != total:
        raise OSError(f"the connection ended after {current_size(partial):,} of {total:,} bytes")


def check_hash(path: Path, expected: str | None, url: str) -> None:
    """
    Raises:
        CheckpointError: another hash than published. The file is deleted, so that the next run downloads it anew.
    """
    if expected is None:
        return
    actual = sha256_of(path)
    if not actual.startswith(expected.lower()):
        path.unlink()
        state_file(path).unlink(missing_ok=True)
        raise CheckpointError(
            f"{url} has a wrong hash: its SHA-256 begins with {actual[: len(expected)]}, published is {expected}; the"
            " file was deleted"
        )
