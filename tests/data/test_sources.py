"""Every kind of source returns the same undecoded images, map-style and streamed. Errors are one line."""

import io
import pickle
import tarfile

import datasets
import pytest
import torch

from mocov3_hf.data.decode import decode_rgb
from mocov3_hf.data.loader import TwoViewLoader
from mocov3_hf.data.shards import encoded_image
from mocov3_hf.data.sources import MapSource, StreamSource, find_image_column, open_dataset, open_source
from mocov3_hf.data.views import two_views


NUMBER = 12


@pytest.fixture
def rows(make_jpeg):
    return [{"bytes": make_jpeg(index), "path": None} for index in range(NUMBER)]


@pytest.fixture
def table(rows) -> datasets.Dataset:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"]), "id": datasets.Value("int64")}
    )
    columns = {"image": rows, "label": [index % 2 for index in range(NUMBER)], "id": list(range(NUMBER))}
    return datasets.Dataset.from_dict(columns, features=features, split="train")


def write_tars(folder, rows, shards, extension="jpg"):
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"train-{shard:03d}.tar", "w") as archive:
            for index in range(shard * len(rows) // shards, (shard + 1) * len(rows) // shards):
                for name, data in ((f"{index:05d}.{extension}", rows[index]["bytes"]), (f"{index:05d}.cls", b"1")):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return folder


@pytest.fixture
def folders(tmp_path, table, rows, jpeg_folder):
    """kind -> folder with the same NUMBER images."""
    parquet = tmp_path / "parquet" / "data"
    parquet.mkdir(parents=True)
    for shard, (start, stop) in enumerate([(0, 5), (5, 6), (6, 12)]):
        part = table.select(range(start, stop))
        part.to_parquet(parquet / f"train-{shard:05d}-of-00003.parquet", batch_size=4)
    table.save_to_disk(tmp_path / "arrow")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "arrow_dict")
    deep = tmp_path / "deep"
    for index, row in enumerate(rows):
        path = deep / f"{index // 6}" / f"{index // 3}" / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["bytes"])
    return {
        "class folders": jpeg_folder(NUMBER, "classes"),
        "flat folder": jpeg_folder(NUMBER, "flat", classes=0),
        "deep folder": deep,
        "parquet": parquet.parent,
        "arrow": tmp_path / "arrow",
        "arrow dict": tmp_path / "arrow_dict",
        "webdataset": write_tars(tmp_path / "tars", rows, 3),
    }


KINDS = ["class folders", "flat folder", "deep folder", "parquet", "arrow", "arrow dict", "webdataset"]


def content(data) -> bytes:
    data = encoded_image(data)
    if isinstance(data, str):
        with open(data, "rb") as file:
            return file.read()
    return data


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same_images(folders, rows, kind):
    expected = [row["bytes"] for row in rows]
    source = open_source(str(folders[kind]))
    assert isinstance(source, MapSource)
    assert len(source) == NUMBER
    assert [content(source.read(index)) for index in range(NUMBER)] == expected

    stream = open_source(str(folders[kind]), streaming=True)
    assert isinstance(stream, StreamSource)
    assert stream.num_samples == NUMBER
    streamed = [content(shard.load().read(row)) for shard in stream.shards for row in range(shard.num_rows)]
    assert streamed == expected

    dataset = open_dataset(str(folders[kind]))
    column = find_image_column(dataset)
    assert not dataset.features[column].decode
    lazily = open_dataset(str(folders[kind]), streaming=True)
    assert isinstance(lazily, datasets.IterableDataset)
    first = next(iter(lazily))[column]
    assert content(first) == expected[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_sources_travel_to_workers(folders, kind):
    for streaming in (False, True):
        source = open_source(str(folders[kind]), streaming=streaming)
        loader = [
            TwoViewLoader(source, two_views(image_size=16), global_batch_size=4, num_workers=workers, lanes=2)
            for workers in (0, 2)
        ]
        for one, other in zip(loader[0].epoch(1), loader[1].epoch(1), strict=True):
            assert torch.equal(one["pixels"], other["pixels"])
        again = pickle.loads(pickle.dumps(source))
        if not streaming:
            assert content(again.read(3)) == content(source.read(3))


def test_parquet_shards_are_row_groups_and_only_the_images_are_read(folders):
    stream = open_source(str(folders["parquet"]), streaming=True)
    assert [shard.num_rows for shard in stream.shards] == [4, 1, 1, 4, 2]
    assert stream.shards[0].load()._column.type.num_fields == 2


def test_split_folders(jpeg_folder, tmp_path):
    jpeg_folder(6, "data/train")
    jpeg_folder(3, "data/test")
    name = str(tmp_path / "data")
    assert len(open_source(name)) == 6
    assert len(open_source(name, split="test")) == 3
    assert len(open_source(name, split="train+test")) == 9
    assert open_source(name, split="train+test", streaming=True).num_samples == 9
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"split 'validation' does not exist in .*; it has: train, test") as error:
            open_source(name, split="train+validation", streaming=streaming)
        assert "\n" not in str(error.value)


