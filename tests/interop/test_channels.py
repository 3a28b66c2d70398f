"""Conversion and export of models with other numbers of channels than 3."""

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from mocov3_hf import MoCoV3Config, MoCoV3ImageProcessor, MoCoV3Model
from mocov3_hf.interop.convert import convert_checkpoint
from mocov3_hf.interop.export import export_model
from mocov3_hf.loading import adapt_input_weight
from mocov3_hf.processing import PixelFormat, build_image_processor, pixel_format_of
from tests.factories import VIT, randomize
from tests.interop.conftest import IMAGE_SIZES, OVERRIDES, official


@pytest.fixture
def band_model(tmp_path):
    model = MoCoV3Model(MoCoV3Config(backbone_config=VIT | {"num_channels": 4}))
    randomize(model)
    model.save_pretrained(tmp_path / "model")
    build_image_processor(32, pixel_format=PixelFormat(4, (0, 4095))).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_checkpoints_of_the_official_code_with_13_channels(tmp_path, body):
    state_dict = official(body)
    first = [key for key, value in state_dict.items() if value.dim() == 4 and value.shape[1] == 3]
    widened = {key: adapt_input_weight(state_dict[key], 13) if key in first else state_dict[key] for key in state_dict}
    assert first
    torch.save({"state_dict": {f"module.{key}": value for key, value in widened.items()}}, tmp_path / "bands.pth.tar")
    normalization = {"image_mean": [0.25] * 13, "image_std": [0.125] * 13}
    folder = tmp_path / "converted"
    convert_checkpoint(tmp_path / "bands.pth.tar", folder, pixel_range=[0, 10_000], **normalization, **OVERRIDES[body])
    processor = AutoImageProcessor.from_pretrained(folder)
    assert type(processor) is MoCoV3ImageProcessor
    assert pixel_format_of(processor) == PixelFormat(13, (0, 10_000))
    bands = np.random.default_rng(0).integers(0, 10_000, (13, 80, 80)).astype(np.uint16)
    pixel_values = processor(bands, return_tensors="pt")["pixel_values"]
    assert -2.1 < pixel_values.min() < pixel_values.max() < 6.1
    size = IMAGE_SIZES[body]
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        assert model(pixel_values[..., :size, :size]).pooler_output.isfinite().all()


@pytest.mark.parametrize("format", ["timm", "vit"])
def test_exports_take_the_bands(band_model, tmp_path, format):
    exported = export_model(band_model, tmp_path / "exported", format)  # compares the outputs itself
    assert exported.max_error < 1e-4
    assert MoCoV3ImageProcessor.from_pretrained(tmp_path / "exported").num_channels == 4
    if format == "timm":
        loaded = timm.create_model(f"local-dir:{tmp_path / 'exported'}", pretrained=True)
        assert tuple(loaded.pretrained_cfg["input_size"]) == (4, 32, 32)
        assert len(loaded.pretrained_cfg["mean"]) == 4
        weights = load_file(tmp_path / "exported" / "model.safetensors")
        assert weights["patch_embed.proj.weight"].shape[1] == 4
