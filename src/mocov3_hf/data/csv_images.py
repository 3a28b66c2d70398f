"""Labelled images listed in CSV files: a column of paths and a column of labels."""

import csv
import os
from pathlib import Path

import datasets


# Names that mean the path of an image when no column is named.
_PATH_NAMES = ("image", "image_path", "path", "file", "file_name", "filename", "filepath")
_SPLIT_NAME = "split"
# The metadata of an image folder, which `datasets` reads itself.
_METADATA = "metadata.csv"


def find_csv_files(dataset_name: str, split: str) -> list[Path]:
    """The CSV files of a data set: the file itself, or those in the folder; none where it is another data set.

    A CSV that lies in a folder of images or parquet files is no part of the data: in a folder with other folders one
    of the files must be called as the split, or have a column `split`.
    """
    path = Path(os.path.expanduser(dataset_name))
    if path.is_file():
        return [path] if path.suffix.lower() == ".csv" else []
    if not path.is_dir() or any((path / name).exists() for name in ("dataset_dict.json", "state.json", _METADATA)):
        return []
    entries = sorted(path.iterdir())
    files = [entry for entry in entries if entry.is_file() and entry.suffix.lower() == ".csv"]
    if not files or any(entry.suffix == ".parquet" for entry in entries):
        return []
    parts = {part.strip() for part in split.split("+")}
    meant = any(file.stem in parts or _SPLIT_NAME in _header(file) for file in files)
    return files if meant or not any(entry.is_dir() for entry in entries) else []


def _header(file: Path) -> list[str]:
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as lines:
        return next(csv.reader(lines), [])


def open_csv(files: list[Path], split: str, image_column: str | None = None) -> tuple[datasets.Dataset, str]:
    """One split of images in CSV files, with images as paths.

    Args:
        files: of one data set. A file with a column `split` holds the splits that are named there, another the one
            that is called as the file: `train.csv`.
        split: name of a split, or names joined by "+".
        image_column: of paths, relative to the file or absolute; None to find it by its name.

    Returns:
        The table, every column but `split`: text, or int64 where all values are whole numbers, None where a value is
        empty; and the name of the column of images.

    Raises:
        ValueError: a file that is no table, no such split, no such column, an image that does not exist.
    """
    rows: dict[str, list[dict[str, str]]] = {}
    for file in files:
        for row in _read(file):
            rows.setdefault(row.pop(_SPLIT_NAME, None) or file.stem, []).append(row | {"": str(file.parent)})
    named = " and ".join(map(str, files))
    chosen = []
    for part in (part.strip() for part in split.split("+")):
        if part not in rows:
            raise ValueError(
                f"split {part!r} does not exist in {named}; it has: {', '.join(rows) or 'no rows'} (from the column"
                " 'split', or the names of the files)"
            )
        chosen += rows[part]
    columns = list(chosen[0])[:-1]
    image_column = _find_column(columns, image_column)
    paths = []
    for number, row in enumerate(chosen):
        path = os.path.join(row[""], os.path.expanduser(row.get(image_column) or ""))
        if not os.path.isfile(path):
            raise ValueError(
                f"image {row.get(image_column)!r} of row {number} of split {split!r} in {named} does not exist: paths"
                " are relative to the CSV file"
            )
        paths.append(path)
    table = {name: paths if name == image_column else _typed([row.get(name) for row in chosen]) for name in columns}
    return datasets.Dataset.from_dict(table), image_column


def _read(file: Path) -> list[dict[str, str]]:
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            found = []
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"line {reader.line_num} has another number of values than the first line")
                found.append(row)
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise ValueError(f"{str(file)!r} is no CSV table with a line of column names: {error}") from error
    if not found:
        raise ValueError(f"{str(file)!r} has no rows: expected a line of column names and a line for every image")
    return found


def _find_column(columns: list[str], image_column: str | None) -> str:
    if image_column is not None:
        if image_column not in columns:
            raise ValueError(f"image column {image_column!r} does not exist; columns: {', '.join(columns)}")
        return image_column
    found = [name for name in columns if name in _PATH_NAMES]
    if len(found) != 1:
        what = f"several columns of images ({', '.join(found)})" if found else "no column of images found"
        raise ValueError(f"{what}: name the one with paths by --image_column; columns: {', '.join(columns)}")
    return found[0]


def _typed(values: list[str]) -> list[str | int | None]:
    cells = [value.strip() or None for value in values]
    if all(cell is None or cell.removeprefix("-").isdecimal() for cell in cells):
        return [None if cell is None else int(cell) for cell in cells]
    return cells
