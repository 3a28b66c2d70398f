"""The images in tars and zips: listed from the headers, read in place, never unpacked."""

import contextlib
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ..storage import write_text
from .account import Tally
from .file_kinds import (
    ARCHIVES,
    HIDDEN,
    IMAGES,
    MAGIC_BYTES,
    extension_of,
    has_image_magic,
    is_junk,
    is_worth_a_look,
    reason_of,
)
from .references import member_reference, reference_of, shown
from .scan_index import index_path


# Members beside an image `x.jpg` that hold its label, `x.cls`, by webdataset's convention.
LABEL_EXTENSIONS = (b"cls", b"label", b"labels", b"class", b"target", b"txt", b"text")
_LABEL_BYTES = 1000
INDEX_FROM_BYTES = 16 << 20  # a smaller archive is listed in milliseconds
_DIRECTORY_FLAG, _ENCRYPTED = 0x10, 0x1


@dataclass
class Members:
    """
    The images of an archive, in its order.

    Attributes:
        names: Paths inside the archive.
        references: See `references.py`.
        labels: Extension of a label file to the label of each image, None where an image has none.
        tally: Members that are not used.
    """

    names: list[bytes] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    labels: dict[str, list[str | None]] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)


def indexed_members(path: bytes, image_column: str | None = None) -> Members:
    """`list_members`, of a large archive from an index in the cache if it has not changed since. Raises the same."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        if status.st_size >= INDEX_FROM_BYTES:
            return _indexed(path, status, image_column)
    return list_members(path, image_column)


def _indexed(path: bytes, status: os.stat_result, image_column: str | None) -> Members:
    stamp = [status.st_size, status.st_mtime_ns, status.st_ino, image_column]
    file = index_path(b"members " + path).with_suffix(".json")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["stamp"] == stamp:
            names = [name.encode("latin-1") for name in known["names"]]
            return Members(names, known["references"], known["labels"], Tally(known["counts"], known["examples"]))
    found = list_members(path, image_column)
    names = [name.decode("latin-1") for name in found.names]
    known = {"stamp": stamp, "names": names, "references": found.references, "labels": found.labels}
    known |= {"counts": found.tally.counts, "examples": found.tally.examples}
    with contextlib.suppress(OSError):  # a cache that cannot be written: the next run lists again
        write_text(file, json.dumps(known))
    return found


def list_members(path: bytes, image_column: str | None = None) -> Members:
    """
    The images in a tar or zip.

    Args:
        path: Of the archive; the extension tells tars and zips apart.
        image_column: Extension of the images, as webdataset names them (everything after the first dot); None for
            every image.

    Raises:
        ValueError: A sample of a tar, all members of one name up to the first dot, has several images.
    """
    archive, members = reference_of(path), Members()
    is_tar = extension_of(os.path.basename(path)) != b"zip"
    labels: dict[bytes, dict[bytes, str]] = {}
    try:
        listed = _tar_members(path, archive) if is_tar else _zip_members(path, archive, members)
        for name, reference, content in listed:
            _sort_member(members, labels, path, name, reference, content, image_column)
    except (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        if isinstance(error, _SeveralImagesError):
            raise
        members.tally.add("archive is damaged or cut short", f"{shown(archive)} ({error})")
    keys = [_key(name)[0] for name in members.names]
    for extension, by_key in labels.items():
        members.labels[extension.decode()] = [by_key.get(key) for key in keys]
    if is_tar:
        _check_single(keys, members.names, archive)
    return members


class _SeveralImagesError(ValueError):
    pass


def _check_single(keys: list[bytes], names: list[bytes], archive: str) -> None:
    """Every sample has the same two or more images: columns. `a.1.jpg` and `a.2.jpg` are images of their own."""
    columns: dict[bytes, set[bytes]] = {}
    for key, name in zip(keys, names, strict=True):
        columns.setdefault(key, set()).add(_key(name)[1])
    first = next(iter(columns.values()), set())
    is_numbered = any(extension.split(b".")[0].isdigit() for extension in first)
    if len(columns) > 1 and len(first) > 1 and not is_numbered and all(found == first for found in columns.values()):
        listed = ", ".join(sorted(extension.decode(errors="backslashreplace") for extension in first))
        raise _SeveralImagesError(
            f"several image columns ({listed}) in {shown(archive)}: choose one with --image_column"
        )


def _key(name: bytes) -> tuple[bytes, bytes]:
    """Name of a sample and of its member, by webdataset's convention: up to and after the first dot of the file."""
    folder, separator, base = name.rpartition(b"/")
    stem, _, extension = base.partition(b".")
    return folder + separator + stem, extension


