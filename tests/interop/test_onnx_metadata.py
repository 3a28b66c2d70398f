"""The metadata of an ONNX file: a reader of numpy and PIL that knows nothing else gets the model's logits."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, ConvNextImageProcessor

from mocov3_hf import MoCoV3Config, MoCoV3ForImageClassification, MoCoV3ImageProcessor
from mocov3_hf.interop.export_programs import preprocessing_metadata
from mocov3_hf.processing import build_image_processor
from tests.factories import VIT, smooth


def prepare(image, metadata):
    """Pixel values (1, C, H, W) float32 of an array (H, W, C), by the metadata alone; as in docs/interop.md."""
    values = {key: json.loads(text) for key, text in metadata.items()}
    resample = getattr(Image.Resampling, values["resample"].upper())
    channels = [Image.fromarray(image[..., number]) for number in range(values["num_channels"])]
    for step in values["steps"]:
        width, height = channels[0].size
        if step == "resize":
            new = values["resize"]
            if "shortest_edge" in new:
                edge = new["shortest_edge"]
                size = (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)
            else:
                size = (new["width"], new["height"])
            channels = [channel.resize(size, resample) for channel in channels]
        elif step == "center_crop":
            crop = values["center_crop"]
            left, top = (width - crop["width"]) // 2, (height - crop["height"]) // 2
            box = (left, top, left + crop["width"], top + crop["height"])
            channels = [channel.crop(box) for channel in channels]
        elif step == "scale":
            low, high = (0, 255) if channels[0].mode == "L" else values["pixel_range"]
            arrays = [(np.asarray(channel, np.float32) - low) / (high - low) for channel in channels]
            channels = [Image.fromarray(array.clip(0, 1)) for array in arrays]
        elif step == "normalize":
            both = zip(channels, values["image_mean"], values["image_std"], strict=True)
            channels = [Image.fromarray((np.asarray(c, np.float32) - mean) / std) for c, mean, std in both]
    return np.stack([np.asarray(channel, np.float32) for channel in channels])[None]


def assert_metadata_suffice(session, folder):
    """A session of onnxruntime gives the logits of the model for real images, by its metadata alone."""
    images = [smooth(*size, seed) for seed, size in enumerate([(64, 80), (90, 51), (33, 33), (37, 120), (55, 64)])]
    metadata = session.get_modelmeta().custom_metadata_map
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in images])
    with torch.no_grad():
        expected = model(pixels).logits.numpy()
    mine = np.concatenate([prepare(image, metadata) for image in images])
    assert np.abs(mine - pixels.numpy()).max() < 0.02  # a level of 8 bits, which PIL and torchvision round apart
    (logits,) = session.run([json.loads(metadata["output"])], {"pixel_values": mine})
    np.testing.assert_allclose(logits, expected, atol=0.01 * np.ptp(expected))
    assert np.ptp(expected, axis=0).max() > 0.1 * np.ptp(expected), "the images look alike to the model"
    assert json.loads(metadata["labels"]) == [model.config.id2label[number] for number in range(len(logits[0]))]
    assert json.loads(metadata["image_size"]) == [32, 32]


def test_pixels_of_four_channels_of_twelve_bits():
    model = MoCoV3ForImageClassification(MoCoV3Config(backbone_config=VIT | {"num_channels": 4}))
    settings = {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}, "pixel_range": [0, 4095]}
    settings |= {"image_mean": [0.5] * 4, "image_std": [0.25] * 4}
    processor = MoCoV3ImageProcessor(num_channels=4, **settings)
    metadata = preprocessing_metadata(model, processor)
    for seed in range(3):
        channels = [smooth(60, 70 + seed, seed), smooth(60, 70 + seed, seed + 9)[..., :1]]
        image = np.concatenate(channels, axis=2).astype(np.uint16) * 17
        expected = processor(image, return_tensors="pt")["pixel_values"].numpy()
        np.testing.assert_allclose(prepare(image.astype(np.float32), metadata), expected, atol=1e-4)


def test_steps_in_the_order_of_the_processor(capsys):
    model = MoCoV3ForImageClassification(MoCoV3Config(backbone_config=dict(VIT)))
    plain = preprocessing_metadata(model, build_image_processor(32, "bicubic"))
    assert json.loads(plain["steps"]) == ["resize", "center_crop", "scale", "normalize"]
    assert json.loads(plain["resample"]) == "bicubic"
    assert json.loads(plain["pixel_range"]) == pytest.approx([0, 255])
    deep = preprocessing_metadata(model, build_image_processor(32, num_channels=2))
    assert json.loads(deep["steps"]) == ["scale", "resize", "center_crop", "normalize"]
    other = preprocessing_metadata(model, ConvNextImageProcessor(crop_pct=0.8))
    assert "steps" not in other
    assert "has no metadata for preprocessing" in capsys.readouterr().err
