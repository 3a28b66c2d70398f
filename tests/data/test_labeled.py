"""Labeled splits: detection of columns, validation of labels, transforms."""

import datasets
import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from mocov3_hf.data.decode import decode_rgb
from mocov3_hf.data.labeled import EvaluationTransform, LabeledDataset, TrainingTransform, open_labeled
from mocov3_hf.data.photometric import IMAGENET_MEAN, IMAGENET_STD


@pytest.fixture
def save(tmp_path, make_jpeg):
    """A function (labels, feature, name of the column) -> folder."""

    def make(labels, feature=None, column="label", **more):
        feature = feature or datasets.Value("int64")
        rows = [{"bytes": make_jpeg(index), "path": None} for index in range(len(labels))]
        features = datasets.Features(
            {"image": datasets.Image(), column: feature, **{k: f for k, (_, f) in more.items()}}
        )
        columns = {"image": rows, column: labels, **{name: values for name, (values, _) in more.items()}}
        folder = tmp_path / f"saved{len(list(tmp_path.iterdir()))}"
        datasets.Dataset.from_dict(columns, features=features, split="test").save_to_disk(folder)
        return str(folder)

    return make


def test_class_labels_of_folders(jpeg_folder, make_jpeg):
    images = open_labeled(str(jpeg_folder(6, classes=3)), split="train")
    assert images.class_names == ["class0", "class1", "class2"]
    assert images.num_classes == 3
    assert images.labels.dtype == np.int64
    assert images.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(images) == 6
    assert torch.equal(images.decode(4), decode_rgb(make_jpeg(4)))


def test_integers_text_and_class_labels(save):
    names = ["cat", "dog"]
    by_class = open_labeled(save([1, 0, 1], datasets.ClassLabel(names=names)))
    assert (by_class.class_names, by_class.labels.tolist()) == (names, [1, 0, 1])
    by_number = open_labeled(save([4, 0, 2], datasets.Value("int32"), "target"))
    assert (by_number.class_names, by_number.num_classes, by_number.labels.tolist()) == (None, 5, [4, 0, 2])
    by_text = open_labeled(save(["dog", "cat", "dog"], datasets.Value("string"), "labels"))
    assert (by_text.class_names, by_text.labels.tolist()) == (names, [1, 0, 1])
    agreed = open_labeled(save(["dog", "cow"], datasets.Value("string")), class_names=["cat", "cow", "dog"])
    assert (agreed.num_classes, agreed.labels.tolist()) == (3, [2, 1])
    renumbered = open_labeled(save([0, 1], datasets.ClassLabel(names=["dog", "cat"])), class_names=names)
    assert renumbered.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("labels", "feature", "match"),
    [
        ([0, None, 1], None, r"column 'label' has 1 missing labels, the first in row 1"),
        ([0, -1, -1], None, r"column 'label' has 2 negative labels, the first in row 1: .*with public labels"),
        ([0.5, 1.0], datasets.Value("float32"), "must hold classes, integers or text, got Value"),
        ([[0], [1]], datasets.List(datasets.Value("int64")), "must hold classes, integers or text"),
        (["a", None], datasets.Value("string"), "1 missing labels"),
    ],
)
def test_labels_that_are_none(save, labels, feature, match):
    with pytest.raises(ValueError, match=match) as error:
        open_labeled(save(labels, feature))
    assert "\n" not in str(error.value)


def test_label_columns(save):
    extra = {"coarse": ([0, 1], datasets.ClassLabel(names=["x", "y"]))}
    both = save([1, 0], datasets.ClassLabel(names=["a", "b"]), "fine", **extra)
    with pytest.raises(ValueError, match=r"several label columns \(fine, coarse\): choose one with --label_column"):
        open_labeled(both)
    assert open_labeled(both, label_column="coarse").class_names == ["x", "y"]
    with pytest.raises(ValueError, match="label column 'y' does not exist; columns: image, fine, coarse"):
        open_labeled(both, label_column="y")
    with pytest.raises(ValueError, match="no label column found: name it with --label_column; columns: image, number"):
        open_labeled(save([1, 0], column="number"))
    with pytest.raises(ValueError, match="column 'label' has labels that are not class names: cow"):
        open_labeled(save(["dog", "cow"], datasets.Value("string")), class_names=["dog"])
    with pytest.raises(ValueError, match="label 3 in column 'label' has no name: there are 2 class names"):
        open_labeled(save([0, 3]), class_names=["dog", "cat"])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_evaluation_transform_is_torchvisions(make_jpeg, interpolation):
    image = decode_rgb(make_jpeg(width=90, height=70))
    expected = v2.Compose(
        [
            v2.Resize(37, v2.InterpolationMode(interpolation), antialias=True),
            v2.CenterCrop(32),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )(image)
    found = EvaluationTransform(32, interpolation=interpolation)(image)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-6)
    raw = EvaluationTransform(32, mean=None, std=None)(image)
    assert (raw.dtype, raw.shape) == (torch.uint8, (3, 32, 32))
    assert EvaluationTransform(48, resize=48)(decode_rgb(make_jpeg(width=20, height=60))).shape == (3, 48, 48)


def test_the_training_transform(make_jpeg):
    image = decode_rgb(make_jpeg(width=90, height=70))
    torch.manual_seed(0)
    first, second = TrainingTransform(32)(image), TrainingTransform(32)(image)
    assert first.shape == (3, 32, 32)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(TrainingTransform(32)(image), first)


def test_the_dataset_gives_pairs(jpeg_folder):
    dataset = LabeledDataset(open_labeled(str(jpeg_folder(4)), split="train"), EvaluationTransform(16))
    images, labels = next(iter(torch.utils.data.DataLoader(dataset, batch_size=4)))
    assert images.shape == (4, 3, 16, 16)
    assert labels.tolist() == [0, 0, 1, 1]
    assert LabeledDataset(dataset.images)[0][0].shape == (3, 224, 224)
