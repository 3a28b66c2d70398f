"""Find the file that keeps a data set from being read: `datasets` and Arrow say what is wrong, but not where."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .remote import is_remote


def damaged_parquet(files: list[str]) -> tuple[str, str] | None:
    """
    The first local parquet file that cannot be read to its end or has other columns than the first one, and why; None
    if there is none. Reads everything, so call it only after a failure.
    """
    columns = None
    for file in files:
        if is_remote(file):
            continue
        try:
            with pq.ParquetFile(file) as parquet:
                names = parquet.schema_arrow.names
                for _ in parquet.iter_batches():
                    pass
        except (OSError, ValueError, pa.ArrowException) as error:
            return file, one_line(error)
        columns = columns or names
        if names != columns:
            return file, f"it has the columns {', '.join(names)} instead of {', '.join(columns)}"
    return None


def num_parquet_rows(files: list[str]) -> int | None:
    """Rows of local parquet files, None if that is not known."""
    try:
        return None if any(map(is_remote, files)) else sum(pq.read_metadata(file).num_rows for file in files)
    except (OSError, ValueError, pa.ArrowException):
        return None


def check_saved(folder: Path) -> None:
    """
    Check the files that `Dataset.save_to_disk` and `DatasetDict.save_to_disk` wrote.

    Raises:
        ValueError: The first one that is missing, is not a regular file, or holds something else.
    """
    if (folder / "dataset_dict.json").exists():
        splits = _read_object(folder / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
            raise _damaged(folder / "dataset_dict.json", "expected a list of splits")
        for split in splits:
            _check_split(folder / split)
    else:
        _check_split(folder)


def _check_split(folder: Path) -> None:
    _read_object(folder / "dataset_info.json")
    listed = _read_object(folder / "state.json").get("_data_files")
    if not isinstance(listed, list) or not all(isinstance(file, dict) for file in listed):
        raise _damaged(folder / "state.json", "expected a list of data files")
    for file in listed:
        name = file.get("filename")
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise _damaged(folder / "state.json", f"{name!r} is not the name of a file beside it")
        _check_arrow(folder / name)


def _read_object(file: Path) -> dict:
    if not file.is_file():
        raise _damaged(file, "it does not exist" if not file.exists() else "it is not a regular file")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, one_line(error)) from error
    if not isinstance(value, dict):
        raise _damaged(file, f"expected a JSON object, got {type(value).__name__}")
    return value


def _check_arrow(file: Path) -> None:
    if not file.is_file():
        raise _damaged(file, "it does not exist" if not file.exists() else "it is not a regular file")
    try:
        # Maps the file; only the headers of its batches are read.
        with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
            for batch in stream:
                batch.validate()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _damaged(file, one_line(error)) from error


def _damaged(file: Path, why: str) -> ValueError:
    return ValueError(f"{str(file)!r} of a data set that was saved by datasets cannot be read: {why}")


def one_line(error: BaseException) -> str:
    """The message of an error in one line, or its type."""
    return " ".join(str(error).split())[:300] or type(error).__name__