def test_splits_of_saved_data(folders, rows):
    name = str(folders["arrow dict"])
    assert len(open_source(name, split="test")) == 1
    assert len(open_source(name, split="train+test")) == NUMBER + 1
    with pytest.raises(ValueError, match=r"split 'dev' does not exist in .*; it has: train, test"):
        open_source(name, split="dev")
    with pytest.raises(ValueError, match=r"split 'test' does not exist in .*; it has: train"):
        open_source(str(folders["arrow"]), split="test")


def test_several_parquet_splits(tmp_path, table):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "validation"):
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    assert len(open_source(str(folder), split="train+validation")) == 2 * NUMBER
    assert len(open_source(str(folder), split="train[:5]+validation")) == NUMBER + 5
    assert open_source(str(folder), split="train+validation", streaming=True).num_samples == 2 * NUMBER
    with pytest.raises(ValueError, match=r"slice \'train\[:5\]\' of a split cannot be streamed"):
        open_source(str(folder), split="train[:5]", streaming=True)


def test_rows_that_were_selected_keep_their_order(table, rows):
    source = MapSource(table.select([7, 2, 11]))
    assert [source.read(index) for index in range(3)] == [rows[index]["bytes"] for index in (7, 2, 11)]


def test_image_columns(table):
    assert find_image_column(table) == "image"
    assert find_image_column(table, "image") == "image"
    with pytest.raises(ValueError, match="image column 'img' does not exist; columns: image, label, id"):
        find_image_column(table, "img")
    with pytest.raises(ValueError, match=r"column 'label' must hold images.*got ClassLabel"):
        find_image_column(table, "label")
    with pytest.raises(ValueError, match="no image column found: name it with --image_column; columns: label, id"):
        find_image_column(table.remove_columns("image"))
    raw = table.cast_column("image", datasets.Image(decode=False))
    both = raw.add_column("second", raw[:]["image"], feature=datasets.Image())
    with pytest.raises(ValueError, match=r"several image columns \(image, second\): choose one with --image_column"):
        find_image_column(both)


def test_image_column_of_a_saved_data_set(table, rows, tmp_path):
    raw = table.cast_column("image", datasets.Image(decode=False))
    raw.add_column("mask", raw[:]["image"][::-1], feature=datasets.Image()).save_to_disk(str(tmp_path))
    for name, expected in (("image", rows), ("mask", rows[::-1])):
        source = open_source(str(tmp_path), image_column=name)
        assert [source.read(index) for index in range(3)] == [row["bytes"] for row in expected[:3]]


