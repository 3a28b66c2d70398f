"""Damaged and hostile data sets: one line that names the file, or images counted as bad, streamed and not."""

import json
import os
import re
import struct
import tarfile
import zipfile

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mocov3_hf.data.bad_images import TooManyBadImagesError
from mocov3_hf.data.classes import open_labeled_splits
from mocov3_hf.data.decode import BadImageError, decode_rgb
from mocov3_hf.data.labeled import open_labeled
from mocov3_hf.data.loader import TwoViewLoader
from mocov3_hf.data.shards import index_tar
from mocov3_hf.data.sources import open_source
from mocov3_hf.data.streams import DamagedShardError
from mocov3_hf.data.views import two_views
from mocov3_hf.reporting import RunError, one_line


BOTH = pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])


@pytest.fixture
def jpegs(make_jpeg):
    return [make_jpeg(seed, width=20, height=16) for seed in range(6)]


@pytest.fixture
def tar(tmp_path, jpegs):
    """A tar of six images; returns its path."""
    path = tmp_path / "data" / "x.tar"
    path.parent.mkdir()
    (tmp_path / "member.jpg").write_bytes(jpegs[0])
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for index, data in enumerate(jpegs):
            (tmp_path / "member.jpg").write_bytes(data)
            archive.add(tmp_path / "member.jpg", f"{index}.jpg")
    return path


