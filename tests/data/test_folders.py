"""Splits, classes, metadata and archives: what of a data set is used, the same map-style and streamed."""

import io
import json
import tarfile
import zipfile

import datasets
import pytest
from PIL import Image

from mocov3_hf.data.labeled import open_labeled
from mocov3_hf.data.shards import encoded_image
from mocov3_hf.data.sources import open_source


@pytest.fixture
def put(tmp_path, make_jpeg):
    """A function (names) -> folder with these images; each has a content of its own."""
    number = iter(range(10_000))

    def make(*names, folder="data"):
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(make_jpeg(next(number), width=16, height=12))
        return tmp_path / folder

    return make


def used(folder, split="train", **options) -> list[bytes]:
    """The images of a split, which must be the same map-style and streamed and must add up with those skipped."""
    source = open_source(str(folder), split=split, **options)
    stream = open_source(str(folder), split=split, streaming=True, **options)
    assert source.num_samples == stream.num_samples == source.account.num_images == stream.account.num_images
    assert source.account == stream.account
    assert source.account.num_files == source.account.num_images + sum(source.account.skipped.values())
    assert source.account.skipped.keys() == source.account.examples.keys()
    images = [content(source.read(row)) for row in range(len(source))]
    assert images == [content(shard.load().read(row)) for shard in stream.shards for row in range(shard.num_rows)]
    return images


def content(data) -> bytes:
    data = encoded_image(data)
    if isinstance(data, str):
        with open(data, "rb") as file:
            return file.read()
    return data


# Splits


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train/1.jpg", "train/2.jpg", "test/3.jpg"], {"train": 2, "test": 1}),
        (["Training/a/1.jpg", "VAL/b/2.jpg"], {"train": 1, "val": 1, "validation": 1, "dev": 1}),
        (["train/1.jpg", "valid/2.jpg", "eval/3.jpg"], {"train+valid": 2, "test": 1, "validation": 1}),
        (["train/1.jpg"], {"train": 1}),
        (["bus/1.jpg", "car/2.jpg", "train/3.jpg"], {"train": 3}),
        (["train/1.jpg", "test/2.jpg", "3.jpg"], {"train": 3}),
        (["images/train/1.jpg", "images/test/2.jpg"], {"train": 2}),
        (["train_0.jpg", "test_1.jpg", "train.png", "val.jpg"], {"train": 4}),
        (["test/1.jpg", "train2/2.jpg"], {"train": 2}),
        (["a/train/1.jpg", "b/test/2.jpg"], {"train": 2}),
    ],
)
def test_splits_are_top_level_folders_that_hold_everything(put, names, splits):
    folder = put(*names)
    (folder / "README.md").write_text("train and test")
    for split, number in splits.items():
        assert len(used(folder, split)) == number
    missing = {"train", "test", "validation"} - {"validation" if s in ("val", "dev") else s for s in splits}
    for split in missing - {part for name in splits for part in name.split("+")}:
        with pytest.raises(ValueError, match=f"split '{split}' does not exist in .*; it has: "):
            open_source(str(folder), split=split)


def test_a_folder_that_is_no_split_is_explained(put):
    folder = put("train/1.jpg", "test/2.jpg", "loose.jpg")
    (note,) = open_source(str(folder)).account.notes
    assert (
        "'test' and 'train' are ordinary folders here, not splits, because 1 images are outside, such as loose.jpg"
        in note
    )
    with pytest.raises(ValueError, match=r"it has: train. Pass .*; 'test' and 'train' are ordinary folders here"):
        open_source(str(folder), split="test")


def test_slices_of_splits(put):
    folder = put(*(f"train/{n}.jpg" for n in range(10)), "test/a.jpg")
    everything = used(folder)
    assert used(folder, "train[:30%]") == everything[:3]
    assert used(folder, "train[2:4]+test") == everything[2:4] + used(folder, "test")
    with pytest.raises(ValueError, match=r"slice .* of a split is not valid"):
        open_source(str(folder), split="train[x]")


@pytest.mark.parametrize("number", [0, 1, 3])
def test_few_images(put, number):
    folder = put(*(f"{n}.jpg" for n in range(number)))
    folder.mkdir(exist_ok=True)
    (folder / "notes.txt").write_text("x")
    if number == 0:
        with pytest.raises(ValueError, match=r"no images, .* found in .*, only 1 of the kind: side file \(.txt\)"):
            open_source(str(folder))
    else:
        assert len(used(folder)) == number