def test_columns_without_the_metadata_of_datasets(rows, tmp_path, make_jpeg):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "plain").mkdir()
    raw = [row["bytes"] for row in rows]
    pq.write_table(pa.table({"jpg": raw, "n": list(range(NUMBER))}), tmp_path / "plain" / "train.parquet")
    source = open_source(str(tmp_path / "plain"))
    assert source.image_column == "jpg"
    assert source.read(3) == raw[3]
    stream = open_source(str(tmp_path / "plain"), streaming=True)
    assert stream.shards[0].load().read(3) == raw[3]
    paths = []
    for index, data in enumerate(raw):
        (tmp_path / f"{index}.jpg").write_bytes(data)
        paths.append(str(tmp_path / f"{index}.jpg"))
    by_path = MapSource(datasets.Dataset.from_dict({"file": paths}), "file")
    assert torch.equal(decode_rgb(by_path.read(2)), decode_rgb(raw[2]))


def test_other_formats_are_streamed_without_metadata(tmp_path, make_jpeg, rows):
    import json

    files = []
    for index, row in enumerate(rows):
        (tmp_path / f"{index}.jpg").write_bytes(row["bytes"])
    for shard in range(2):
        file = tmp_path / f"part{shard}.jsonl"
        lines = [json.dumps({"file": str(tmp_path / f"{index}.jpg")}) for index in range(shard, NUMBER, 2)]
        file.write_text("\n".join(lines))
        files.append(str(file))
    source = open_source("json", data_files=files, streaming=True, image_column="file")
    assert source.num_samples is None
    loader = TwoViewLoader(source, two_views(image_size=16), global_batch_size=4, steps_per_epoch=3, num_workers=2)
    ids = torch.cat([batch["sample_ids"] for batch in loader.epoch(0)])
    assert len(ids.unique()) == NUMBER
    assert {int(number) >> 32 for number in ids} == {0, 1}


def test_missing_and_empty_folders(tmp_path, jpeg_folder):
    for streaming in (False, True):
        with pytest.raises(ValueError, match="folder '/no/such/folder' does not exist"):
            open_source("/no/such/folder", streaming=streaming)
        with pytest.raises(ValueError, match=r"folder '\./nothing' does not exist"):
            open_source("./nothing", streaming=streaming)
        empty = tmp_path / f"empty{streaming}"
        empty.mkdir()
        with pytest.raises(ValueError, match="no images, parquet files or tars found in"):
            open_source(str(empty), streaming=streaming)
    mixed = jpeg_folder(2, "mixed/train").parent
    (mixed / "test").mkdir()
    (mixed / "test" / "numbers.csv").write_text("a,b\n1,2\n")
    assert len(open_source(str(mixed))) == 2
    with pytest.raises(ValueError, match=r"split 'test' does not exist in .*mixed'; it has: train"):
        open_source(str(mixed), split="test")
    file = tmp_path / "file.txt"
    file.write_text("x")
    with pytest.raises(ValueError, match="is a file: pass the folder that holds the data"):
        open_source(str(file))


def test_empty_data_sets(tmp_path, table):
    (tmp_path / "data").mkdir()
    table.select([]).to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(ValueError, match=r"split 'train' of .* is empty"):
        open_source(str(tmp_path / "data"))
    with pytest.raises(ValueError, match="the streamed split is empty"):
        open_source(str(tmp_path / "data"), streaming=True)
    # datasets 4.0 divides by the number of rows unless it is told the number of shards.
    table.select([]).save_to_disk(tmp_path / "saved", num_shards=1)
    with pytest.raises(ValueError, match=r"split 'train' of .* is empty"):
        open_source(str(tmp_path / "saved"))


def test_a_hub_name_that_cannot_be_reached(monkeypatch):
    def missing(*args, **options):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'who/what' doesn't exist on the Hub\nor so")

    monkeypatch.setattr(datasets, "load_dataset_builder", missing)
    with pytest.raises(ValueError, match="folder 'who/what' does not exist, and as a data set on the Hub it") as error:
        open_source("who/what")
    assert "\n" not in str(error.value)