def header_of(data: bytes, number: int) -> int:
    place = 0
    for _ in range(number):
        size = int(data[place + 124 : place + 135], 8)
        place += 512 + -(-size // 512) * 512
    return place


def with_header(path, number: int, start: int, value: bytes, checksum: bool = True) -> None:
    """Change a field of the header of a member."""
    data = bytearray(path.read_bytes())
    place = header_of(data, number)
    data[place + start : place + start + len(value)] = value
    if checksum:
        data[place + 148 : place + 156] = b" " * 8
        data[place + 148 : place + 156] = b"%06o\0 " % sum(data[place : place + 512])
    path.write_bytes(data)


def read_all(folder, streaming: bool) -> tuple[int, list[str], dict[str, int]]:
    """Number of images, the reasons of those that cannot be used, and what was skipped."""
    source = open_source(str(folder), streaming=streaming)
    if streaming:
        rows = [(shard.load(), row) for shard in source.shards for row in range(shard.num_rows)]
        reads = [lambda rows=rows, row=row: rows.read(row) for rows, row in rows]
    else:
        reads = [lambda row=row: source.read(row) for row in range(len(source))]
    bad = []
    for read in reads:
        try:
            decode_rgb(read())
        except BadImageError as error:
            bad.append(str(error))
    return len(reads), bad, source.account.skipped


DAMAGED = "archive is damaged or cut short"


@BOTH
@pytest.mark.parametrize(
    ("damage", "number"),
    {
        "cut in a member": (lambda path: path.write_bytes(path.read_bytes()[:3000]), 2),
        "cut in a header": (
            lambda path: path.write_bytes(path.read_bytes()[: header_of(path.read_bytes(), 3) + 9]),
            3,
        ),
        "a size beyond the file": (lambda path: with_header(path, 2, 124, b"77777777777\0"), 2),
        "a negative size": (lambda path: with_header(path, 2, 124, b"\xff" * 12), 2),
        "a size that is no number": (lambda path: with_header(path, 2, 124, b"zzzzzzzzzzz\0"), 2),
        "a wrong checksum": (lambda path: with_header(path, 2, 148, b"0000000\0", checksum=False), 2),
    }.values(),
    ids=["cut member", "cut header", "beyond", "negative", "text", "checksum"],
)
def test_a_damaged_tar_is_used_up_to_the_damage_and_named(tar, damage, number, streaming):
    damage(tar)
    read, bad, skipped = read_all(tar.parent, streaming)
    assert (read, bad, skipped) == (number, [], {DAMAGED: 1})
    account = open_source(str(tar.parent), streaming=streaming).account
    assert str(tar) in account.examples[DAMAGED]


@BOTH
@pytest.mark.parametrize(
    "content", [b"", b"hello" * 1000, b"\x1f\x8b\x08" + b"x" * 3000], ids=["empty", "text", "gzip"]
)
def test_a_tar_that_is_none_is_refused_by_name(tar, content, streaming):
    tar.write_bytes(content)
    with pytest.raises(ValueError, match=r"no images found in .*damaged or cut short, such as .*x\.tar \(") as caught:
        open_source(str(tar.parent), streaming=streaming)
    assert "\n" not in str(caught.value)


@BOTH
def test_links_sparse_files_and_odd_names_of_a_tar(tar, tmp_path, streaming):
    with tarfile.open(tar, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"link{kind.decode()}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        archive.add(tar.parent.parent / "member.jpg", "inner.tar")
    with_header(tar, 2, 156, b"S")
    read, bad, skipped = read_all(tar.parent, streaming)
    assert (read, bad) == (5, [])
    assert skipped == {"link or special file in an archive": 5, "archive inside an archive": 1}


def zip_file(path, jpegs, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for index, data in enumerate(jpegs):
            archive.writestr(f"{index}.jpg", data)
    return bytearray(path.read_bytes())


@BOTH
def test_zips(tmp_path, jpegs, streaming):
    path = tmp_path / "data" / "x.zip"
    path.parent.mkdir()
    whole = zip_file(path, jpegs, compression=zipfile.ZIP_DEFLATED)
    entry = whole.index(b"PK\1\2")
    for place, value, reason in (
        (entry + 24, 2**31, r"^has 2,147,483,648 bytes, more than .* \(.*x\.zip/0\.jpg\)$"),
        (entry + 42, 10**6, r"^is not where the zip file lists it: .* \(.*x\.zip/0\.jpg\)$"),
    ):
        data = whole.copy()
        struct.pack_into("<I", data, place, value)
        path.write_bytes(data)
        read, (bad,), _ = read_all(path.parent, streaming)
        assert read == 6
        assert re.match(reason, bad)
    bomb = [*jpegs, b"\xff\xd8\xff" + bytes(80_000_000)]
    data = zip_file(path, bomb, compression=zipfile.ZIP_DEFLATED)
    place = data.rindex(b"PK\1\2")
    struct.pack_into("<I", data, place + 24, 1000)  # declares 1000 bytes
    path.write_bytes(data)
    read, (bad,), _ = read_all(path.parent, streaming)
    assert "has 1001 bytes instead of 1000" in bad
    path.write_bytes(whole[:2000])
    with pytest.raises(ValueError, match=r"damaged or cut short, such as .*x\.zip"):
        open_source(str(path.parent), streaming=streaming)


@pytest.fixture
def parquet(tmp_path, jpegs):
    """Writes a parquet file of images and returns its path."""

    def write(name="train.parquet", cells=None, **options):
        (tmp_path / "data").mkdir(exist_ok=True)
        cells = [{"bytes": data, "path": None} for data in jpegs] if cells is None else cells
        pq.write_table(pa.table({"image": pa.array(cells)}), tmp_path / "data" / name, **options)
        return tmp_path / "data" / name

    return write


@BOTH
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-100],
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"PAR1" * 30,
        lambda data: data[:-8] + struct.pack("<I", 2**31 - 1) + data[-4:],
        lambda data: data[:-60] + bytes(52) + data[-8:],
    ],
    ids=["tail", "half", "empty", "text", "length", "footer"],
)
def test_a_damaged_parquet_file_is_named(parquet, damage, streaming):
    parquet("train-00000-of-00002.parquet")
    path = parquet("train-00001-of-00002.parquet")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"train-00001-of-00002\.parquet' cannot be read") as caught:
        open_source(str(path.parent), streaming=streaming)
    assert "\n" not in str(caught.value)


