"""
Files of `torch.save` read as data: no function is called, sizes, offsets and checksums are checked before memory is
taken, and tensors are mapped from the file.
"""

import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..reporting import warn
from ..storage import BLOCK
from .layouts import ConversionError, brief, enumerate_keys
from .pickled import Call, Persistent, Pickle, read_pickle


# The most that is read at once, other than tensors: a directory of 30,000 tensors in a zip archive has 3 MB.
MAX_READ = 4 * BLOCK
MAX_SIZE = 2**48  # of a dimension, a stride or an offset
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # of files from before torch 1.6
DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
UNUSUAL = {
    "_rebuild_sparse_tensor": "sparse: save it with .to_dense()",
    "_rebuild_qtensor": "quantized: convert the checkpoint from before quantization",
    "_rebuild_meta_tensor_no_storage": "on the meta device, without values: load the weights before saving",
    "_rebuild_nested_tensor": "nested, expected an ordinary tensor",
}


class DamagedError(ConversionError):
    """A file that is not what was written or published: a new download may be whole."""


class Extent(NamedTuple):
    """A part of a file, in bytes."""

    begin: int
    size: int


class BoundedReader(io.BufferedReader):
    """A file of which nothing large is read at once, whatever a length in it says."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            size = max(0, os.fstat(self.fileno()).st_size - self.tell())
        if size > MAX_READ:
            raise ValueError(f"it asks for {size:,} bytes at once")
        return super().read(size)

    def readline(self, size: int | None = -1) -> bytes:
        return super().readline(MAX_READ)


def read_zip(path: Path) -> "Payload":
    """A file of torch 1.6 or later: an uncompressed zip archive with a pickle, and a record for the numbers of each
    tensor."""
    with BoundedReader(io.FileIO(path)) as file:
        try:
            archive = zipfile.ZipFile(file)
        except zipfile.BadZipFile as error:
            raise DamagedError(
                f"{path} is truncated: its zip archive has no end ({path.stat().st_size:,} bytes); download it again"
            ) from error
        records = {record.filename: record for record in archive.infolist()}
        main = next((name for name in records if name.endswith("data.pkl") and name.count("/") < 2), None)
        prefix = (main or "").removesuffix("data.pkl")
        if f"{prefix}constants.pkl" in records:
            raise ConversionError(
                f"{path} is a TorchScript program: save torch.jit.load(file).state_dict() with torch.save and convert"
                " that file"
            )
        if any(name.endswith(("serialized_exported_program.json", "archive_format")) for name in records):
            raise ConversionError(f"{path} is a torch.export program: convert the checkpoint that it was made from")
        if main is None:
            raise ConversionError(
                f"{path} is a zip archive of other things ({enumerate_keys(list(records), 4)}), expected a file"
                " written by torch.save"
            )
        extents = dict(check_records(path, file, archive.infolist()))
        file.seek(extents[main].begin)
        pickle = read_pickle(io.BytesIO(file.read(extents[main].size)))
        order = f"{prefix}byteorder"
        if order in extents:
            file.seek(extents[order].begin)
            refuse_big_endian(path, file.read(extents[order].size) != b"little")
    storages = {
        name.removeprefix(f"{prefix}data/"): extent
        for name, extent in extents.items()
        if name.startswith(f"{prefix}data/")
    }
    return Payload(path, pickle, storages)


def check_records(path: Path, file: io.BufferedReader, records: list[zipfile.ZipInfo]) -> Iterator[tuple[str, Extent]]:
    """The place of every record of an archive whose numbers lie in the file as they are and match their checksums."""
    end, size = 0, path.stat().st_size
    # `torch.serialization.set_crc32_options(False)` writes zeros.
    has_checksums = any(record.CRC for record in records)
    if not has_checksums:
        warn(f"{path} has no checksums: a damaged tensor would not be noticed")
    if len({record.filename for record in records}) < len(records):
        raise ValueError("its zip archive has two records of one name")
    for record in sorted(records, key=lambda record: record.header_offset):
        is_stored = record.compress_type == zipfile.ZIP_STORED and record.file_size == record.compress_size
        if not is_stored or record.flag_bits & 1:
            raise ConversionError(
                f"{path} is compressed or encrypted, which torch.save never does: unpack the archive and pack it again"
                " without compression (zip -0 -r)"
            )
        if not end <= record.header_offset <= size - 30:
            raise ValueError(f"the record {brief(record.filename)} of its zip archive overlaps another")
        file.seek(record.header_offset)
        signature, *_, name_size, extra_size = struct.unpack("<4s22xHH", file.read(30))
        begin = record.header_offset + 30 + name_size + extra_size
        end = begin + record.file_size
        if signature != b"PK\x03\x04" or end > size:
            raise ValueError(f"the record {brief(record.filename)} of its zip archive is not where it should be")
        file.seek(begin)
        if has_checksums and checksum(file, record.file_size) != record.CRC:
            raise ValueError(f"the checksum of its record {brief(record.filename)} is wrong")
        yield record.filename, Extent(begin, record.file_size)


def checksum(file: io.BufferedReader, size: int) -> int:
    crc = 0
    while size > 0:
        block = file.read(min(size, BLOCK))
        if not block:
            raise ValueError("it ends too early")
        crc, size = zlib.crc32(block, crc), size - len(block)
    return crc


def read_legacy(path: Path) -> "Payload":
    """A file of torch before 1.6: five pickles, then the numbers of every tensor."""
    total = path.stat().st_size
    with BoundedReader(io.FileIO(path)) as file:
        magic = read_pickle(file)
        if magic.value != LEGACY_MAGIC:
            if magic.harmful:
                refuse_objects(path, magic.harmful)
            raise ConversionError(f"{path} is a pickle, but not of torch.save: save a state dict with torch.save")
        read_pickle(file)  # version of the protocol
        system = read_pickle(file).value
        refuse_big_endian(path, isinstance(system, dict) and system.get("little_endian") is False)
        pickle = read_pickle(file)
        dtypes = {key: dtype for key, dtype, _ in map(storage_of, pickle.references)}
        storages = {}
        for key in read_pickle(file).value:
            if dtypes.get(key) is None:
                raise ValueError(f"it holds the numbers of no tensor as {brief(str(key))}")
            size = int.from_bytes(file.read(8), "little") * dtypes[key].itemsize
            storages[key] = Extent(file.tell(), size)
            if file.tell() + size > total:
                raise ValueError(f"it has {total:,} bytes, too few for its tensors")
            file.seek(size, io.SEEK_CUR)
    return Payload(path, pickle, storages)


def refuse_big_endian(path: Path, is_big: bool) -> None:
    if is_big:
        raise ConversionError(f"{path} was written on a big-endian machine: save it again on a little-endian one")


def refuse_objects(path: Path, names: list[str]) -> None:
    raise ConversionError(
        f"{path} is refused: besides tensors it contains {enumerate_keys(names, 8)}, which loading would execute. If"
        " you trust its origin, save only its state dict with torch.save and convert that file"
    )


def storage_of(reference: Any) -> tuple[str, torch.dtype | None, int]:
    """Key, data type and number of elements of a storage; no data type for one that no tensor of a model has."""
    if not (isinstance(reference, tuple) and len(reference) >= 5 and isinstance(reference[2], str)):
        raise ValueError("its pickle refers to something that is not a storage")
    kind = getattr(reference[1], "name", "").rpartition(".")[2]
    return reference[2], DTYPES.get(kind), integers((reference[4],))[0]


def integers(values: Any) -> tuple[int, ...]:
    """
    Raises:
        ValueError: Not a short tuple of sizes.
    """
    if not isinstance(values, tuple | list) or len(values) > 8:
        raise ValueError("its pickle has a tensor without sizes")
    if not all(type(value) is int and 0 <= value < MAX_SIZE for value in values):
        raise ValueError("its pickle has a tensor with impossible sizes")
    return tuple(values)


class Payload:
    """
    The object in a file of torch.save: its pickle, and where in the file the numbers are.

    Args:
        path: The file.
        pickle: What was saved.
        storages: The place of the numbers, by storage key.

    Raises:
        ConversionError: Anything but tensors and plain containers.
    """

    def __init__(self, path: Path, pickle: Pickle, storages: dict[str, Extent]):
        if pickle.harmful:
            refuse_objects(path, pickle.harmful)
        self.path, self.value, self.storages = path, pickle.value, storages
        self.mapped: torch.UntypedStorage | None = None

    def copied(self, extent: Extent) -> torch.UntypedStorage:
        """Numbers that are not aligned in the file, read instead of mapped."""
        content = torch.empty(extent.size, dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(extent.begin)
            file.readinto(content.numpy())
        return content.untyped_storage()

    def tensor(self, name: str, value: Any) -> Any:
        """The tensor that a record describes, mapped from the file; any other value as it is."""
        if not isinstance(value, Call):
            return value
        function, arguments = value.function.rpartition(".")[2], value.arguments
        if function in ("_rebuild_parameter", "_rebuild_parameter_with_state", "Parameter") and arguments:
            return self.tensor(name, arguments[0])
        if function == "_rebuild_from_type_v2" and len(arguments) > 2:
            return self.tensor(name, Call(getattr(arguments[0], "name", ""), arguments[2]))
        if function not in ("_rebuild_tensor", "_rebuild_tensor_v2") or len(arguments) < 4:
            unusual = UNUSUAL.get(function, f"stored by {function}, expected an ordinary tensor")
            raise ConversionError(f"{self.path}: {brief(name)} is {unusual}")
        if not isinstance(arguments[0], Persistent):
            raise ValueError(f"{brief(name)} has no storage")
        key, dtype, length = storage_of(arguments[0].content)
        if dtype is None:
            raise ConversionError(f"{self.path}: {brief(name)} is complex, quantized or otherwise unusual")
        (offset,), shape, stride = integers(arguments[1:2]), integers(arguments[2]), integers(arguments[3])
        extent = self.storages.get(key)
        if extent is None or length * dtype.itemsize != extent.size or len(shape) != len(stride):
            raise ValueError(f"the numbers of {brief(name)} are missing")
        last = offset + sum((count - 1) * step for count, step in zip(shape, stride, strict=True))
        if math.prod(shape) and last >= length:
            raise ValueError(f"{brief(name)} is larger than its storage")
        if self.mapped is None:
            self.mapped = torch.UntypedStorage.from_file(str(self.path), False, self.path.stat().st_size)
        if extent.begin % dtype.itemsize:
            storage = self.copied(extent)
        else:
            storage = self.mapped[extent.begin : extent.begin + extent.size]
        return torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)
