"""Data sets on this machine: folders and single files of images, archives, parquet and tables of paths.

What a folder is, is decided by what it holds, in this order: a data set saved by `datasets`, CSV files that are named
after splits, parquet files with images, images and archives. Other formats are left to `datasets`.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..hints import describe_missing
from .account import Account, Tally
from .file_kinds import ARCHIVES, COMPRESSED, IMAGES, PARQUET, extension_of
from .image_files import (
    ImageFiles,
    account_of,
    class_name,
    dataset_of,
    files_of_archive,
    files_of_scan,
    image_column,
    split_in_name,
)
from .references import reference_of, shown
from .scan import SPLIT_NAMES, Scan, split_of
from .scan_index import memory_mapped, scan
from .splits import choose_rows, sliced, split_parts
from .tables import PATH_NAMES, find_csv_files, is_table, names_images, read_csv_splits


@dataclass(frozen=True)
class LocalTable:
    """
    One or several splits of a data set as a table of undecoded images.

    Attributes:
        dataset: With the columns of labels and metadata.
        image_column: Name of the column of images, None if it is found by its type.
        account: What was found.
        edges: Rows at which an archive begins or ends, for shards that do not cross them.
    """

    dataset: datasets.Dataset
    image_column: str | None
    account: Account
    edges: tuple[int, ...] = ()


@dataclass(frozen=True)
class LocalParquet:
    """Parquet files by split, to be opened by `datasets`, and the rest of the folder."""

    files: dict[str, list[str]]
    scan: Scan | None
    tally: Tally


def open_local(
    dataset_name: str, split: str, image_column: str | None = None, *, labeled: bool = False
) -> LocalTable | LocalParquet | None:
    """
    Open a folder or file of this machine.

    Args:
        dataset_name: Its path; "~" is the home folder.
        split: As in `open_dataset`.
        image_column: See `open_source`.
        labeled: Whether CSV files may be the data set although they do not name images: then the mistake is theirs.

    Returns:
        None for a format that is left to `datasets`.

    Raises:
        ValueError: It does not exist or holds no images; or the split does not exist.
    """
    path = Path(os.path.expanduser(dataset_name))
    if not path.exists():
        raise ValueError(describe_missing(dataset_name, fix="pass a folder that exists, or a Hub id"))
    if not path.is_dir() and not path.is_file():
        raise ValueError(f"{dataset_name!r} is a device, pipe or socket: pass the folder that holds the data")
    files = find_csv_files(str(path), split)
    if files and (path.is_file() or labeled or names_images(files, image_column)):
        return _open_csv(dataset_name, files, split, image_column)
    if path.is_file():
        return _open_file(dataset_name, path, split, image_column)
    try:
        found = scan(path)
    except OSError as error:
        raise ValueError(f"folder {dataset_name!r} cannot be read: {error.strerror or error}") from error
    if found.parquet:
        parquet = _parquet_of(dataset_name, found)
        if parquet is not None:
            return parquet
    if not found.images and not found.archives:
        if _may_be_of_datasets(found):
            return None
        raise ValueError(f"no images, parquet files or tars found in {dataset_name!r}{_reasons(found.tally)}")
    return _open_images(files_of_scan(dataset_name, found, image_column), split, labeled)


def _reasons(tally: Tally) -> str:
    if not tally.counts:
        return ": it is empty"
    listed = []
    for reason, number in sorted(tally.counts.items(), key=lambda item: -item[1])[:3]:
        example = tally.examples.get(reason)
        listed.append(f"{number:,} of the kind: {reason}{f', such as {example}' if example else ''}")
    return f", only {'; '.join(listed)}"


def _may_be_of_datasets(found: Scan) -> bool:
    return bool(found.tables) or any(reason.endswith((".arrow)", ".json)", ".h5)")) for reason in found.tally.counts)


def _open_file(dataset_name: str, path: Path, split: str, column: str | None) -> LocalTable | LocalParquet:
    if not path.is_file():
        raise ValueError(f"{dataset_name!r} is neither a file nor a folder: pass the folder that holds the data")
    extension = extension_of(os.path.basename(os.fsencode(path)))
    if extension in ARCHIVES:
        return _open_images(files_of_archive(dataset_name, str(path), column), split)
    if extension in PARQUET:
        name = split_in_name(os.fsencode(path.stem)) or "train"
        return LocalParquet({name: [os.path.abspath(path)]}, None, Tally())
    if is_table(path):
        raise ValueError(f"{dataset_name!r} is a table that is not supported on its own: pass a CSV file")
    if extension in IMAGES:
        raise ValueError(f"{dataset_name!r} is a single image: pass the folder that holds the images")
    if extension in COMPRESSED:
        raise ValueError(f"{dataset_name!r} is a compressed file: unpack it, and pass the folder or tar")
    raise ValueError(
        f"{dataset_name!r} is a file: pass the folder that holds the data, or a parquet, tar, zip or CSV file"
    )


# Image files and archives


def _open_images(files: ImageFiles, split: str, labeled: bool = False) -> LocalTable:
    if not files.places:
        raise ValueError(f"no images found in {files.name!r}{_reasons(files.tally)}")
    splits = files.splits()
    rows, part_names = choose_rows(splits, split, files.name, files.notes)
    tally = files.tally.copy()
    is_used = np.zeros(len(files.places), dtype=bool)
    is_used[rows] = True
    for name, others in splits.items():
        reason = "outside of the slice" if name in part_names else f"in split {name!r}"
        tally.add(reason, "", int((~is_used[others]).sum()))
    dataset = files.dataset(rows, tally)
    names = getattr(dataset.features.get("label"), "names", None)
    if names is not None and labeled:
        _note_empty_classes(files, part_names, set(names))
    edges: tuple[int, ...] = ()
    if files.archive_of is not None:
        edges = tuple((np.flatnonzero(np.diff(files.archive_of[rows])) + 1).tolist())
    sizes = {name: len(others) for name, others in splits.items()} if len(splits) > 1 else {}
    account = account_of(files, split, len(dataset), tally, sizes, None if names is None else len(names))
    return LocalTable(memory_mapped(dataset), None, account, edges)


def _note_empty_classes(files: ImageFiles, splits: list[str], names: set[str]) -> None:
    has_splits = all(split_of(place) for place in files.places[:1])
    for folder in sorted(files.folders):
        parts = folder.split(b"/")
        if len(parts) == 1 + has_splits and folder and (not has_splits or parts[0].decode() in splits):
            inside = any(other.startswith(folder + b"/") for other in files.folders)
            if class_name(parts[-1]) not in names and not inside:
                files.notes.append(f"the folder {shown(reference_of(folder))!r} holds no images: it is not a class")


# CSV files


def _open_csv(dataset_name: str, files: list[Path], split: str, column: str | None) -> LocalTable:
    tables = read_csv_splits(files, column)
    chosen, notes = [], []
    reason = "; a split is a value in the column 'split' or the name of a file"
    for matching, part in split_parts(split, tables, " and ".join(map(str, files)), reason):
        for table, file in (pair for name in matching for pair in tables[name]):
            chosen.append((table.select(sliced(np.arange(len(table)), part)) if part else table, file))
    column = column or _find_path_column(chosen[0][0].column_names)
    dataset = datasets.concatenate_datasets([_with_absolute_paths(table, column, file) for table, file in chosen])
    total = sum(len(table) for table, _ in {id(t): (t, f) for pairs in tables.values() for t, f in pairs}.values())
    tally = Tally()
    tally.add("row of another split", "", max(0, total - len(dataset)))
    sizes = {name: sum(len(table) for table, _ in pairs) for name, pairs in tables.items()}
    account = Account(
        dataset_name, split, "CSV files" if len(files) > 1 else "CSV file", len(dataset) + tally.total, len(dataset),
        tally.counts, tally.examples, sizes if len(sizes) > 1 and total > len(dataset) else {}, notes=notes,
    )  # fmt: skip
    return LocalTable(dataset, column, account)


def _find_path_column(columns: list[str]) -> str:
    found = [name for name in columns if name in PATH_NAMES]
    if len(found) != 1:
        reason = f"several image columns ({', '.join(found)})" if found else "no image column found"
        raise ValueError(f"{reason}: name the column of paths with --image_column; columns: {', '.join(columns)}")
    return found[0]


def _with_absolute_paths(table: datasets.Dataset, column: str, file: Path) -> datasets.Dataset:
    if column not in table.column_names:
        raise ValueError(f"image column {column!r} does not exist; columns: {', '.join(table.column_names)}")
    listed = table[column][:]
    paths = [os.path.join(os.path.abspath(file.parent), os.path.expanduser(path or "")) for path in listed]
    for name, path in zip(listed, paths, strict=True):
        if not name:
            raise ValueError(f"a row of {str(file)!r} has no path in column {column!r}: fill it in, or remove the row")
        if not os.path.isfile(path):
            reason = "paths must be absolute or relative to the CSV file"
            raise ValueError(f"image {name!r} in {str(file)!r} does not exist: {reason}")
    table = table.flatten_indices() if table._indices is not None else table
    columns = {name: table.data.column(name) for name in table.column_names}
    features = dict(table.features)
    columns[column] = image_column([reference_of(os.fsencode(path)) for path in paths])
    features[column] = datasets.Image(decode=False)
    return dataset_of(columns, features)


# Parquet files


def _parquet_of(dataset_name: str, found: Scan) -> LocalParquet | None:
    """The parquet files of a folder by split, None if they hold no images."""
    tally, beside = found.tally.copy(), len(found.images) + len(found.archives)
    if beside:
        paths = [os.fsdecode(found.path(file)) for file in found.parquet]
        try:
            holds_images = _holds_images(pq.read_schema(paths[0]))
            rows = sum(pq.read_metadata(path).num_rows for path in paths)
        except (OSError, pa.ArrowException):
            holds_images = False
        if not holds_images:
            found.tally.add("table without images (.parquet)", found.parquet[0], len(paths))
            return None
        if len(found.images) >= rows:
            raise ValueError(
                f"{dataset_name!r} holds {len(found.images):,} images and parquet files of {rows:,} rows: pass the"
                " folder of the one or of the other"
            )
    tally.add("image or archive beside parquet files", (found.images + found.archives or [b""])[0], beside)
    for file in found.tables:
        tally.add("side file", file)
    return LocalParquet(_parquet_splits(found), found, tally)


def _holds_images(schema: pa.Schema) -> bool:
    def is_image(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return any(kind.field(index).name == "bytes" for index in range(kind.num_fields))
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or isinstance(kind, pa.ExtensionType)

    return any(is_image(field.type) for field in schema)


def _parquet_splits(found: Scan) -> dict[str, list[str]]:
    """By top-level folders, else by a word in the name of every file, else one split."""
    names: list[str | None] = [
        file.partition(b"/")[0].decode(errors="replace") if split_of(file) else None for file in found.parquet
    ]
    if None in names:
        names = [split_in_name(file.rpartition(b"/")[2].rpartition(b".")[0]) for file in found.parquet]
    splits: dict[str, list[str]] = {}
    for file, name in zip(found.parquet, names, strict=True):
        key = "train" if None in names or name is None else name
        splits.setdefault(key, []).append(os.fsdecode(found.path(file)))
    order = ("train", "validation", "test")
    return dict(sorted(splits.items(), key=lambda item: order.index(SPLIT_NAMES[os.fsencode(item[0].lower())])))


def parquet_builder(local: LocalParquet) -> datasets.DatasetBuilder:
    """
    The builder of `datasets` for exactly these files: it looks for no others, and reads no pattern in their names.

    Raises:
        ValueError: A file is damaged.
    """
    for file in (file for files in local.files.values() for file in files):
        try:
            pq.read_metadata(file)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{file!r} cannot be read as a parquet file: {' '.join(str(error).split())}") from error
    stamps = {name: [(str(os.path.getmtime(file)),) for file in files] for name, files in local.files.items()}
    lists = {name: datasets.data_files.DataFilesList(files, stamps[name]) for name, files in local.files.items()}
    return datasets.load_dataset_builder("parquet", data_files=datasets.data_files.DataFilesDict(lists))