def test_empty_files_are_skipped_and_other_damage_is_left_to_decoding(put):
    folder = put("1.jpg", "2.jpg")
    (folder / "3.jpg").write_bytes(b"")
    (folder / "4.jpg").write_text("<html>404</html>")
    assert len(used(folder)) == 3
    assert open_source(str(folder)).account.skipped == {"empty file": 1}


def test_a_relative_path_and_the_home_folder(put, monkeypatch):
    folder = put("1.jpg", "2.jpg")
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for name in ("data", "./data", "~/data", "data/", "../" + folder.parent.name + "/data"):
        assert len(used(name)) == 2


# Classes


def classes(folder, split="train"):
    images = open_labeled(str(folder), split=split)
    return images.class_names, images.labels.tolist()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["cat/1.jpg", "dog/2.jpg", "cat/3.jpg"], (["cat", "dog"], [0, 0, 1])),
        (["train/cat/1.jpg", "train/dog/2.jpg", "test/cat/1.jpg"], (["cat", "dog"], [0, 1])),
        # Equally deep folders, all with names of their own: the innermost.
        (["pets/cat/1.jpg", "cars/bus/2.jpg"], (["bus", "cat"], [0, 1])),
        # Else the outermost.
        (["cat/2023/1.jpg", "dog/2023/2.jpg"], (["cat", "dog"], [0, 1])),
        (["cat/1.jpg", "dog/more/2.jpg"], (["cat", "dog"], [0, 1])),
        (["bus/1.jpg", "train/2.jpg", "test/3.jpg"], (["bus", "test", "train"], [0, 1, 2])),
    ],
)
def test_classes_are_folders(put, names, expected):
    assert classes(put(*names)) == expected


def test_a_class_name_has_one_unicode_form(put):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    folder = put(f"train/{composed}/1.jpg", "train/tea/2.jpg", f"test/{decomposed}/3.jpg", "test/tea/4.jpg")
    assert classes(folder)[0] == classes(folder, "test")[0] == [composed, "tea"]


def test_loose_images_are_for_pre_training_only(put):
    folder = put("cat/1.jpg", "dog/2.jpg", "cover.jpg")
    assert len(used(folder)) == 3
    images = open_labeled(str(folder), split="train")
    assert (len(images), images.labels.tolist(), len(images.source)) == (2, [0, 1], 2)
    assert images.account.skipped == {"in no class folder": 1}
    assert images.account.examples["in no class folder"].endswith("cover.jpg")


def test_an_empty_class_folder_is_reported(put):
    folder = put("train/cat/1.jpg", "train/dog/2.jpg", "test/cat/3.jpg")
    for path in ("train/emu", "test/dog"):
        (folder / path).mkdir()
    images = open_labeled(str(folder), split="train")
    assert images.class_names == ["cat", "dog"]
    assert images.account.notes == ["the folder 'train/emu' holds no images: it is not a class"]


def test_splits_below_the_top_are_not_classes(put):
    folder = put("images/train/1.jpg", "images/test/2.jpg")
    with pytest.raises(ValueError, match=r"images without labels: .*; test and train are splits only at the top"):
        open_labeled(str(folder), split="train")


# Metadata


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_means_the_same_map_style_and_streamed(put, kind):
    folder = put(*(f"{n}.jpg" for n in range(6)))
    rows = [{"file_name": f"{n}.jpg", "label": "ab"[n % 2]} for n in (3, 0, 4)] + [
        {"file_name": "gone.jpg", "label": "a"}
    ]
    write_metadata(folder, kind, rows)
    everything = {n: (folder / f"{n}.jpg").read_bytes() for n in range(6)}
    assert used(folder) == [everything[n] for n in (3, 0, 4)]
    skipped = open_source(str(folder)).account.skipped
    assert skipped == {"not named in metadata": 3, "named in metadata, but does not exist": 1}
    with pytest.raises(
        ValueError, match=r"1 images of .* are named in metadata, but does not exist, such as gone.jpg"
    ):
        open_labeled(str(folder), split="train")
    write_metadata(folder, kind, rows[:3])
    assert classes(folder) == (["a", "b"], [1, 0, 0])