def test_a_damaged_page_is_named(parquet):
    path = parquet(compression="snappy")
    data = bytearray(path.read_bytes())
    for place in range(30, 200):
        data[place] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"train\.parquet' cannot be read: "):
        open_source(str(path.parent))
    source = open_source(str(path.parent), streaming=True)
    for workers in (0, 1):
        loader = TwoViewLoader(source, two_views(image_size=16), global_batch_size=2, num_workers=workers)
        with pytest.raises(DamagedShardError) as caught:
            next(loader.epoch(0))
        assert isinstance(caught.value, RunError)
        assert re.match(r"shard 0 of the stream, .*train\.parquet.* could not be loaded", one_line(caught.value))


@BOTH
def test_columns_that_differ_and_tables_without_rows(parquet, tmp_path, streaming):
    parquet("train-0.parquet")
    pq.write_table(pa.table({"other": [1]}), tmp_path / "data" / "train-1.parquet")
    with pytest.raises(ValueError, match=r"train-1\.parquet' .*other"):
        open_source(str(tmp_path / "data"), streaming=streaming)
    (tmp_path / "data" / "train-1.parquet").unlink()
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])
    pq.write_table(schema.empty_table(), tmp_path / "data" / "train-0.parquet")
    with pytest.raises(ValueError, match="empty"):
        open_source(str(tmp_path / "data"), streaming=streaming)


@pytest.mark.slow
@BOTH
def test_paths_to_devices_and_elsewhere_are_bad_images(parquet, tmp_path, jpegs, streaming):
    os.mkfifo(tmp_path / "pipe")
    paths = ["/dev/zero", "/dev/stdin", str(tmp_path / "pipe"), "/etc/passwd", "/gone.jpg", "http://127.0.0.1:9/x.jpg"]
    path = parquet(cells=[*({"bytes": None, "path": path} for path in paths), {"bytes": jpegs[0], "path": None}, None])
    read, bad, _ = read_all(path.parent, streaming)
    assert (read, len(bad)) == (8, 7)
    assert [f"({path})" in reason for path, reason in zip(paths, bad[:6], strict=True)] == [True] * 6
    assert sum("it is a device, pipe or socket" in reason for reason in bad) == 3


@BOTH
def test_a_bad_image_is_listed_with_its_place(parquet, tar, jpegs, tmp_path, streaming):
    """Images that are not files have a place, too."""
    data = bytearray(tar.read_bytes())
    data[header_of(data, 3) + 512 : header_of(data, 3) + 520] = b"no image"
    tar.write_bytes(data)
    cells = [{"bytes": data if row != 2 else b"no image", "path": f"{row}.jpg"} for row, data in enumerate(jpegs)]
    (tmp_path / "parquet").mkdir()
    table = parquet(cells=cells).rename(tmp_path / "parquet" / "train.parquet")
    places = {tar: f"{tar}/3.jpg", table: f"{table}, row 2 of row group 0" if streaming else "2.jpg"}
    for number, (path, place) in enumerate(places.items()):
        source, file = open_source(str(path.parent), streaming=streaming), tmp_path / f"{number}.jsonl"
        loader = TwoViewLoader(
            source, two_views(image_size=16), global_batch_size=2, max_bad_fraction=1, bad_images_file=file
        )
        list(loader.epoch(0))
        (line,) = map(json.loads, file.read_text().splitlines())
        assert line["path"] == place
        assert line["reason"].startswith("cannot be decoded: it is not JPEG")
        with pytest.raises(TooManyBadImagesError, match=f"image {line['id']} cannot be decoded"):
            list(TwoViewLoader(source, two_views(image_size=16), global_batch_size=2, on_bad_image="error").epoch(0))


