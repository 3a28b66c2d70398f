"""What is in a folder: every image at any depth, and for every other file the reason why it is not used.

Links to files and folders are followed; a folder is used once, however many links lead to it. Files are told apart
by their extension; files with an unknown one by their first bytes. No other file is opened, and none is asked for its
size or time, so that a million files take seconds. Names are bytes and are sorted as bytes: the same on every machine.
"""

import errno
import os
from bisect import bisect_left
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import attrgetter

from tqdm.auto import tqdm

from .account import Tally
from .file_kinds import (
    ARCHIVES,
    HIDDEN,
    IMAGES,
    METADATA_NAMES,
    PARQUET,
    TABLES,
    extension_of,
    first_bytes,
    has_image_magic,
    is_junk,
    is_worth_a_look,
    reason_of,
    special_reason,
)


# Folders that count as splits, by the name that `datasets` and this package use for each.
SPLIT_NAMES = {
    b"train": "train",
    b"training": "train",
    b"validation": "validation",
    b"valid": "validation",
    b"val": "validation",
    b"dev": "validation",
    b"test": "test",
    b"testing": "test",
    b"eval": "test",
    b"evaluation": "test",
}
# Segmentation masks are not images to learn from, where their name says so and the image is there.
MASK_FOLDERS = frozenset(
    b"mask masks segmentation segmentations segmentationclass segmentationobject annotations labels gt".split()
)
IMAGE_FOLDERS = frozenset(b"image images img imgs jpegimages photos rgb".split())
MASK_ENDINGS = (b"_mask", b"-mask", b".mask", b"_masks", b"_seg", b"_segmentation")

_THREADS = 16
_PROGRESS_AFTER = 2.0  # seconds


@dataclass
class Scan:
    """
    What is in a folder. Paths are bytes, relative to the root, sorted.

    Attributes:
        root: Absolute path.
        images: Image files.
        archives, parquet, tables: Tars and zips, parquet files, CSV and JSON Lines files.
        tally: Everything else, by reason.
        folders: Every folder that was read, the root as b"", with its device, inode and times: what a cached scan
            depends on.
    """

    root: bytes
    images: list[bytes] = field(default_factory=list)
    archives: list[bytes] = field(default_factory=list)
    parquet: list[bytes] = field(default_factory=list)
    tables: list[bytes] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    folders: dict[bytes, tuple[int, ...]] = field(default_factory=dict)

    def path(self, relative: bytes) -> bytes:
        return os.path.join(self.root, relative) if relative else self.root


def scan_folder(folder: str | os.PathLike, progress: bool = True) -> Scan:
    """
    Read a folder tree.

    Args:
        folder: Its path; "~" is the home folder.
        progress: Whether to show a progress bar where it takes longer than two seconds.

    Raises:
        OSError: The folder itself cannot be read.
    """
    root = os.path.abspath(os.path.expanduser(os.fsencode(folder)))
    with os.scandir(root):
        pass
    scan, unknown = Scan(root), []
    with tqdm(desc="scanning", unit=" files", delay=_PROGRESS_AFTER, leave=False, disable=not progress) as bar:
        _walk(scan, unknown, bar)
        _look_into(scan, unknown, bar)
    for listed in (scan.images, scan.archives, scan.parquet, scan.tables):
        listed.sort()
    _drop_masks(scan)
    return scan