def _sort_member(
    members: Members,
    labels: dict[bytes, dict[bytes, str]],
    path: bytes,
    name: bytes,
    reference: str | None,
    content: Callable[[int], bytes],
    image_column: str | None,
) -> None:
    """
    Args:
        reference: Of the member, None if it is not a regular file.
        content: Function of a number of bytes: the beginning of the member.
    """
    base, inside = name.rpartition(b"/")[2], path + b"/" + name
    extension = extension_of(base)
    if any(is_junk(part) for part in name.split(b"/") if part != b"."):
        members.tally.add(HIDDEN, inside)
        return
    if reference is None:
        members.tally.add("link or special file in an archive", inside)
        return
    is_image = extension in IMAGES or (is_worth_a_look(extension) and has_image_magic(content(MAGIC_BYTES)))
    if is_image and image_column not in (None, "image", _key(name)[1].decode(errors="replace")):
        members.tally.add(f"not in column {image_column!r}", inside)
    elif is_image:
        members.names.append(name)
        members.references.append(reference)
    elif extension in ARCHIVES:
        members.tally.add("archive inside an archive", inside)
    else:
        is_label = _key(name)[1].lower() in LABEL_EXTENSIONS
        known = is_label and extension not in (b"txt", b"text")  # which may be anything
        members.tally.add(f"label of an image (.{extension.decode()})" if known else reason_of(extension), inside)
        if is_label:
            text = content(_LABEL_BYTES).decode(errors="backslashreplace").strip()
            labels.setdefault(_key(name)[1].lower(), {})[_key(name)[0]] = text


def _tar_members(path: bytes, archive: str) -> Iterator[tuple]:
    with tarfile.open(os.fsdecode(path), "r:", errors="surrogateescape", encoding="utf-8") as file:
        size = os.path.getsize(path)
        for member in file:
            if member.isdir():
                continue
            name = member.name.encode(errors="surrogateescape")
            if member.size < 0 or member.offset_data + member.size > size:
                raise tarfile.ReadError(
                    f"{member.name!r} has {member.size} bytes, more than the file or less than none"
                )
            start, length = member.offset_data, member.size
            reference = member_reference(archive, "t", start, length, length, name) if member.isreg() else None
            if member.issparse():
                reference = None

            def content(number: int, start=start, length=length) -> bytes:
                return os.pread(file.fileobj.fileno(), min(number, length), start)

            yield name, reference, content
            file.members = []  # otherwise tarfile keeps every member in memory
        # tarfile takes a damaged header for the end. After the end there are only zeros.
        if any(os.pread(file.fileobj.fileno(), 512, file.offset)):
            raise tarfile.ReadError(f"no valid header at byte {file.offset:,}")


def _zip_members(path: bytes, archive: str, members: Members) -> Iterator[tuple]:
    with zipfile.ZipFile(os.fsdecode(path)) as file:
        for info in file.infolist():
            if info.is_dir():
                continue
            # zipfile decodes names without the UTF-8 flag as code page 437: back to the bytes.
            name = info.filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437", errors="surrogateescape")
            if info.create_system == 0 and b"/" not in name:  # written on Windows against the rules
                name = name.replace(b"\\", b"/")
            methods = {zipfile.ZIP_STORED: "z", zipfile.ZIP_DEFLATED: "d"}
            if info.flag_bits & _ENCRYPTED or info.compress_type not in methods:
                why = "encrypted" if info.flag_bits & _ENCRYPTED else "compressed by a method other than deflate"
                members.tally.add(f"{why}, in a zip file", path + b"/" + name)
                continue
            method = methods[info.compress_type]
            sizes = info.header_offset, info.compress_size, info.file_size
            reference = member_reference(archive, method, *sizes, name)

            def content(number: int, info=info) -> bytes:
                with contextlib.suppress(OSError, zipfile.BadZipFile, EOFError), file.open(info) as stream:
                    return stream.read(number)
                return b""

            yield name, reference, content


def without_wrapper(names: list[bytes], stop: frozenset[bytes] | set[bytes]) -> list[bytes]:
    """
    Paths without the folders that hold all of them, such as the one that most archives begin with. At least one folder
    is kept, and one whose name is in `stop`.
    """
    names = [name.removeprefix(b"./").lstrip(b"/") for name in names]
    folders = {name.rpartition(b"/")[0] for name in names}
    parts = [folder.split(b"/") if folder else [] for folder in folders]
    number, most = 0, min(map(len, parts), default=0) - 1
    while number < most and len({part[number] for part in parts}) == 1 and parts[0][number].lower() not in stop:
        number += 1
    return [name.split(b"/", number)[number] for name in names] if number > 0 else names