def write_metadata(folder, kind, rows):
    if kind == "csv":
        text = "file_name,label\n" + "".join(f"{row['file_name']},{row['label']}\n" for row in rows)
    elif kind == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(folder / "metadata.parquet")
        return
    (folder / f"metadata.{kind}").write_text(text)


def test_metadata_of_each_split_and_of_all(put):
    folder = put("train/1.jpg", "train/2.jpg", "test/3.jpg", "test/4.jpg")
    (folder / "train" / "metadata.csv").write_text("file_name,label\n2.jpg,x\n")
    assert used(folder) == [(folder / "train" / "2.jpg").read_bytes()]
    assert len(used(folder, "test")) == 2
    (folder / "train" / "metadata.csv").unlink()
    (folder / "metadata.csv").write_text("file_name,label\ntrain/2.jpg,x\ntest/3.jpg,y\ntest/4.jpg,x\n")
    assert len(used(folder)) == 1
    assert classes(folder, "test") == (["x", "y"], [1, 0])


def test_metadata_that_name_images_twice_outside_of_the_folder_or_in_archives(put):
    folder, outside = put("sub/1.jpg", "2.jpg"), put("3.jpg", folder="outside")
    with tarfile.open(folder / "a.tar", "w") as archive:
        archive.add(outside / "3.jpg", "4.jpg")
    names = ["sub/1.jpg", "../outside/3.jpg", "sub/1.jpg", "4.jpg"]
    (folder / "metadata.csv").write_text("file_name,label\n" + "".join(f"{name},a\n" for name in names))
    one, three = (folder / "sub" / "1.jpg").read_bytes(), (outside / "3.jpg").read_bytes()
    assert used(folder) == [one, three, one, three]
    account = open_source(str(folder)).account
    assert account.skipped == {"not named in metadata": 1}
    assert account.notes == ["rows of metadata that name an image again, which is then used again: 1"]


def test_a_row_of_a_csv_file_without_a_path_is_refused(put):
    folder = put("1.jpg", "2.jpg")
    (folder / "train.csv").write_text("image,label\n1.jpg,a\n,b\n2.jpg,b\n")
    with pytest.raises(ValueError, match=r"a row of '.*train.csv' has no path in column 'image': fill it in"):
        open_source(str(folder))


def test_metadata_without_file_names_is_refused(put):
    folder = put("1.jpg")
    (folder / "metadata.csv").write_text("name,label\n1.jpg,a\n")
    with pytest.raises(ValueError, match=r"metadata.csv' has no column 'file_name' of paths; columns: name, label"):
        open_source(str(folder))


def test_csv_files_are_the_data_set_where_they_name_images(put):
    folder = put("images/1.jpg", "images/2.jpg", "images/3.jpg")
    (folder / "train.csv").write_text("image,label\nimages/1.jpg,a\nimages/3.jpg,b\n")
    assert used(folder) == [(folder / "images" / f"{n}.jpg").read_bytes() for n in (1, 3)]
    assert used(folder / "train.csv") == used(folder)
    # A table of something else is beside the images.
    (folder / "train.csv").write_text("id,label\n1,a\n")
    assert len(used(folder)) == 3
    (folder / "list.csv").write_text("path\n" + "".join(f"images/{n}.jpg\n" for n in (2, 1)))
    assert used(folder / "list.csv") == [(folder / "images" / f"{n}.jpg").read_bytes() for n in (2, 1)]
    assert len(used(folder / "list.csv", "list")) == 2


# Archives


def tar_of(path, members: dict[str, bytes]):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def zip_of(path, members: dict[str, bytes], method=zipfile.ZIP_DEFLATED):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def pictures(make_jpeg, make_png):
    """Encoded images by number, of two formats."""
    return [(make_jpeg if n % 2 else make_png)(n, width=16, height=12) for n in range(12)]


