"""Classes are the same if their names are; what only the test split has is refused."""

import datasets
import numpy as np
import pytest

from mocov3_hf.data.classes import match_splits, open_labeled_splits
from mocov3_hf.data.labeled import LabeledImages


def split(labels, names=None) -> LabeledImages:
    return LabeledImages(None, np.asarray(labels, dtype=np.int64), names)


def matched(train, test):
    train, test = match_splits(train, test)
    assert train.class_names == test.class_names
    return train.class_names, train.labels.tolist(), test.labels.tolist()


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        (split([0, 1, 1], ["a", "b"]), split([1, 0], ["a", "b"]), (["a", "b"], [0, 1, 1], [1, 0])),
        (split([0, 1], ["a", "b"]), split([0, 1], ["b", "a"]), (["a", "b"], [0, 1], [1, 0])),
        (split([0, 1, 2], ["a", "b", "c"]), split([0, 0], ["c"]), (["a", "b", "c"], [0, 1, 2], [2, 2])),
        (split([0, 1, 2]), split([2, 0]), (None, [0, 1, 2], [2, 0])),
        (split([7, 900, 13, 7]), split([13, 900]), (["7", "13", "900"], [0, 2, 1, 0], [1, 2])),
        (split([1, 2, 3]), split([3]), (["1", "2", "3"], [0, 1, 2], [2])),
        (split([0, 1], ["a", "b"]), split([1, 0]), (["a", "b"], [0, 1], [1, 0])),
        (split([7, 13]), split([1, 0], ["13", "7"]), (["7", "13"], [0, 1], [0, 1])),
        # A name may be there twice, as in some published lists, if both splits have the same list.
        (split([0, 1], ["crane", "crane"]), split([1], ["crane", "crane"]), (["crane", "crane"], [0, 1], [1])),
        # Names without images in either split do no harm.
        (split([0, 1], ["a", "b", "c"]), split([0], ["a", "b", "d"]), (["a", "b", "c"], [0, 1], [0])),
    ],
)
def test_classes_are_matched_by_name(train, test, expected):
    assert matched(train, test) == expected


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (
            split([0, 1], ["ant", "bee"]),
            split([0, 1, 1], ["ant", "Bee"]),
            r"has 2 images of the class 'Bee', .*\(it has 'bee'\)",
        ),
        (
            split([0, 1], ["a", "b"]),
            split([0, 1, 2], ["a", "x", "y"]),
            "class 'x' and of 1 other class, which split",
        ),
        (
            split([0, 1]),
            split([0, 5]),
            "split 'test' has 1 images of the class '5', which split 'train' does not have",
        ),
        (split([7, 13]), split([900]), "class '900', which split 'train' does not have"),
        (split([0, 2], ["a", "b", "c"]), split([1], ["a", "b", "c"]), "class 'b', which split 'train' does not have"),
        (
            split([0, 1], ["a", "b"]),
            split([2]),
            "label 2 in split 'test' has no name: split 'train' has 2 class names",
        ),
        (split([0, 0], ["cat"]), split([0], ["cat"]), "single class, 'cat', which cannot be told apart"),
        (split([3, 3]), split([3]), "single class, '3', which cannot be told apart"),
        (split([0, 1], ["a b", "c"]), split([0], ["ab"]), r"\(it has 'a b'\)"),
    ],
)
def test_classes_that_only_the_test_split_has_are_refused(train, test, message):
    with pytest.raises(ValueError, match=message) as error:
        match_splits(train, test)
    assert "\n" not in str(error.value)


def test_folders(tmp_path, jpeg_folder):
    for name in ("train/ant", "train/bee", "test/ant", "test/Bee"):
        jpeg_folder(2, f"data/{name}", classes=0)
    with pytest.raises(ValueError, match="split 'test' has 2 images of the class 'Bee'"):
        open_labeled_splits(str(tmp_path / "data"))
    (tmp_path / "data/test/Bee").rename(tmp_path / "data/test/bee")
    train, test = open_labeled_splits(str(tmp_path / "data"))
    assert (train.class_names, test.labels.tolist()) == (["ant", "bee"], [0, 0, 1, 1])


@pytest.mark.parametrize("kind", ["integers", "text"])
def test_tables(tmp_path, make_jpeg, kind):
    def save(name, labels):
        labels = labels if kind == "integers" else [f"class {label}" for label in labels]
        feature = datasets.Value("int64" if kind == "integers" else "string")
        rows = [{"bytes": make_jpeg(index), "path": None} for index in range(len(labels))]
        features = datasets.Features({"image": datasets.Image(), "label": feature})
        table = datasets.Dataset.from_dict({"image": rows, "label": labels}, features=features)
        table.to_parquet(tmp_path / f"{name}.parquet")

    save("train", [7, 900, 13])
    save("test", [900, 7])
    train, test = open_labeled_splits(str(tmp_path))
    expected = ["7", "13", "900"] if kind == "integers" else ["class 13", "class 7", "class 900"]
    assert train.class_names == test.class_names == expected
    assert [expected[label] for label in test.labels] == [expected[train.labels[1]], expected[train.labels[0]]]
    save("test", [900, 8])
    with pytest.raises(ValueError, match=r"class '(class )?8', which split 'train' does not have"):
        open_labeled_splits(str(tmp_path))
