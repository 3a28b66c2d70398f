"""Splits, classes and metadata: what of a folder is used, the same map-style and streamed."""

import json
import tarfile

import datasets
import pytest

from mocov3_hf.data.labeled import open_labeled
from mocov3_hf.data.shards import encoded_image
from mocov3_hf.data.sources import open_source


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
