"""What a file is, by its name and, for unknown names, by its first bytes."""

import os
import stat

from .decode import SUFFIXES


def _set(text: str) -> frozenset[bytes]:
    return frozenset(text.encode().split())


# Extensions, in lower case and without the dot. The first group is what `decode.py` reads, and arrays.
IMAGES = frozenset(suffix[1:].encode() for suffix in SUFFIXES) | _set("apng jif j2c jpc jpf jpx npy")
UNSUPPORTED_IMAGES = _set(
    "heic heif hif jxl svg svgz eps ps ai dng raw cr2 cr3 nef arw orf rw2 raf pef srw dcm dicom nii exr hdr fit fits"
    " wmf emf xcf tga psd pcx dcx dds sgi ras xbm xpm icns cur dib msp im"
)
TABLES, PARQUET = _set("csv tsv jsonl"), _set("parquet")
ARCHIVES = _set("tar zip")
COMPRESSED = _set("gz tgz bz2 tbz tbz2 xz txz zst 7z rar z lz4")
# Files that lie beside images: not worth a look into them.
SIDE_FILES = _set(
    "txt xml json ndjson yaml yml toml ini cfg log md rst html htm css js pdf doc docx xls xlsx ppt pptx tex bib "
    "py pyc ipynb m mat sh bat npz pkl pickle pth pt ckpt onnx safetensors h5 hdf5 hdf lmdb mdb db sqlite sqlite3 "
    "arrow feather avro tfrecord record idx lock md5 sha1 sha256 crc sum list names geojson shp shx dbf prj cpg "
    "sbn sbx qpj tfw jgw pgw wld ovr aux kml kmz gpx las laz ply obj stl mp4 m4v mov avi mkv webm mpg mpeg wmv "
    "mp3 wav flac ogg exe dll so url lnk part partial crdownload tmp temp swp cls"
)
METADATA_NAMES = (b"metadata.csv", b"metadata.jsonl", b"metadata.parquet")
JUNK_FILES = _set("thumbs.db ehthumbs.db desktop.ini") | {b"icon\r"}
JUNK_FOLDERS = _set("__macosx __pycache__ @eadir #recycle @recycle $recycle.bin lost+found")

HIDDEN, NO_EXTENSION = "hidden or system file", "no extension"
MAGIC_BYTES = 32


def is_junk(name: bytes) -> bool:
    """Whether an operating system or an editor has put a file or folder there: `.DS_Store`, `._x`, `x.jpg~`, ..."""
    if name[:1] == b"." or name[:2] == b"~$" or name[-1:] == b"~":
        return True
    return name.lower() in JUNK_FILES or name.lower() in JUNK_FOLDERS


def extension_of(name: bytes) -> bytes:
    """In lower case, without the dot; empty for a name without one."""
    stem, _, extension = name.rpartition(b".")
    return extension.lower() if stem else b""


def reason_of(extension: bytes) -> str:
    """Why a file with an extension that is not an image's is not used."""
    dotted = "." + extension.decode(errors="backslashreplace") if extension else NO_EXTENSION
    if extension in UNSUPPORTED_IMAGES:
        return f"format is not supported ({dotted})"
    if extension in COMPRESSED:
        return f"compressed file, unpack it to use it ({dotted})"
    if extension in SIDE_FILES or extension in TABLES:
        return f"side file ({dotted})"
    return f"not an image ({dotted})"


def is_worth_a_look(extension: bytes) -> bool:
    """Whether only the first bytes can say what a file is: its extension is missing or unknown."""
    known = extension in SIDE_FILES or extension in UNSUPPORTED_IMAGES or extension in COMPRESSED
    return not known and extension not in TABLES | PARQUET | ARCHIVES


def has_image_magic(head: bytes) -> bool:
    """Whether a file with these first `MAGIC_BYTES` is an image of a common format."""
    starts = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    starts += (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"\x93NUMPY")
    if head.startswith(starts):
        return True
    if head[:4] == b"RIFF":
        return head[8:12] == b"WEBP"
    if head[:2] == b"BM":  # two letters prove little: the size of the second header is one of a few
        return int.from_bytes(head[14:18], "little") in (12, 40, 52, 56, 64, 108, 124)
    if head[:1] == b"P":
        return head[1:2] in b"123456" and head[2:3] in b" \t\r\n" and len(head) > 2
    return head[4:12] in (b"ftypavif", b"ftypavis")


def first_bytes(path: bytes) -> bytes:
    """The first bytes of a regular file; none if it cannot be read. Never waits: a FIFO is not opened for reading."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            return os.read(descriptor, MAGIC_BYTES) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
        finally:
            os.close(descriptor)
    except OSError:
        return b""


def special_reason(mode: int) -> str:
    """Why a file that is neither regular nor a folder is never opened."""
    kinds = ((stat.S_ISFIFO, "FIFO"), (stat.S_ISSOCK, "socket"), (stat.S_ISCHR, "device"), (stat.S_ISBLK, "device"))
    return next((f"{kind}, never opened" for test, kind in kinds if test(mode)), "special file, never opened")
