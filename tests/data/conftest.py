"""Generated images of every kind. The cache of `datasets` is inside the folder of the test."""

import io

import datasets
import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf_cache"))
    datasets.disable_progress_bars()


def picture(width: int, height: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    """A smooth image with some noise: uint8 (height, width, channels)."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = generator.uniform(2, 9, size=(channels, 2))
    smooth = np.stack([np.sin(a * x * 3 + b * y * 2 + seed) for a, b in waves], axis=-1)
    return np.clip(127 + 90 * smooth + generator.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(seed: int = 0, width: int = 60, height: int = 44, **options) -> bytes:
    return encoded(Image.fromarray(picture(width, height, seed)), "JPEG", quality=90, **options)


def png(seed: int = 0, width: int = 32, height: int = 32) -> bytes:
    return encoded(Image.fromarray(picture(width, height, seed)), "PNG")


@pytest.fixture
def make_jpeg():
    return jpeg


@pytest.fixture
def make_png():
    return png


@pytest.fixture
def make_picture():
    return picture


@pytest.fixture
def encode():
    return encoded


@pytest.fixture
def jpeg_folder(tmp_path):
    """A function (number, name, class folders) -> folder of JPEGs. The seed of an image is its index."""

    def make(number: int, name: str = "images", classes: int = 2, **options):
        folder = tmp_path / name
        for index in range(number):
            path = folder / f"class{index * classes // number}" / f"{index:05d}.jpg" if classes else None
            path = path or folder / f"{index:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(index, **options))
        return folder

    return make


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
