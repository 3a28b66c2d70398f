"""Tiny models, images and run folders that the tests of several rooms share."""

import io
import json

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, ViTImageProcessor

from mocov3_hf import MoCoV3Config, MoCoV3ForImageClassification, MoCoV3ForPreTraining
from mocov3_hf.pretraining.recipe import load_recipe
from mocov3_hf.processing import build_image_processor


VIT = {
    "model_type": "mocov3_vit",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
# The smallest one, of four patches.
NANO_VIT = VIT | {"hidden_size": 16, "intermediate_size": 32, "image_size": 16}
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [16, 32],
    "depths": [1, 2],
    "layer_type": "bottleneck",
}
BACKBONES = {"vit": VIT, "resnet": RESNET}
NUM_LABELS = 7

COLORS = {"ant": (200, 40, 40), "bee": (40, 200, 40), "cow": (40, 40, 200)}
# Class names that could break the HTML of a page, a chart's formulas or an SVG document.
AWKWARD_NAMES = ["<b>bold</b>", "</title></style><script>document.title = 'x'</script>", 'a & "b" $c_d$ -->']


def pretraining_model(seed: int = 0) -> MoCoV3ForPreTraining:
    """A tiny ViT with heads."""
    torch.manual_seed(seed)
    return MoCoV3ForPreTraining(MoCoV3Config(backbone_config=dict(VIT), head_hidden_size=16, projection_dim=8))