@pytest.fixture
def saved(tmp_path, jpegs):
    folder = tmp_path / "saved"
    features = datasets.Features({"image": datasets.Image()})
    data = datasets.Dataset.from_dict({"image": [{"bytes": data, "path": None} for data in jpegs]}, features=features)
    data.save_to_disk(str(folder))
    return folder


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data-00000-of-00001.arrow", lambda data: data[:1000]),
        ("data-00000-of-00001.arrow", lambda data: b""),
        ("data-00000-of-00001.arrow", lambda data: data[:200] + bytes(200) + data[400:]),
        ("data-00000-of-00001.arrow", None),
        ("state.json", lambda data: b"[]"),
        ("state.json", lambda data: data[:40]),
        ("state.json", lambda data: json.dumps({"_data_files": [{"filename": "/dev/zero"}]}).encode()),
        ("state.json", lambda data: json.dumps({"_data_files": [{"filename": "../x.arrow"}]}).encode()),
        ("state.json", lambda data: json.dumps({"_data_files": [5]}).encode()),
        ("dataset_info.json", lambda data: b"null"),
        ("dataset_info.json", lambda data: b"[" * 100_000),
        ("dataset_info.json", None),
    ],
)
def test_a_damaged_part_of_a_saved_data_set_is_named(saved, name, content, streaming):
    if content is None:
        (saved / name).unlink()
    else:
        (saved / name).write_bytes(content((saved / name).read_bytes()))
    with pytest.raises(
        ValueError, match=rf"{name}' of a data set that was saved by datasets cannot be read: "
    ) as caught:
        open_source(str(saved), streaming=streaming)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    {
        "path,label\n0.jpg,18446744073709551615\n1.jpg,1\n": "label 18446744073709551615 in row 0 of column 'label'",
        "path,label\n0.jpg,0\n1.j\0pg,1\n": r"image '1\.j(\\x00pg)?' in .*train\.csv' does not exist",
        "path,label\n0.jpg,0,5,6\n1.jpg\n": r"train\.csv' is not a CSV table .* rows are longer",
        "path,label\n": r"train\.csv' is not a CSV table .* no rows",
        "": r"train\.csv' is not a CSV table",
        'path,label\n"0.jpg,0\n1.jpg,1\n': r"train\.csv' is not a CSV table .*EOF inside string",
        "path,label\n/dev/zero,0\n0.jpg,1\n": "image '/dev/zero' in .* does not exist",
        b"path,label\n0.jpg,caf\xe9\n1.jpg,b\n": r"train\.csv' is not a CSV table .*can't decode byte 0xe9",
        "path,label\n0.jpg,0\n".encode("utf-16"): r"train\.csv' is not a CSV table",
    }.items(),
)
def test_damaged_csv_files(tmp_path, jpegs, text, reason):
    for index in range(2):
        (tmp_path / f"{index}.jpg").write_bytes(jpegs[index])
    (tmp_path / "train.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=reason) as caught:
        open_labeled(str(tmp_path), split="train")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("label", [10**23, -(2**63) - 1])
def test_a_number_beyond_64_bits_in_a_csv_file(tmp_path, jpegs, label):
    (tmp_path / "0.jpg").write_bytes(jpegs[0])
    (tmp_path / "train.csv").write_text(f"path,label\n0.jpg,{label}\n")
    if int(pd.__version__.split(".")[0]) < 3:  # they are text, which names classes
        assert open_labeled(str(tmp_path), split="train").class_names == [str(label)]
    else:
        with pytest.raises(ValueError, match="a number does not fit into 64 bits"):
            open_labeled(str(tmp_path), split="train")


def test_large_labels_take_no_memory(tmp_path, jpegs):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        rows = [
            {"image": {"bytes": data, "path": None}, "label": 9_000_000_000_000 * (row % 2)}
            for row, data in enumerate(jpegs)
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / split / f"{split}.parquet")
    train, test = open_labeled_splits(str(tmp_path))
    assert train.class_names == test.class_names == ["0", "9000000000000"]
    assert np.array_equal(test.labels, [0, 1] * 3)


def test_a_remote_tar_that_lies_is_not_indexed(tar):
    """`RemoteTarShard` copies a tar and indexes the copy."""
    for value in (b"77777777777\0", b"\xff" * 12):
        with_header(tar, 2, 124, value)
        with pytest.raises(tarfile.ReadError, match="more than the file or less than none"):
            index_tar(str(tar), "jpg")