def stamp_of(path: bytes) -> tuple[int, ...]:
    """Device, inode and times of a folder, which change when an entry is added, removed or renamed."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def split_of(relative: bytes) -> str | None:
    """The split that the first folder of a relative path names, None for another folder or a file."""
    top, separator, _ = relative.partition(b"/")
    return SPLIT_NAMES.get(top.lower()) if separator else None


def _walk(scan: Scan, unknown: list[bytes], bar: tqdm) -> None:
    folders, links, seen = [b""], [], set()
    while folders or links:
        if not folders:
            # Links come after all real folders: a folder is used under its own name where it has one.
            links.sort(reverse=True)
            folders.append(links.pop())
        relative = folders.pop()
        try:
            stamp = stamp_of(scan.path(relative))
            # A split may link to the folder of another split: then both use it.
            key = (split_of(relative + b"/"), *stamp[:2])
            if key in seen:
                scan.tally.add("link to a folder that is used already", relative)
                continue
            seen.add(key)
            with os.scandir(scan.path(relative)) as entries:
                found = sorted(
                    entries, key=attrgetter("name")
                )  # so that the examples in messages do not depend on the disk
        except OSError as error:
            scan.tally.add(f"folder cannot be read: {error.strerror}", relative)
            continue
        scan.folders[relative] = stamp
        _sort_entries(scan, relative + b"/" if relative else b"", found, folders, links, unknown)
        bar.update(len(found))


def _sort_entries(scan: Scan, prefix: bytes, entries: list, folders: list, links: list, unknown: list) -> None:
    images, tally = scan.images, scan.tally
    for entry in entries:
        name = entry.name
        # The common case first: a regular file, by the type that comes with its name.
        if entry.is_file(follow_symlinks=False):
            if name.rpartition(b".")[2].lower() in IMAGES and name[:1] not in b".~" and b"." in name:
                images.append(prefix + name)
            else:
                _sort_file(scan, prefix, name, unknown)
        elif is_junk(name):
            tally.add(HIDDEN, prefix + name)
        elif entry.is_dir(follow_symlinks=False):
            folders.append(prefix + name)
        elif entry.is_symlink():
            try:
                mode = entry.stat().st_mode
            except OSError as error:
                is_loop = error.errno == errno.ELOOP
                tally.add("link that leads to itself" if is_loop else "broken link", prefix + name)
                continue
            if entry.is_dir():
                links.append(prefix + name)
            elif entry.is_file():
                _sort_file(scan, prefix, name, unknown)
            else:
                tally.add(special_reason(mode), prefix + name)
        else:
            tally.add(special_reason(entry.stat(follow_symlinks=False).st_mode), prefix + name)


def _sort_file(scan: Scan, prefix: bytes, name: bytes, unknown: list[bytes]) -> None:
    extension = extension_of(name)
    if is_junk(name):
        scan.tally.add(HIDDEN, prefix + name)
    elif extension in IMAGES:
        scan.images.append(prefix + name)
    elif extension in TABLES or name in METADATA_NAMES:
        scan.tables.append(prefix + name)
    elif extension in ARCHIVES:
        scan.archives.append(prefix + name)
    elif extension in PARQUET:
        scan.parquet.append(prefix + name)
    elif is_worth_a_look(extension):
        unknown.append(prefix + name)
    else:
        scan.tally.add(reason_of(extension), prefix + name)


def _look_into(scan: Scan, unknown: list[bytes], bar: tqdm) -> None:
    """Sort files with an unknown extension by their first bytes, many at a time: latency dominates."""
    unknown.sort()
    with ThreadPoolExecutor(_THREADS) as pool:
        heads: Iterable[bytes] = pool.map(lambda name: first_bytes(scan.path(name)), unknown, chunksize=256)
        for name, head in zip(unknown, heads, strict=True):
            bar.update(0)
            if has_image_magic(head):
                scan.images.append(name)
            else:
                scan.tally.add(reason_of(extension_of(name.rpartition(b"/")[2])), name)


def _drop_masks(scan: Scan) -> None:
    """
    Take segmentation masks out of the images: `x_mask.png` beside an image `x`, and a file in a folder such as
    `masks/` if the folder beside it that is called `images` or similar has an image of the same name.
    """
    masks = _named_masks(scan.images)
    for folder in scan.folders:
        parent, _, name = folder.rpartition(b"/")
        if name.lower() in MASK_FOLDERS:
            inside = _below(scan.images, folder)
            prefix = parent + b"/" if parent else b""
            twins = [other for other in scan.folders if other.startswith(prefix) and b"/" not in other[len(prefix) :]]
            twins = [other for other in twins if other[len(prefix) :].lower() in IMAGE_FOLDERS]
            stems = {_stem(image) for other in twins for image in _below(scan.images, other)}
            masks.update(image for image in inside if _stem(image) in stems)
    if masks:
        scan.images = [image for image in scan.images if image not in masks]
        scan.tally.add("segmentation mask of an image", min(masks), len(masks))


def _named_masks(images: list[bytes]) -> set[bytes]:
    candidates = [
        (image, image.rpartition(b".")[0])
        for image in images
        if (b"mask" in image or b"seg" in image) and image.rpartition(b".")[0].lower().endswith(MASK_ENDINGS)
    ]
    if not candidates:
        return set()
    stems = {image.rpartition(b".")[0] for image in images}
    endings = [(image, stem, ending) for image, stem in candidates for ending in MASK_ENDINGS]
    return {
        image for image, stem, ending in endings if stem.lower().endswith(ending) and stem[: -len(ending)] in stems
    }


def _below(images: list[bytes], folder: bytes) -> list[bytes]:
    return images[bisect_left(images, folder + b"/") : bisect_left(images, folder + b"0")]  # "0" follows "/"


def _stem(path: bytes) -> bytes:
    return path.rpartition(b"/")[2].rpartition(b".")[0]