def randomize(model: PreTrainedModel) -> None:
    """Draw weights and statistics, so that scores differ and no normalization is the identity."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                drawn *= 1.5 * parameter[0].numel() ** -0.5
            else:
                drawn = 0.2 * drawn + float(name.endswith("weight"))  # of a normalization
            parameter.copy_(drawn)
            if name.startswith("classifier"):
                parameter.mul_(2)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2, generator=generator)


def save_classifier(folder, kind: str = "vit", names: list[str] | None = None, **config) -> str:
    """Save a classifier with its image processor.

    Args:
        folder: where to.
        kind: one of `BACKBONES`, or "native" for transformers' own ViT.
        names: of the classes; default to "class 0", "class 1", ...
        config: more of the model's configuration.
    """
    torch.manual_seed(0)
    names = [f"class {number}" for number in range(config.pop("num_labels", NUM_LABELS))] if names is None else names
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    if kind == "native":
        vit = {key: value for key, value in VIT.items() if key != "model_type"}
        model = ViTForImageClassification(ViTConfig(**vit, **labels, **config))
        processor = ViTImageProcessor(size={"height": 32, "width": 32})
    else:
        model = MoCoV3ForImageClassification(MoCoV3Config(backbone_config=dict(BACKBONES[kind]), **labels, **config))
        processor = build_image_processor(32)
    randomize(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def noise(color: tuple[int, int, int], draw: np.random.Generator, height: int = 40, width: int = 48) -> Image.Image:
    """Noise around a color."""
    return Image.fromarray(np.clip(draw.normal(color, 40, (height, width, 3)), 0, 255).astype(np.uint8))


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "png")
    return stream.getvalue()


def write_images(folder, counts: dict[str, int], seed: int = 0):
    """Write `folder/<split>/<class>/*.png`: noise around a color of the class, of several sizes."""
    draw = np.random.default_rng(seed)
    for split, count in counts.items():
        for name, color in COLORS.items():
            path = folder / split / name
            path.mkdir(parents=True)
            for number in range(count):
                height, width = int(draw.integers(36, 60)), int(draw.integers(36, 60))
                noise(color, draw, height, width).save(path / f"{number:03d}.png")
    return folder


def save_labeled(folder):
    """Write 36 images of three classes with awkward names, as parquet."""
    draw = np.random.default_rng(0)
    colors = list(COLORS.values())
    labels = [number % 3 for number in range(36)]
    images = [{"bytes": png(noise(colors[label], draw)), "path": None} for label in labels]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=AWKWARD_NAMES)})
    dataset = Dataset.from_dict({"image": images, "label": labels}, features=features)
    dataset.to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


def save_unlabeled(folder):
    """Write 12 images without labels, as files."""
    draw = np.random.default_rng(1)
    (folder / "test").mkdir()
    for number in range(12):
        noise(list(COLORS.values())[number % 3], draw).save(folder / "test" / f"{number:02}.png")
    return folder


def smooth(height: int, width: int, seed: int) -> np.ndarray:
    """A uint8 image (height, width, 3) with edges and gradients."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).copy()
    pixels[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return pixels


def save_files(folder) -> list[str]:
    """Write a file of every kind that the pipelines read: odd sizes, modes of PIL, an Exif orientation."""
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
    """An RGBA image, partly transparent."""
    image = Image.fromarray(smooth(40, 71, 4)).convert("RGBA")
    image.putalpha(Image.fromarray(smooth(40, 71, 9)).convert("L"))
    return image


def metric_lines(first: int, last: int, **changes):
    """Lines of metrics.jsonl, every fifth step."""
    for step in range(first, last + 1, 5):
        yield {
            "step": step,
            "epoch": step / 4,
            "loss": 1.6 - 0.02 * step,
            "positive_top1": 0.01 * step,
            "learning_rate": 1e-3,
            "ema_decay": 0.99,
            "grad_norm": 2.0 + 1 / step,
            "images_per_second": 100.0,
            "data_wait_fraction": 0.02,
            "skipped_steps": 0,
            "gradient_spikes": 0,
            "first_layer_grad_max": 0.1,
            "last_layer_grad_max": 0.05,
            "projection_std_ratio": 0.9,
            "projection_effective_rank": 6.0,
            "block_grad_norms": {"embeddings": 0.1, "encoder.layer.0": 0.2, "projector": 1.0, "predictor": 2.0},
            **changes,
        }


def write_lines(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def save_recipe(folder, name: str, *arguments: str) -> None:
    """Write the recipe.yaml of a run: a recipe of the package with options of the command line over it."""
    load_recipe(name, list(arguments)).save(folder / "recipe.yaml")


def save_run(folder):
    """Save a run of 40 steps with a spike, a skipped step and a rollback from step 27 to 20."""
    pretraining_model().save_pretrained(folder)
    build_image_processor(32).save_pretrained(folder)
    arguments = ["--backbone_config", json.dumps(VIT), "--train_batch_size", "16", "--dataset_name", "/secret/<u>"]
    save_recipe(folder, "quickstart", *arguments)
    (folder / "checkpoint-40").mkdir()
    state = {"step": 40, "global_batch_size": 8, "steps_per_epoch": 4, "total_steps": 40, "num_processes": 2}
    state["hardware"] = {"cpu": "a cpu", "cpu_count": 2}
    (folder / "checkpoint-40" / "state.json").write_text(json.dumps({"run": state}))
    rolled_back = list(metric_lines(25, 25, loss=1.9, grad_norm=30.0))
    written = [*metric_lines(5, 20), *rolled_back, *metric_lines(25, 40, gradient_spikes=1, skipped_steps=1)]
    write_lines(folder / "metrics.jsonl", written)
    knn = {"epoch": 1, "knn_chance": 1 / 3, "knn_test_images": 36}
    write_lines(folder / "knn.jsonl", [{"step": step, "knn_top1": step / 50} | knn for step in (10, 20, 40)])
    events = [
        {"step": 17, "event": "spike", "grad_norm": 25.0, "times_usual": 12.0},
        {"step": 19, "event": "skipped", "grad_norm": None},
        {"step": 27, "event": "rollback", "to_step": 20, "skipped_batches": 7, "reason": "<i>loss</i>"},
    ]
    write_lines(folder / "events.jsonl", events)
    result = {
        "task": "knn",
        "date": "2026-01-02T03:04:05+00:00",
        "dataset": {"name": "/secret/<em>set", "split": "test"},
        "metrics": {"knn20_top1": 0.815, "effective_rank": 5.5, "per_class": {"ant": 1.0}},
        "settings": {},
        "versions": {"python": "3.11.0", "torch": "2.14.0"},
        "hardware": {"cpu": "a cpu", "cpu_count": 2},
    }
    (folder / "results.json").write_text(json.dumps({"format": 1, "results": [result]}))
    return folder


def save_trained_classifier(folder):
    """Save a ViT with a random head for the three classes, in reverse order, and the metrics of its training."""
    save_classifier(folder, names=AWKWARD_NAMES[::-1])
    written = [{"step": 5, "epoch": 0.5, "loss": 1.2, "learning_rate": 0.1}]
    written += [{"step": 10, "epoch": 1.0, "loss": 0.9, "learning_rate": 0.05}]
    written += [{"step": 10, "epoch": 1.0, "eval_top1": 0.7, "eval_top1_ema": 0.6}]
    written += [{"step": 20, "epoch": 2.0, "eval_top1": 0.6, "eval_top1_ema": 0.75}]
    write_lines(folder / "metrics.jsonl", written)
    return folder
