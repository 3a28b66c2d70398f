"""A small labeled image folder and a small model on disk."""

import numpy as np
import pytest
import torch
from PIL import Image

from mocov3_hf.processing import build_image_processor
from tests.factories import pretraining_model, write_images


@pytest.fixture(autouse=True)
def one_thread():
    """The order of sums, and with it the last bit, depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_workers(monkeypatch):
    """Data-loading workers only where a test asks for them: starting them takes longer than its few images."""
    monkeypatch.setattr("mocov3_hf.evaluation.common.default_workers", lambda: 0)


@pytest.fixture
def fails(capsys):
    """Run a command that must end with one line on stderr and an exit code (2 is a user's mistake); the line."""

    def run(main, arguments, code=2):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        assert ended.value.code == code
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("error: ")
        assert not any("Traceback" in line or line.startswith("error: ") for line in lines[:-1])
        return lines[-1]

    return run


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """45 images for training and 21 for testing, of 3 classes."""
    return write_images(tmp_path_factory.mktemp("images"), {"train": 15, "test": 7})


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A pre-training checkpoint of a tiny ViT with its image processor."""
    folder = tmp_path_factory.mktemp("model")
    pretraining_model().save_pretrained(folder)
    build_image_processor(32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures():
    """Images by split, and which of three colors are in them; each color is brighter by 110."""
    draw = np.random.default_rng(0)
    splits = {}
    for split, count in (("train", 60), ("test", 30)):
        kinds = draw.random((count, 3)) < [0.5, 0.4, 0.25]
        pixels = draw.normal(60, 30, (count, 32, 32, 3)) + 110 * kinds[:, None, None]
        splits[split] = [Image.fromarray(image) for image in pixels.clip(0, 255).astype(np.uint8)], kinds
    return splits


@pytest.fixture(scope="session")
def tagged(pictures):
    names = np.array(["red", "green", "blue"])
    return {
        split: [(image, names[kind].tolist()) for image, kind in zip(*both, strict=True)]
        for split, both in pictures.items()
    }


@pytest.fixture(scope="session")
def measured(pictures):
    """Two targets of very different units."""
    return {
        split: [
            (image, [2000 + 10 * float(np.asarray(image)[..., 0].mean()), float(np.asarray(image).mean()) / 1e4])
            for image in both[0]
        ]
        for split, both in pictures.items()
    }
