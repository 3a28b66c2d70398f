"""The result of a scan of a large folder, kept on disk and used again while no folder in it has changed.

A changed folder is one whose device, inode or times differ: entries were added, removed or renamed. Files whose
content was replaced in place keep their names, so the list stays valid. The index is in `mocov3_scans` in the cache of
`datasets` and can be deleted at any time.
"""

import hashlib
import json
import os
import time
from pathlib import Path

import datasets
import pyarrow as pa

from ..storage import atomic_file
from .account import Tally
from .scan import Scan, scan_folder, stamp_of


INDEX_FROM = 20_000  # images; a smaller folder is read faster than one can tell
MAPPED_FROM = 200_000  # rows; a smaller table is sent to a data-loading worker in no time
_VERSION = 1
# A folder that changed right before the scan could change again without a visible difference in its times.
_SETTLED_NS = 2_000_000_000
_LISTS = ("archives", "parquet", "tables")


def scan(folder: str | os.PathLike, progress: bool = True) -> Scan:
    """`scan_folder`, from the index if no folder has changed since. Raises as `scan_folder`."""
    root = os.path.abspath(os.path.expanduser(os.fsencode(folder)))
    path = index_path(root)
    found = read_index(path, root)
    if found is None:
        started = time.time_ns()
        found = scan_folder(folder, progress)
        newest = max(max(stamp[2:]) for stamp in found.folders.values())
        if len(found.images) >= INDEX_FROM and newest < started - _SETTLED_NS:
            write_index(path, found)
    return found


def index_path(root: bytes) -> Path:
    """Where the index of a folder is."""
    name = hashlib.sha256(root).hexdigest()[:32]
    return Path(datasets.config.HF_DATASETS_CACHE) / "mocov3_scans" / f"{name}.arrow"


def read_index(path: Path, root: bytes) -> Scan | None:
    """The scan in an index file; None if there is none, it is damaged, or a folder has changed."""
    try:
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
            known = json.loads(table.schema.metadata[b"scan"])
            if known["version"] != _VERSION or _bytes(known["root"]) != root:
                return None
            folders = {_bytes(name): tuple(stamp) for name, stamp in known["folders"]}
            if any(stamp_of(os.path.join(root, name)) != stamp for name, stamp in folders.items()):
                return None
            images = table.column("images").to_pylist()
        lists = {name: list(map(_bytes, known[name])) for name in _LISTS}
        return Scan(root, images, **lists, tally=Tally(known["counts"], known["examples"]), folders=folders)
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
        return None


def write_index(path: Path, scan: Scan) -> None:
    """Keep a scan. Without a cache folder that can be written, nothing is kept."""
    known = {
        "version": _VERSION,
        "root": _text(scan.root),
        "folders": [[_text(name), stamp] for name, stamp in scan.folders.items()],
        "counts": scan.tally.counts,
        "examples": scan.tally.examples,
        **{name: list(map(_text, getattr(scan, name))) for name in _LISTS},
    }
    images = pa.chunked_array([pa.array(scan.images[i : i + 250_000], pa.binary()) for i in _starts(scan.images)])
    table = pa.table({"images": images}).replace_schema_metadata({"scan": json.dumps(known)})
    try:
        with atomic_file(path) as aside, pa.ipc.new_file(str(aside), table.schema) as file:
            file.write_table(table)
    except OSError:
        return  # the next run scans again


def memory_mapped(dataset: datasets.Dataset) -> datasets.Dataset:
    """
    The same table, if it is large from a file in the cache, so that data-loading workers that are not forked share it
    instead of receiving a copy each.
    """
    if len(dataset) < MAPPED_FROM:
        return dataset
    path = index_path(f"table {dataset._fingerprint}".encode())
    table = dataset.data.table
    try:
        if not path.is_file():
            with atomic_file(path) as aside, pa.ipc.new_stream(str(aside), table.schema) as file:
                file.write_table(table)
        mapped = datasets.Dataset.from_file(str(path), info=dataset.info)
    except (OSError, pa.ArrowException):
        return dataset
    return mapped if len(mapped) == len(dataset) else dataset


def _starts(images: list) -> range:
    return range(0, max(len(images), 1), 250_000)


def _text(name: bytes) -> str:
    return name.decode("latin-1")


def _bytes(text: str) -> bytes:
    return text.encode("latin-1")
