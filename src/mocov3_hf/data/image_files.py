"""Image files in folders and archives as a `datasets.Dataset` of references and labels, split by split.

Splits are top-level folders named `train`, `val`, `test` or alike that together hold all images; otherwise such words
mean nothing. Archives may have them in their own names. Classes are folders.
"""

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from .account import Account, Tally
from .archives import indexed_members, without_wrapper
from .file_kinds import METADATA_NAMES, extension_of, reason_of
from .references import reference_of, shown
from .scan import SPLIT_NAMES, Scan, split_of
from .tables import file_name_columns, read_metadata


# Up to here every image file is asked for its size, so that empty files are known before they are read.
SIZES_UP_TO = 100_000
NOT_NAMED, NAMED_BUT_MISSING = "not named in metadata", "named in metadata, but does not exist"
NO_CLASS = "in no class folder"
_CHUNK = 1 << 18
_WORDS = re.compile(rb"(?:^|[-._ 0-9])(" + b"|".join(SPLIT_NAMES) + rb")(?=$|[-._ 0-9])", re.IGNORECASE)


@dataclass
class ImageFiles:
    """
    All images of a folder or an archive, with the files that are not used.

    Attributes:
        name: As the user gave it.
        root: Path of the folder, or of the archive.
        kind: For the account.
        places: Path of each image for its split and class, relative to the root or inside its archive.
        references: Of each image, see `references.py`; None where every image is the file `root/place`.
        archive_of: Index into `archives` for each image, -1 for files; None without archives.
        archives: Paths relative to the root.
        labels: Columns of labels from the files beside images in archives.
        metadata: Tables beside images, relative to the root.
        folders: Folders of the scan.
        tally: Files that are not used.
    """

    name: str
    root: bytes
    kind: str
    places: list[bytes] = field(default_factory=list)
    references: list[str] | None = None
    archive_of: np.ndarray | None = None
    archives: list[bytes] = field(default_factory=list)
    labels: dict[str, list[str | None]] = field(default_factory=dict)
    metadata: list[bytes] = field(default_factory=list)
    folders: Iterable[bytes] = ()
    tally: Tally = field(default_factory=Tally)
    notes: list[str] = field(default_factory=list)

    def splits(self) -> dict[str, np.ndarray]:
        """Name of each split to the rows of its images, int64. A data set without splits is the split `train`."""
        return _splits_of_archives(self) or _splits_of_folders(self)

    @cached_property
    def parents(self) -> list[bytes]:
        """Folder of each image."""
        return [place.rpartition(b"/")[0] for place in self.places]

    def references_of(self, rows: list[int]) -> list[str]:
        if self.references is not None:
            return [self.references[row] for row in rows]
        try:
            prefix = os.path.join(self.root, b"").decode()
            return [prefix + self.places[row].decode() for row in rows]
        except UnicodeDecodeError:
            return [reference_of(os.path.join(self.root, self.places[row])) for row in rows]

    def dataset(self, rows: np.ndarray, tally: Tally) -> datasets.Dataset:
        """
        The images of some rows, with the columns of their metadata or labels.

        Args:
            rows: int64 (n,).
            tally: Receives what metadata leaves out.
        """
        if self.metadata:
            tables = self._named_in_metadata(rows, tally)
            if tables:
                return datasets.concatenate_datasets(tables)
        columns: dict[str, pa.ChunkedArray] = {"image": image_column(self.references_of(rows.tolist()))}
        features: dict[str, object] = {"image": datasets.Image(decode=False)}
        for name, values in self.labels.items():
            chosen = [values[row] for row in rows.tolist()]
            if any(value is not None for value in chosen):
                columns[name], features[name] = _label_column(chosen)
        if len(columns) == 1:
            numbers, names = self._classes(rows)
            if names:
                columns["label"] = pa.chunked_array([pa.array(numbers, pa.int64(), mask=numbers < 0)])
                features["label"] = datasets.ClassLabel(names=names)
        return dataset_of(columns, features)

    def _classes(self, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Number of the class of each row, -1 without one, and the names of the classes, sorted."""
        whole = set(self.parents)
        has_splits = all(split_of(folder + b"/") for folder in whole)
        inner = {folder: folder.partition(b"/")[2] if has_splits else folder for folder in whole}
        distinct = set(inner.values())
        depths = {folder.count(b"/") for folder in distinct}
        leaves = {folder.rpartition(b"/")[2] for folder in distinct}
        # The folder of the image, where all are equally deep and no two of them have the same name; otherwise the
        # first folder, as in torchvision's ImageFolder.
        is_leaf = len(depths) == 1 and len(leaves) == len(distinct)
        named = {
            folder: class_name(below.rpartition(b"/")[2] if is_leaf else below.partition(b"/")[0])
            for folder, below in inner.items()
        }
        chosen = [self.parents[row] for row in rows.tolist()]
        names = sorted({named[folder] for folder in set(chosen)} - {""})
        numbers = {name: number for number, name in enumerate(names)} | {"": -1}
        of_folder = {folder: numbers.get(name, -1) for folder, name in named.items()}
        return np.array([of_folder[folder] for folder in chosen], dtype=np.int64), names

    def _named_in_metadata(self, rows: np.ndarray, tally: Tally) -> list[datasets.Dataset]:
        references = dict(
            zip((self.places[row] for row in rows.tolist()), self.references_of(rows.tolist()), strict=True)
        )
        waiting, tables, num_again = set(references), [], 0
        for file in self.metadata:
            table = read_metadata(Path(os.fsdecode(os.path.join(self.root, file))))
            listed = _resolved(table, file.rpartition(b"/")[0], self.root)
            main = next(iter(file_name_columns(table).values()))
            kept = []
            for index, place in enumerate(listed[main]):
                if place in references:
                    num_again += place not in waiting
                    waiting.discard(place)
                    kept.append(index)
                elif not os.path.isfile(os.path.join(self.root, place)):
                    tally.add(NAMED_BUT_MISSING, place)
                elif os.path.isabs(place) or place.startswith(b"../"):
                    kept.append(index)
            if kept:
                tables.append(_with_references(table.select(kept), listed, kept, self.root, references))
        if tables:
            tally.add(NOT_NAMED, min(waiting, default=b""), len(waiting))
        if num_again:
            self.notes.append(f"rows of metadata that name an image again, which is then used again: {num_again:,}")
        return tables


def class_name(folder: bytes) -> str:
    r"""Name of a class folder: one Unicode form on every system, bytes that are not UTF-8 as `\xff`."""
    return unicodedata.normalize("NFC", folder.decode(errors="backslashreplace"))


def image_column(references: Sequence[str]) -> pa.ChunkedArray:
    """References as undecoded images of `datasets`: structs of bytes (none) and path."""
    chunks = []
    for start in range(0, max(len(references), 1), _CHUNK):
        paths = pa.array(references[start : start + _CHUNK], pa.string())
        chunks.append(pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"]))
    return pa.chunked_array(chunks)


def dataset_of(columns: dict[str, pa.ChunkedArray], features: dict[str, object]) -> datasets.Dataset:
    """A `Dataset` in memory."""
    info = datasets.DatasetInfo(features=datasets.Features(features))
    table = pa.table(columns, schema=info.features.arrow_schema)
    return datasets.Dataset(datasets.table.InMemoryTable(table), info=info)


def _label_column(values: list[str | None]) -> tuple[pa.ChunkedArray, datasets.Value]:
    """Integers where all labels are, as webdataset's `.cls` files hold them; else text."""
    if all(value is None or re.fullmatch(r"[-+]?[0-9]{1,18}", value) for value in values):
        numbers = [None if value is None else int(value) for value in values]
        return pa.chunked_array([pa.array(numbers, pa.int64())]), datasets.Value("int64")
    return pa.chunked_array([pa.array(values, pa.string())]), datasets.Value("string")


def _resolved(table: datasets.Dataset, folder: bytes, root: bytes) -> dict[str, list[bytes]]:
    """The paths of a metadata table, relative to the root where they are in it."""
    listed = {}
    for column in file_name_columns(table).values():
        paths = [os.fsencode(os.path.expanduser(path or "")) for path in table[column][:]]
        joined = [os.path.normpath(os.path.join(folder, path)) for path in paths]
        listed[column] = [path.removeprefix(root + b"/") for path in joined]
    return listed


def _with_references(
    table: datasets.Dataset, listed: dict, rows: list[int], root: bytes, known: dict[bytes, str]
) -> datasets.Dataset:
    table = table.flatten_indices() if table._indices is not None else table
    columns, features = {}, {}
    images = file_name_columns(table)
    for image, column in images.items():
        places = [listed[column][row] for row in rows]
        paths = [known.get(place) or reference_of(os.path.join(root, place)) for place in places]
        columns[image], features[image] = image_column(paths), datasets.Image(decode=False)
    for name, feature in table.features.items():
        if name not in images.values() and name not in images:
            columns[name], features[name] = table.data.column(name), feature
    return dataset_of(columns, features)


# Splits


def _splits_of_folders(files: ImageFiles) -> dict[str, np.ndarray]:
    tops = {folder: folder.partition(b"/")[0] for folder in set(files.parents)}
    found = {top for folder, top in tops.items() if split_of(folder + b"/")}
    if not found or not found.issuperset(tops.values()):
        if found:
            outside = [
                place for place, folder in zip(files.places, files.parents, strict=True) if tops[folder] not in found
            ]
            names = " and ".join(sorted(repr(name.decode()) for name in found))
            files.notes.append(
                f"{names} {'is an ordinary folder' if len(found) == 1 else 'are ordinary folders'} here, not"
                f" {'a split' if len(found) == 1 else 'splits'}, because {len(outside):,} images are outside, such as"
                f" {shown(reference_of(min(outside)))}: all images are the split 'train'"
            )
        return {"train": np.arange(len(files.places), dtype=np.int64)}
    of_row = np.array([tops[folder] for folder in files.parents], dtype=object)
    return {name.decode(): np.flatnonzero(of_row == name) for name in sorted(found, key=_split_order)}


def _split_order(name: bytes) -> tuple[int, bytes]:
    return ("train", "validation", "test").index(SPLIT_NAMES[name.lower()]), name


def split_in_name(name: bytes) -> str | None:
    """The split that a word in the name of a parquet file or archive says, as `train-00000-of-00002`; else None."""
    found = {SPLIT_NAMES[match.group(1).lower()] for match in _WORDS.finditer(name)}
    return found.pop() if len(found) == 1 else None


def _splits_of_archives(files: ImageFiles) -> dict[str, np.ndarray] | None:
    if files.archive_of is None or (files.archive_of < 0).any():
        return None
    names = [split_in_name(path.rpartition(b"/")[2].rpartition(b".")[0]) for path in files.archives]
    if not names or None in names:
        return None
    splits = np.array(names, dtype=object)[files.archive_of]
    order = [name for name in ("train", "validation", "test") if name in names]
    return {name: np.flatnonzero(splits == name) for name in order}


# From a scan, and from a single archive


def files_of_scan(name: str, scan: Scan, image_column: str | None = None) -> ImageFiles:
    """The images of a folder, archives in it included."""
    tally = scan.tally.copy()
    images = _usable(scan, tally)
    metadata = [file for file in scan.tables if file.rpartition(b"/")[2] in METADATA_NAMES]
    for file in scan.tables:
        if file not in metadata:  # metadata is used
            tally.add(reason_of(extension_of(file.rpartition(b"/")[2])), file)
    kind = "image folder"
    if scan.archives and not images:
        kinds = {extension_of(path).decode() for path in scan.archives}
        kind = f"{' and '.join(sorted(kinds))} files"
    elif scan.archives:
        kind = "image folder and archives"
    files = ImageFiles(name, scan.root, kind, images, metadata=metadata, folders=scan.folders, tally=tally)
    return _with_archives(files, scan.archives, image_column) if scan.archives else files


def files_of_archive(name: str, path: str, image_column: str | None = None) -> ImageFiles:
    """The images of a single tar or zip."""
    raw = os.path.abspath(os.fsencode(path))
    kind = f"{extension_of(raw).decode()} file"
    return _with_archives(ImageFiles(name, os.path.dirname(raw), kind), [os.path.basename(raw)], image_column)


def _usable(scan: Scan, tally: Tally) -> list[bytes]:
    """The images without those that are empty or private to another user, where there are few enough to ask."""
    if len(scan.images) > SIZES_UP_TO:
        return scan.images
    kept = []
    for image in scan.images:
        path = scan.path(image)
        try:
            if os.stat(path).st_size == 0:
                tally.add("empty file", image)
            elif not os.access(path, os.R_OK):
                tally.add("file cannot be read: no permission", image)
            else:
                kept.append(image)
        except OSError as error:
            tally.add(f"file cannot be read: {error.strerror}", image)
    return kept


def _with_archives(files: ImageFiles, archives: list[bytes], image_column: str | None) -> ImageFiles:
    """The images of a folder with those of its archives in place, each archive sorted among the files by its path."""
    places, references, owners = [], [], []
    labels: dict[str, list[str | None]] = {}
    entries = sorted([(path, None) for path in files.places] + [(path, n) for n, path in enumerate(archives)])
    for path, number in tqdm(entries, desc="listing archives", delay=2.0, leave=False, disable=len(archives) < 2):
        if number is None:
            new, found = [path], [reference_of(os.path.join(files.root, path))]
            columns: dict[str, list[str | None]] = {}
        else:
            members = indexed_members(os.path.join(files.root, path), image_column)
            files.tally.merge(members.tally)
            folder = path.rpartition(b"/")[0]
            inside = without_wrapper(members.names, SPLIT_NAMES.keys())
            new = [folder + b"/" + name if folder else name for name in inside]
            found, columns = members.references, members.labels
        for name, values in columns.items():
            labels.setdefault(name, [None] * len(places)).extend(values)
        places += new
        references += found
        owners += [-1 if number is None else number] * len(new)
        for values in labels.values():
            values += [None] * (len(places) - len(values))
    files.places, files.references, files.labels = places, references, labels
    files.archives, files.archive_of = archives, np.array(owners, dtype=np.int64)
    return files


def account_of(
    files: ImageFiles, split: str, num_images: int, tally: Tally, splits: dict[str, int], classes
) -> Account:
    """The account of a split of image files: other splits are skipped files, too."""
    return Account(
        dataset_name=files.name,
        split=split,
        kind=files.kind,
        num_files=num_images + tally.total,
        num_images=num_images,
        skipped=dict(tally.counts),
        examples=dict(tally.examples),
        splits=splits,
        num_classes=classes,
        notes=list(files.notes),
    )
