"""Small labelled image folders and small models for the tests of evaluation."""

import numpy as np
import torch
from PIL import Image

from mocov3_hf import MoCoV3Config, MoCoV3ForPreTraining


COLOURS = {"ant": (200, 40, 40), "bee": (40, 200, 40), "cow": (40, 40, 200)}
VIT = {
    "model_type": "mocov3_vit",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


def write_images(folder, counts, seed=0):
    """`folder/<split>/<class>/*.png`: noise around a colour of the class, of several sizes."""
    draw = np.random.default_rng(seed)
    for split, count in counts.items():
        for name, colour in COLOURS.items():
            path = folder / split / name
            path.mkdir(parents=True)
            for number in range(count):
                shape = (int(draw.integers(36, 60)), int(draw.integers(36, 60)), 3)
                pixels = np.clip(draw.normal(colour, 40, shape), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(path / f"{number:03d}.png")
    return folder


def tiny_model(seed=0):
    torch.manual_seed(seed)
    return MoCoV3ForPreTraining(MoCoV3Config(backbone_config=dict(VIT), head_hidden_size=16, projection_dim=8))