def test_tars_hold_images_of_any_extension_within_and_across(tmp_path, pictures):
    names = ["0.png", "1.jpg", "2.PNG", "3.JPEG", "4.weird", "5.jpg"]
    tar_of(tmp_path / "data" / "a.tar", dict(zip(names, pictures[:6], strict=True)) | {"0.cls": b"1", "x.json": b"{}"})
    tar_of(tmp_path / "data" / "b.tar", {f"{n}.png": pictures[n] for n in range(6, 12)})
    assert used(tmp_path / "data") == pictures
    assert open_source(str(tmp_path / "data")).account.skipped == {
        "label of an image (.cls)": 1,
        "side file (.json)": 1,
    }
    assert used(tmp_path / "data" / "b.tar") == pictures[6:]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zips(tmp_path, pictures, method):
    members = {f"set/{'cat' if n < 5 else 'dog'}/{n}": pictures[n] for n in range(8)}
    members |= {"set/readme.txt": b"x", "__MACOSX/set/._1": b"x", "set/inner.zip": b"PK", "set/": b""}
    path = zip_of(tmp_path / "data.zip", members, method)
    assert used(path) == pictures[:8]
    account = open_source(str(path)).account
    assert account.skipped == {"side file (.txt)": 1, "hidden or system file": 1, "archive inside an archive": 1}
    assert classes(path) == (["cat", "dog"], [0] * 5 + [1] * 3)


def test_a_large_archive_is_indexed_until_it_changes(tmp_path, pictures, monkeypatch):
    from mocov3_hf.data import archives

    monkeypatch.setattr(archives, "INDEX_FROM_BYTES", 0)
    members = {f"{n}.jpg": pictures[n] for n in range(4)} | {f"{n}.cls": b"1" for n in range(4)}
    members |= {"\u00e9/x.txt": b"x"}
    path = tar_of(tmp_path / "a.tar", members)
    assert used(path) == pictures[:4]
    first = open_source(str(path)).account
    monkeypatch.setattr(archives, "list_members", lambda *_: pytest.fail("listed again"))
    assert used(path) == pictures[:4]
    assert open_source(str(path)).account == first
    assert open_labeled(str(path), split="train", label_column="cls").account == first
    monkeypatch.undo()
    monkeypatch.setattr(archives, "INDEX_FROM_BYTES", 0)
    tar_of(path, members | {"4.jpg": pictures[4]})
    assert used(path) == pictures[:5]


def test_splits_in_archives(tmp_path, pictures):
    inside = {f"root/{'train' if n < 5 else 'test'}/{'ab'[n % 2]}/{n}.jpg": pictures[n] for n in range(8)}
    path = zip_of(tmp_path / "all.zip", inside)
    assert (used(path), used(path, "test")) == (pictures[:5], pictures[5:8])
    assert classes(path, "test") == (["a", "b"], [1, 0, 1])
    for number, split in enumerate(("train", "val")):
        tar_of(tmp_path / "tars" / f"x-{split}-000.tar", {"1.jpg": pictures[number]})
    assert (used(tmp_path / "tars"), used(tmp_path / "tars", "val")) == (pictures[:1], pictures[1:2])
    tar_of(tmp_path / "tars" / "extra.tar", {"1.jpg": pictures[2]})
    assert len(used(tmp_path / "tars")) == 3


def test_files_and_archives_together(tmp_path, put, pictures):
    folder = put("a.jpg", "z.jpg")
    tar_of(folder / "m.tar", {"1.jpg": pictures[0], "cat/2.jpg": pictures[1]})
    loose = [(folder / name).read_bytes() for name in ("a.jpg", "z.jpg")]
    assert used(folder) == [loose[0], *pictures[:2], loose[1]]


def test_labels_beside_images_in_tars(tmp_path, pictures):
    members = {}
    for n in range(4):
        members |= {f"{n}.png": pictures[n], f"{n}.cls": str(n % 3).encode(), f"{n}.txt": f"a {n}".encode()}
    path = tar_of(tmp_path / "train.tar", members)
    images = open_labeled(str(path), split="train")
    assert (images.class_names, images.labels.tolist()) == (None, [0, 1, 2, 0])
    assert open_labeled(str(path), split="train", label_column="txt").class_names == [f"a {n}" for n in range(4)]


def test_columns_of_images_in_tars(tmp_path, pictures):
    members = {}
    for n in range(4):
        members |= {f"{n}.jpg": pictures[n], f"{n}.depth.png": pictures[n + 4]}
    path = tar_of(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=r"several image columns \(depth.png, jpg\) in .*: choose one"):
        open_source(str(path))
    assert used(path, image_column="depth.png") == pictures[4:8]
    # Numbers after a dot are not columns.
    frames = {f"clip{c}.{n}.jpg": pictures[3 * c + n] for c in range(2) for n in range(3)}
    assert used(tar_of(tmp_path / "b.tar", frames)) == pictures[:6]


