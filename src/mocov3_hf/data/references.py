"""References to images: text that names a file, or a part of a tar or zip, and survives in an Arrow column.

A reference to a file is its path. Paths are bytes on Linux, while Arrow columns hold UTF-8: every byte that is not
valid UTF-8 is written as NUL and two hexadecimal digits, which no path can contain. A reference to a member of an
archive is the reference to the archive, NUL, and where the member is: `archive.tar NUL :t:OFFSET:SIZE:SIZE:NAME`.
"""

import os
import re
import zlib
from typing import Literal

from .decode import BadImageError


MAX_BYTES = 1 << 30  # of an encoded image in an archive
_MEMBER = "\0:"
_ESCAPED = re.compile(rb"\x00([0-9a-f]{2})")
_LOCAL_HEADER = 30  # bytes of a zip's local header before name and extra field

# Stored (in tars and zips) and deflated (in zips) members.
Method = Literal["t", "z", "d"]


def reference_of(path: bytes) -> str:
    """The reference to a file; for a path in valid UTF-8 the path itself."""
    try:
        return path.decode()
    except UnicodeDecodeError:
        text = path.decode(errors="surrogateescape")
        return re.sub("[\udc80-\udcff]", lambda match: f"\0{ord(match.group()) - 0xDC00:02x}", text)


def member_reference(archive: str, method: Method, offset: int, size: int, length: int, name: bytes) -> str:
    """
    The reference to a member of an archive.

    Args:
        archive: Reference to the archive.
        method: "t": `size` bytes at `offset`. "z" and "d": stored and deflated, `offset` is that of the local header.
        offset, size: In bytes; size is that in the archive.
        length: Size of the member in bytes.
        name: Of the member, for messages.
    """
    return f"{archive}{_MEMBER}{method}:{offset}:{size}:{length}:{reference_of(name)}"


def path_of(reference: str) -> str:
    """The path of a file, as `open` takes it; of a member, the path of its archive."""
    if "\0" not in reference:
        return reference
    raw = _ESCAPED.sub(lambda match: bytes([int(match.group(1), 16)]), reference.partition(_MEMBER)[0].encode())
    return os.fsdecode(raw)


def shown(reference: str) -> str:
    r"""A reference as messages show it: printable, a byte that is not UTF-8 as `\xff`, a member as `a.tar/name`."""
    path, _, member = reference.partition(_MEMBER)
    text = f"{path}/{member.split(':', 4)[4]}" if member else path
    text = re.sub("\0([0-9a-f]{2})", r"\\x\1", text)
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def read_reference(reference: str) -> str | bytes:
    """
    The path of a file, or the content of a member of an archive.

    Raises:
        BadImageError: The archive cannot be read, or has changed since it was listed.
    """
    if _MEMBER not in reference:
        return path_of(reference)
    method, offset, size, length, _ = reference.partition(_MEMBER)[2].split(":", 4)
    try:
        return _read_member(path_of(reference), method, int(offset), int(size), int(length))
    except BadImageError as error:
        raise BadImageError(error.reason, shown(reference)) from error
    except OSError as error:
        raise BadImageError(f"cannot be read: {error.strerror or error}", shown(reference)) from error
    except zlib.error as error:
        raise BadImageError(f"cannot be read: {error}", shown(reference)) from error


def _read_member(path: str, method: str, offset: int, size: int, length: int) -> bytes:
    if max(size, length) > MAX_BYTES:
        raise BadImageError(f"has {max(size, length):,} bytes, more than the allowed {MAX_BYTES:,}")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if method != "t":
            header = os.pread(descriptor, _LOCAL_HEADER, offset)
            if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
                raise BadImageError("is not where the zip file lists it: the file is damaged or has changed")
            offset += _LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        data = os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)
    if method == "d":
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, length + 1)
    if len(data) != length:
        raise BadImageError(f"has {len(data)} bytes instead of {length}: the archive is damaged or has changed")
    return data
