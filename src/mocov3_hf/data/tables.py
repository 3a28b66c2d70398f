"""Tables of image paths in CSV, TSV and JSON Lines files: data sets of their own, or metadata beside images."""

import csv
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from .file_kinds import TABLES, extension_of
from .scan import SPLIT_NAMES


# Names of the column of image paths in a CSV file.
PATH_NAMES = ("image", "image_path", "path", "file", "file_name", "filename", "filepath")
SPLIT_COLUMN = "split"
FILE_NAME = "file_name"  # in metadata.csv, as `datasets` has it


def is_table(path: str | os.PathLike) -> bool:
    """Whether a file is a table by its extension."""
    return extension_of(os.path.basename(os.fsencode(path))) in TABLES


def find_csv_files(dataset_name: str, split: str) -> list[Path]:
    """The CSV files of a data set: the file itself, or those in the folder. Empty if it is another kind of data set.

    A CSV file beside image folders or parquet files is not the data set. In a folder with subfolders, at least one
    CSV file must have the name of the split, or a column `split`.
    """
    path = Path(os.path.expanduser(dataset_name))
    if path.is_file():
        return [path] if path.suffix.lower() in (".csv", ".tsv") else []
    # `metadata.csv` belongs to an image folder.
    names = ("dataset_dict.json", "state.json", "metadata.csv", "metadata.jsonl", "metadata.parquet")
    if not path.is_dir() or any((path / name).exists() for name in names):
        return []
    entries = sorted(path.iterdir())
    files = [entry for entry in entries if entry.suffix.lower() in (".csv", ".tsv") and entry.is_file()]
    files = [file for file in files if not file.name.startswith(".")]
    if not files or any(entry.suffix == ".parquet" for entry in entries):
        return []
    parts = {part.strip() for part in split.split("+")}
    named = any(file.stem in parts or SPLIT_COLUMN in _header(file) for file in files)
    return files if named or not any(entry.is_dir() for entry in entries) else []


def names_images(files: list[Path], image_column: str | None = None) -> bool:
    """Whether CSV files beside images name them: they have a column of paths, and the first path exists."""
    for file in files:
        header = _header(file)
        found = [name for name in header if name == image_column or (image_column is None and name in PATH_NAMES)]
        try:
            with open(file, encoding="utf-8-sig", errors="replace", newline="") as lines:
                row = next(iter(csv.DictReader(lines, delimiter=_delimiter(file), skipinitialspace=True)), None)
        except csv.Error:  # such as a field of more than 128 KiB
            return False
        if len(found) != 1 or row is None or not os.path.isfile(file.parent / os.path.expanduser(row[found[0]] or "")):
            return False
    return True


def _delimiter(file: Path) -> str:
    return "\t" if file.suffix.lower() == ".tsv" else ","


def _header(file: Path) -> list[str]:
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as lines:
        try:
            return next(csv.reader(lines, delimiter=_delimiter(file), skipinitialspace=True), [])
        except csv.Error:
            return []


def read_csv_splits(
    files: list[Path], image_column: str | None = None
) -> dict[str, list[tuple[datasets.Dataset, Path]]]:
    """
    The tables of CSV files by split, each with its file.

    A column `split` names the split of each row; otherwise a file holds the split that it is named after, `train.csv`.
    A single file that is not named after a split is also the split `train`.

    Raises:
        ValueError: A file is not a valid table.
    """
    tables: dict[str, list[tuple[datasets.Dataset, Path]]] = {}
    for file in files:
        table = _read_csv(file, image_column)
        names = table[SPLIT_COLUMN][:] if SPLIT_COLUMN in table.column_names else [""] * len(table)
        names = np.array([name or file.stem for name in names])
        for name in dict.fromkeys(names.tolist()):
            rows = table if (names == name).all() else table.select(np.flatnonzero(names == name))
            tables.setdefault(name, []).append((rows, file))
    if len(files) == 1 and list(tables) == [files[0].stem] and os.fsencode(files[0].stem.lower()) not in SPLIT_NAMES:
        tables["train"] = tables[files[0].stem]
    return tables


def _read_csv(file: Path, image_column: str | None) -> datasets.Dataset:
    # These are text, even where all values look like numbers. Class names such as "null" or "NA" are not missing.
    text_columns = dict.fromkeys((*PATH_NAMES, SPLIT_COLUMN, image_column or PATH_NAMES[0]), str)
    options = {"converters": text_columns, "keep_default_na": False, "na_values": [""], "skipinitialspace": True}
    try:
        table = pd.read_csv(file, encoding="utf-8-sig", sep=_delimiter(file), low_memory=False, **options)
        if not isinstance(table.index, pd.RangeIndex):
            raise ValueError("its rows are longer than its header")
        if len(table) == 0:
            raise ValueError("it has no rows")
        return datasets.Dataset.from_pandas(table, preserve_index=False)
    except (ValueError, OSError, OverflowError, pa.ArrowException) as error:
        if isinstance(error, OverflowError):
            error = ValueError("a number does not fit into 64 bits")
        raise ValueError(f"{str(file)!r} is not a CSV table with a header and rows: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error.__cause__ or error).split())


def read_metadata(file: Path) -> datasets.Dataset:
    """
    A table beside images: `metadata.csv`, `metadata.jsonl` or `metadata.parquet`.

    Raises:
        ValueError: It is not a table, or has no column `file_name` (or `NAME_file_name`) of text.
    """
    try:
        if file.suffix == ".csv":
            table = _read_csv(file, FILE_NAME)
        elif file.suffix == ".jsonl":
            lines = file.read_text(encoding="utf-8-sig").splitlines()
            table = datasets.Dataset.from_list([json.loads(line) for line in lines if line.strip()])
        else:
            table = datasets.Dataset(pq.read_table(file))
    except (ValueError, OSError, pa.ArrowException, AttributeError, TypeError) as error:
        raise ValueError(f"{str(file)!r} cannot be read: {_one_line(error)}") from error
    columns = file_name_columns(table)
    if not columns:
        raise ValueError(
            f"{str(file)!r} has no column {FILE_NAME!r} of paths; columns: {', '.join(table.column_names) or 'none'}"
        )
    return table


def file_name_columns(table: datasets.Dataset) -> dict[str, str]:
    """Name of the image column to the column of paths that it comes from: `file_name` gives `image`."""
    found = {}
    for name, feature in table.features.items():
        is_text = isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
        if is_text and name == FILE_NAME:
            found["image"] = name
        elif is_text and name.endswith(f"_{FILE_NAME}"):
            found[name.removesuffix(f"_{FILE_NAME}")] = name
    return found