@pytest.mark.parametrize("kind", ["cut", "garbage", "damaged header"])
def test_damaged_tars_are_reported_and_their_images_used(tmp_path, pictures, kind):
    path = tar_of(tmp_path / "a.tar", {f"{n}.jpg": pictures[n] for n in range(4)})
    data = bytearray(path.read_bytes())
    if kind == "cut":
        data = data[: data.index(b"3.jpg") + 600]
    elif kind == "damaged header":
        data[data.index(b"3.jpg") + 150] ^= 0xFF
    else:
        data = bytearray(b"no tar at all" * 100)
    path.write_bytes(data)
    if kind == "garbage":
        with pytest.raises(
            ValueError, match=r"no images found in .*, only 1 of the kind: archive is damaged or cut short"
        ):
            open_source(str(path))
    else:
        assert used(path) == pictures[:3]
        assert open_source(str(path)).account.skipped == {"archive is damaged or cut short": 1}


def test_damaged_and_encrypted_zips(tmp_path, pictures):
    path = zip_of(tmp_path / "a.zip", {f"{n}.png": pictures[n] for n in range(3)})
    data = bytearray(path.read_bytes())
    (tmp_path / "cut.zip").write_bytes(data[:-30])
    with pytest.raises(ValueError, match="archive is damaged or cut short"):
        open_source(str(tmp_path / "cut.zip"))
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the flag of the first member in the central directory
    path.write_bytes(data)
    assert used(path) == pictures[1:3]
    assert open_source(str(path)).account.skipped == {"encrypted, in a zip file": 1}


def test_an_archive_that_changes_is_a_bad_image(tmp_path, pictures):
    from mocov3_hf.data.decode import BadImageError

    path = zip_of(tmp_path / "a.zip", {"0.png": pictures[0]})
    source = open_source(str(path))
    path.write_bytes(b"PK\x03\x04" + bytes(20))
    with pytest.raises(BadImageError, match="damaged or has changed"):
        source.read(0)
    path.unlink()
    with pytest.raises(BadImageError, match=r"cannot be read: .*a.zip/0.png"):
        source.read(0)


# Parquet


def parquet(path, pictures):
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image()})
    rows = [{"bytes": data, "path": None} for data in pictures]
    datasets.Dataset.from_dict({"image": rows}, features=features).to_parquet(path)
    return path


def test_single_parquet_files_and_folders(tmp_path, pictures):
    path = parquet(tmp_path / "o[n]e" / "photos.parquet", pictures[:3])
    assert used(path) == pictures[:3] == used(path.parent)
    parquet(tmp_path / "two" / "train-0.parquet", pictures[:4])
    parquet(tmp_path / "two" / "data" / "test.parquet", pictures[4:6])
    assert (used(tmp_path / "two"), used(tmp_path / "two", "test")) == (pictures[:4], pictures[4:6])
    parquet(tmp_path / "two" / "more.parquet", pictures[6:])
    assert len(used(tmp_path / "two")) == 12
    parquet(tmp_path / "three" / "val" / "x.parquet", pictures[:2])
    parquet(tmp_path / "three" / "train" / "x.parquet", pictures[2:])
    assert (used(tmp_path / "three", "validation"), len(used(tmp_path / "three"))) == (pictures[:2], 10)


def test_parquet_beside_images(tmp_path, put, pictures):
    folder = put("logo.jpg")
    parquet(folder / "data.parquet", pictures[:3])
    assert used(folder) == pictures[:3]
    assert open_source(str(folder)).account.skipped == {"image or archive beside parquet files": 1}
    put("2.jpg", "3.jpg")
    with pytest.raises(ValueError, match="holds 3 images and parquet files of 3 rows: pass the folder of the one or"):
        open_source(str(folder))
    datasets.Dataset.from_dict({"id": [1]}).to_parquet(folder / "data.parquet")
    assert len(used(folder)) == 3
    assert open_source(str(folder)).account.skipped == {"table without images (.parquet)": 1}


def test_other_files_are_refused_by_name(tmp_path, put, pictures):
    folder = put("1.jpg")
    with pytest.raises(ValueError, match="is a single image: pass the folder that holds the images"):
        open_source(str(folder / "1.jpg"))
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(
        ValueError, match="is a file: pass the folder that holds the data, or a parquet, tar, zip or CSV"
    ):
        open_source(str(tmp_path / "a.json"))
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"b.parquet' cannot be read as a parquet file"):
        open_source(str(tmp_path / "b.parquet"))
