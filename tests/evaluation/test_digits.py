"""The digits as an image folder."""

import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from mocov3_hf.data.digits import write_digits
from mocov3_hf.data.labeled import open_labeled, stratified_split


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits") / "nested" / "digits")


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_every_digit_is_there_once_in_its_class(folder):
    digits = load_digits()
    paths = list(folder.rglob("*.png"))
    numbers = sorted(int(path.stem) for path in paths)
    assert numbers == list(range(1797))
    assert all(int(path.parent.name) == digits.target[int(path.stem)] for path in paths)
    assert Counter(path.parent.parent.name for path in paths) == {"train": 1438, "test": 359}


def test_pixels_are_the_originals_enlarged(folder):
    digits = load_digits()
    for path in list(folder.rglob("*.png"))[::300]:
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("L", (32, 32))
            small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float)
        original = digits.images[int(path.stem)] * 255 / 16
        assert np.corrcoef(small.ravel(), original.ravel())[0, 1] > 0.97


def test_split_is_stratified_and_a_function_of_the_seed():
    labels = load_digits().target
    held_out = stratified_split(labels, 0.2, seed=3)
    for digit in range(10):
        assert held_out[labels == digit].sum() == round(0.2 * (labels == digit).sum())
    assert np.array_equal(held_out, stratified_split(labels, 0.2, seed=3))
    assert not np.array_equal(held_out, stratified_split(labels, 0.2, seed=4))


def test_written_twice_it_is_the_same(folder, tmp_path):
    assert files(write_digits(tmp_path / "again")) == files(folder)
    before = (folder / "digits.txt").stat().st_mtime_ns
    assert write_digits(folder) == folder
    assert (folder / "digits.txt").stat().st_mtime_ns == before, "kept as it is"


@pytest.mark.slow
def test_it_opens_as_a_labeled_data_set(folder):
    images = open_labeled(str(folder), split="test")
    assert len(images) == 359
    assert images.class_names == [str(digit) for digit in range(10)]
    assert images.decode(0).shape == (3, 32, 32)


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="not empty and does not hold these digits"):
        write_digits(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_other_arguments_do_not_pass_for_these(folder):
    with pytest.raises(ValueError, match="does not hold these digits"):
        write_digits(folder, size=16)


def test_without_scikit_learn_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r'digits needs scikit-learn: pip install "mocov3_hf\[quickstart\]"'):
        write_digits(tmp_path / "digits")
    assert not (tmp_path / "digits").exists()
