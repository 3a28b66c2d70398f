"""Labels of several classes per image and numbers, in every form in which data sets have them."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from mocov3_hf.data.classes import open_labeled_splits
from mocov3_hf.data.labeled import open_labeled, stratified_split
from mocov3_hf.data.memory import named
from mocov3_hf.problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from tests.factories import png, smooth


List, Value = datasets.List, datasets.Value
NAMES = datasets.ClassLabel(names=["ant", "bee", "cow"])


def table(columns, features=None):
    """A data set in memory with one image in all rows."""
    rows = len(next(iter(columns.values())))
    image = {"bytes": png(Image.fromarray(smooth(16, 16, 0))), "path": None}
    declared = {"image": datasets.Image(), **(features or {})}
    dataset = datasets.Dataset.from_dict({"image": [image] * rows, **columns})
    return dataset.cast(datasets.Features({**dataset.features, **declared}))


def opened(columns, features=None, label_column=None, problem_type="auto", **options):
    with named(table(columns, features)) as (name, split):
        return open_labeled(name, split=split, label_column=label_column, problem_type=problem_type, **options)


@pytest.mark.parametrize(
    ("columns", "features", "chosen", "names"),
    [
        ({"label": [[0, 2], [], [1]]}, {"label": List(NAMES)}, None, ["ant", "bee", "cow"]),
        ({"tags": [[0, 2], [], [1]]}, {"tags": List(NAMES)}, None, ["ant", "bee", "cow"]),
        ({"label": [[0, 2], [], [1]]}, {}, None, None),
        ({"label": [["ant", "cow"], [], ["bee"]]}, {}, None, ["ant", "bee", "cow"]),
        ({"label": [[1, 0, 1], [0, 0, 0], [0, 1, 0]]}, {}, None, None),
        ({"label": [[1.0, 0, 1], [0, 0, 0], [0, 1, 0]]}, {}, None, None),
        ({"ant": [1, 0, 0], "bee": [0, 0, 1], "cow": [1, 0, 0]}, {}, ["ant", "bee", "cow"], ["ant", "bee", "cow"]),
        (
            {"a": [True, False, False], "b": [False, False, True], "c": [1.0, 0, 0]},
            {},
            ["a", "b", "c"],
            ["a", "b", "c"],
        ),
    ],
)
def test_forms_of_multi_label_data(columns, features, chosen, names):
    images = opened(columns, features, chosen)
    assert images.problem_type == MULTI_LABEL
    assert images.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert (images.class_names, images.num_classes) == (names, 3)
    assert images.select(np.array([2])).labels.tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("mark", ["|", ";", ", ", " "])
def test_names_in_a_column_of_text(mark):
    texts = {"label": [f"cow{mark}ant", None, "bee"]}
    images = opened(texts, problem_type=MULTI_LABEL)
    assert (images.labels.tolist(), images.class_names) == ([[1, 0, 1], [0, 0, 0], [0, 1, 0]], ["ant", "bee", "cow"])


def test_a_polar_bear_is_one_class():
    images = opened({"label": ["polar bear|cat", "cat"]}, problem_type=MULTI_LABEL)
    assert images.class_names == ["cat", "polar bear"]


@pytest.mark.parametrize(
    ("columns", "chosen", "labels", "names"),
    [
        ({"label": [0.5, 2.0]}, None, [[0.5], [2]], ["label"]),
        ({"label": [[0.5, 1], [2, 1]]}, None, [[0.5, 1], [2, 1]], None),
        ({"age": [3, 70], "size": [1.5, 2]}, ["size", "age"], [[1.5, 3], [2, 70]], ["size", "age"]),
        ({"age": [3, 70]}, "age", [[3], [70]], ["age"]),
    ],
)
def test_forms_of_regression_data(columns, chosen, labels, names):
    images = opened(columns, {}, chosen, REGRESSION if chosen == "age" else "auto")
    assert (images.problem_type, images.labels.dtype) == (REGRESSION, np.float64)
    assert (images.labels.tolist(), images.class_names) == (labels, names)


@pytest.mark.parametrize("feature", [NAMES, Value("int64"), Value("string")])
def test_one_class_per_image_is_inferred(feature):
    values = ["ant", "bee"] if feature == Value("string") else [0, 1]
    assert opened({"label": values}, {"label": feature}).problem_type == SINGLE_LABEL


@pytest.mark.parametrize(
    ("columns", "features", "chosen", "problem_type", "message"),
    [
        ({"label": [0.5, float("nan")]}, {}, None, "auto", "has NaN or infinity in 1 rows, the first in row 1"),
        ({"label": [0.5, None]}, {}, None, "auto", "has 1 missing labels, the first in row 1"),
        ({"label": [[0.5, 1.0], [1.0]]}, {}, None, "auto", "has 1 values in row 1, expected 2 as in the first row"),
        ({"label": [[1, 1, 0], [0, 1]]}, {}, None, "auto", "has 2 values in row 1, expected 3 as in the first row"),
        ({"label": [[4, 4], [0, 1]]}, {}, None, "auto", "lists a class twice in row 0"),
        ({"label": [[0], [-1]]}, {}, None, "auto", r"has \[-1\] in row 1: number the classes from 0"),
        ({"label": [[0], None]}, {}, None, "auto", "has 1 missing labels, the first in row 1"),
        ({"label": [[0], [1]]}, {}, None, SINGLE_LABEL, "must hold classes, integers or text, got List"),
        ({"a": [0, 1], "b": [1, 0]}, {}, ["a", "b"], SINGLE_LABEL, r"2 label columns \(a, b\) are for multi-label"),
        ({"label": [0, 1]}, {"label": NAMES}, None, REGRESSION, r"holds classes \(ant, bee, cow\): regression needs"),
        ({"label": ["1.5", "y"]}, {}, None, REGRESSION, r"holds text \('y' in row 1\): regression needs numbers"),
        ({"label": [0.5, 1e300]}, {}, None, REGRESSION, r"has values up to 1e\+300, and a model returns float32"),
        ({"label": ["a", None]}, {}, None, "auto", "or pass --problem_type multi_label_classification"),
        ({"label": [1, -1]}, {}, None, "auto", "or --problem_type regression"),
        (
            {"a": [0, 1], "b": [1, 0]},
            {},
            None,
            "auto",
            "image, a, b; several of 0 and 1 or of numbers can be",
        ),
        ({"label": [0, 1]}, {"label": NAMES}, None, MULTI_LABEL, r"holds classes \(ant, bee, cow\), expected lists"),
        ({"label": [0, 7]}, {}, None, MULTI_LABEL, "has 7 in row 1: expected 0 or 1"),
        ({"label": [None, None]}, {"label": Value("string")}, None, MULTI_LABEL, "names no class"),
        ({"label": [[], []]}, {"label": List(Value("int64"))}, None, "auto", "no row of column 'label' has a class"),
    ],
)
def test_mistakes(columns, features, chosen, problem_type, message):
    with pytest.raises(ValueError, match=message) as raised:
        opened(columns, features, chosen, problem_type)
    assert "\n" not in str(raised.value)


def splits(train, test, **options):
    with named({"train": table(train), "test": table(test)}) as (name, _):
        return open_labeled_splits(name, problem_type="auto", **options)


def test_splits_have_one_numbering():
    train, test = splits({"label": [["cow", "ant"], ["bee"]]}, {"label": [["bee", "cow"], []]})
    assert (test.class_names, test.labels.tolist()) == (train.class_names, [[0, 1, 1], [0, 0, 0]])
    train, test = splits({"label": [[0, 3], [1, 2]]}, {"label": [[1], [0]]})
    assert test.labels.shape == (2, 4)
    # Of three classes, numbers of classes; of two, columns of 0 and 1.
    _, test = splits({"label": [[0, 2], [1]]}, {"label": [[0, 1], [0, 1]]})
    assert test.labels.tolist() == [[1, 1, 0], [1, 1, 0]]
    _, test = splits({"label": [[0, 1], [1, 1]]}, {"label": [[0, 1], [0, 1]]})
    assert test.labels.tolist() == [[0, 1], [0, 1]]
    with pytest.raises(ValueError, match="1 images of the class 'fly', which split 'train' does not have"):
        splits({"label": [["cow"], ["bee"]]}, {"label": [["fly"], []]})
    with pytest.raises(ValueError, match="the class '1', which split 'train' does not have"):
        splits({"label": [[0, 2], [2]]}, {"label": [[1], [0]]})
    with pytest.raises(ValueError, match="all images of split 'train' have the same classes"):
        splits({"label": [["ant"], ["ant"]]}, {"label": [["ant"], []]})
    with pytest.raises(ValueError, match="split 'test' has 3 targets, expected the 2 of split 'train'"):
        splits({"label": [[0.5, 2]]}, {"label": [[0.5, 2, 3]]})


def test_the_rarest_class_of_an_image_is_held_out_in_proportion():
    labels = np.zeros((40, 2), dtype=np.uint8)
    labels[:, 0], labels[:10, 1] = 1, 1
    held_out = stratified_split(labels, 0.2, seed=0)
    assert (held_out.sum(), labels[held_out, 1].sum()) == (8, 2)
    assert stratified_split(np.arange(10.0)[:, None], 0.3, seed=0).sum() == 3


def test_superclasses():
    columns = {"label": [0, 1, 2], "kind": ["insect", "insect", "mammal"]}
    images = opened(columns, {"label": NAMES}, None, superclass_column="kind")
    assert images.superclasses == {"ant": "insect", "bee": "insect", "cow": "mammal"}
    columns = {"label": [0, 0, 2], "kind": ["insect", "mammal", "mammal"]}
    with pytest.raises(ValueError, match="two superclasses of the class 'ant', 'insect' and 'mammal'"):
        opened(columns, {"label": NAMES}, None, superclass_column="kind")


def test_tables_beside_images(tmp_path):
    for number in range(3):
        Image.fromarray(smooth(16, 16, number)).save(tmp_path / f"{number}.png")
    (tmp_path / "metadata.csv").write_text("file_name,ant,bee,age\n0.png,1,0,0.5\n1.png,1,1,2\n2.png,0,0,3\n")
    images = open_labeled(str(tmp_path), split="train", label_column=["ant", "bee"], problem_type="auto")
    assert (images.labels.tolist(), images.class_names) == ([[1, 0], [1, 1], [0, 0]], ["ant", "bee"])
    images = open_labeled(str(tmp_path), split="train", label_column="age", problem_type="auto")
    assert images.labels.tolist() == [[0.5], [2], [3]]


def test_pairs_in_memory():
    image = Image.fromarray(smooth(16, 16, 0))
    for labels, expected in (
        ([[0, 1], []], [[1, 1], [0, 0]]),
        ([np.array([1, 0]), np.array([0, 0])], [[1, 0], [0, 0]]),
        ([("b", "a"), ("a",)], [[1, 1], [1, 0]]),
        ([1, 2.5], [[1], [2.5]]),
        ([np.array(1.0), torch.tensor(2.5)], [[1], [2.5]]),
        ([torch.tensor(1), torch.tensor(0)], [1, 0]),
        ([np.array([1.5, 2]), np.array([0.5, 1])], [[1.5, 2], [0.5, 1]]),
    ):
        with named([(image, label) for label in labels]) as (name, split):
            assert open_labeled(name, split=split, problem_type="auto").labels.tolist() == expected
    for labels in ([0.5, "x"], [[1], 2], [[1], ["x"]]):
        with pytest.raises(ValueError, match="label"), named([(image, label) for label in labels]):
            pass
