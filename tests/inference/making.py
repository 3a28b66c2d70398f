"""Small models and images, made on the fly."""

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from mocov3_hf import MoCoV3Config, MoCoV3ForImageClassification
from mocov3_hf.processing import build_image_processor


BACKBONES = {
    "vit": {
        "model_type": "mocov3_vit",
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    },
    "resnet": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [16, 32],
        "depths": [1, 2],
        "layer_type": "bottleneck",
    },
}
NUM_LABELS = 7


def spread(model: AutoModelForImageClassification) -> None:
    """Weights and statistics apart from their initial values: scores that differ, and norms that are no identity."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                drawn *= 1.5 * parameter[0].numel() ** -0.5
            else:
                drawn = 0.2 * drawn + float(name.endswith("weight"))  # of a normalisation
            parameter.copy_(drawn)
            if name.startswith("classifier"):
                parameter.mul_(2)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2, generator=generator)


def save_classifier(folder: str, kind: str, **config) -> str:
    """A classifier of one of `BACKBONES`, or transformers' own ViT (`"native"`), with its image processor."""
    torch.manual_seed(0)
    labels = {"num_labels": NUM_LABELS} | config
    if kind == "native":
        vit = {key: value for key, value in BACKBONES["vit"].items() if key != "model_type"}
        model = ViTForImageClassification(ViTConfig(**vit, **labels))
        processor = ViTImageProcessor(size={"height": 32, "width": 32})
    else:
        model = MoCoV3ForImageClassification(MoCoV3Config(backbone_config=BACKBONES[kind], **labels))
        processor = build_image_processor(32)
    spread(model)
    model.config.id2label = {number: f"class {number}" for number in range(labels["num_labels"])}
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def smooth(height: int, width: int, seed: int) -> np.ndarray:
    """A uint8 picture (height, width, 3) with edges and gradients."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    picture = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).copy()
    picture[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return picture


def save_images(folder) -> list[str]:
    """Files of every kind that the pipelines read: odd sizes, modes of PIL, an Exif orientation."""
    folder.mkdir(exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    made = {
        "a_wide.jpg": (Image.fromarray(smooth(61, 97, 0)), {"quality": 90}),
        "b_upright.jpg": (Image.fromarray(smooth(133, 45, 1)), {"quality": 90}),
        "c_turned.jpg": (Image.fromarray(smooth(50, 90, 2)), {"exif": exif, "quality": 90}),
        "d_grey.png": (Image.fromarray(smooth(64, 64, 3)).convert("L"), {}),
        "e_alpha.png": (alpha(), {}),
        "f_cmyk.jpg": (Image.fromarray(smooth(80, 60, 5)).convert("CMYK"), {"quality": 90}),
        "g_palette.gif": (Image.fromarray(smooth(37, 52, 6)).convert("P"), {}),
        "h_tiny.png": (Image.fromarray(smooth(9, 13, 7)), {}),
        "i_square.webp": (Image.fromarray(smooth(32, 32, 8)), {}),
    }
    for name, (image, options) in made.items():
        image.save(folder / name, **options)
    return [str(folder / name) for name in made]


def alpha() -> Image.Image:
    """RGBA, partly transparent."""
    image = Image.fromarray(smooth(40, 71, 4)).convert("RGBA")
    image.putalpha(Image.fromarray(smooth(40, 71, 9)).convert("L"))
    return image
