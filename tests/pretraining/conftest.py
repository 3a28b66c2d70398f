"""A folder of small pictures, and accelerate and torch as a fresh process finds them."""

import json
import signal

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from datasets import Dataset, Features, Image
from PIL import Image as Picture

from mocov3_hf.data.workers import STOP_SIGNALS
from mocov3_hf.pretraining.hardware import choose_algorithms


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """24 pictures of 40×48 pixels, smooth so that crops of one resemble each other."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for index in range(24):
        small = Picture.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        small.resize((48, 40), Picture.Resampling.BICUBIC).save(folder / f"{index:02}.png")
    return folder


@pytest.fixture(scope="session")
def shards(pictures, tmp_path_factory):
    """The same pictures in three parquet files of unequal length."""
    folder = tmp_path_factory.mktemp("shards")
    files = sorted(pictures.glob("*.png"))
    for index, part in enumerate([files[:5], files[5:16], files[16:]]):
        images = [{"bytes": file.read_bytes(), "path": None} for file in part]
        dataset = Dataset.from_dict({"image": images}, features=Features({"image": Image()}))
        dataset.to_parquet(folder / f"train-{index:05}-of-00003.parquet")
    return folder


@pytest.fixture(scope="session")
def labeled(tmp_path_factory):
    """Two classes, dark and bright: 16 pictures to learn from and 7, an odd number, to classify."""
    folder = tmp_path_factory.mktemp("labeled")
    rng = np.random.default_rng(0)
    for split, numbers in {"train": (8, 8), "test": (4, 3)}.items():
        for label, number in zip(("bright", "dark"), numbers, strict=True):
            (folder / split / label).mkdir(parents=True)
            for index in range(number):
                pixels = rng.integers(0, 60, (40, 40, 3)) + (180 if label == "bright" else 0)
                Picture.fromarray(pixels.astype(np.uint8)).save(folder / split / label / f"{index}.png")
    return folder


@pytest.fixture
def fresh():
    """Forgets what the runs before have left: device, precision, algorithms, and that a command ignores signals."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def forget():
        for number, handler in handlers.items():
            signal.signal(number, handler)
        AcceleratorState._reset_state(reset_partial_state=True)
        choose_algorithms(deterministic=False, strictly=False)

    return forget


@pytest.fixture(autouse=True)
def fresh_at_start(fresh):
    fresh()
    yield
    fresh()


@pytest.fixture(scope="session")
def tiny(pictures):
    """Arguments of a run of seconds."""
    backbone = (
        '{"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,'
        ' "intermediate_size": 32}'
    )
    sizes = ["--head_hidden_size", "16", "--projection_dim", "8", "--train_batch_size", "8"]
    length = ["--max_steps", "4", "--logging_steps", "1", "--dataloader_num_workers", "0"]
    return ["--recipe", "quickstart", "--dataset_name", str(pictures), "--backbone_config", backbone, *sizes, *length]


@pytest.fixture
def options(tiny):
    """The options of `tiny` as Python values."""
    values = dict(zip(tiny[4::2], tiny[5::2], strict=True))
    numbers = {name[2:]: int(value) for name, value in values.items() if value.isdigit()}
    return numbers | {"recipe": tiny[1], "backbone_config": json.loads(values["--backbone_config"])}
