"""Reports about models of bands."""

import numpy as np
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, Features

from mocov3_hf import MoCoV3Config, MoCoV3Model
from mocov3_hf.hub.run_card import run_card
from mocov3_hf.processing import PixelFormat, build_image_processor
from mocov3_hf.report.images import Viewer, open_samples
from mocov3_hf.report.write import main
from mocov3_hf.run_folder import read_run_folder
from tests.factories import VIT


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    MoCoV3Model(MoCoV3Config(backbone_config=VIT | {"num_channels": 5})).save_pretrained(tmp_path / "model")
    build_image_processor(32, pixel_format=PixelFormat(5, (0, 4000))).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def bands(tmp_path):
    """Every band of a constant value: 1000, 2000, ... 5000, the last above the range."""
    images = np.broadcast_to(np.arange(1000, 6000, 1000)[:, None, None], (12, 5, 32, 32)).astype(np.uint16)
    feature = Features({"bands": Array3D((5, 32, 32), "uint16"), "label": ClassLabel(names=["a", "b"])})
    table = Dataset.from_dict({"bands": list(images), "label": [0, 1] * 6}, features=feature)
    table.to_parquet(tmp_path / "bands" / "test.parquet")
    return tmp_path / "bands"


@pytest.mark.parametrize(
    ("chosen", "levels"), [(None, [64, 128, 191]), ([3, 2, 1], [255, 191, 128]), ([4], [255, 255, 255])]
)
def test_the_shown_channels_are_scaled(model, bands, chosen, levels):
    viewer = Viewer(read_run_folder(model), chosen)
    samples = open_samples(str(bands), num_images=4)
    view = viewer.look(samples, batch_size=4).views[0]
    assert view.shape == (32, 32, 3)
    np.testing.assert_array_equal(view[5, 5], levels)


@pytest.mark.slow
def test_report_about_bands(model, bands, capsys):
    options = ["--model", str(model), "--dataset_name", str(bands), "--num_images", "12"]
    main([*options, "--display_channels", "3", "2", "1"])
    assert (model / "report.html").stat().st_size > 1000
    with pytest.raises(SystemExit) as stop:
        main([*options, "--display_channels", "5"])
    assert stop.value.code == 2
    assert "from 0 to 4, got 5" in capsys.readouterr().err


def test_the_card_shows_how_to_use_arrays(model):
    card = run_card(read_run_folder(model), "someone/bands")
    assert 'np.load("image.npy")  # (5, height, width)' in card
    assert "pipeline(" not in card
