"""photos.py: files with the pixels and bytes of ImageNet's, deterministic for a seed."""

import statistics

import pytest
from PIL import Image

from benchmarks.photos import make_photos


def size(path):
    with Image.open(path) as photo:
        return photo.size


def test_files_have_the_size_of_imagenet_and_are_deterministic(tmp_path):
    paths = make_photos(tmp_path / "first", 24)
    assert [path.name for path in paths[:2]] == ["photo_00000.jpg", "photo_00001.jpg"]
    assert {size(path) for path in paths} == {(500, 375), (375, 500)}
    assert 90_000 < statistics.mean(path.stat().st_size for path in paths) < 130_000
    again = make_photos(tmp_path / "again", 3)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths[:3]]
    other = make_photos(tmp_path / "other", 3, seed=1)
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(again, other, strict=True))


def test_a_count_below_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot make 0 photographs: pass a count of at least 1"):
        make_photos(tmp_path, 0)
