"""Builds an unstable run, a classifier, and images of classes with awkward names."""

import io
import json

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Picture

from mocov3_hf import MoCoV3Config, MoCoV3ForImageClassification, MoCoV3ForPreTraining
from mocov3_hf.processing import build_image_processor
from mocov3_hf.recipe import load_recipe


VIT = {
    "model_type": "mocov3_vit",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
}
# Names that break a page, the formulas of a chart or an SVG document unless they are escaped.
NAMES = ["<b>bold</b>", "</title></style><script>document.title = 'x'</script>", 'a & "b" $c_d$ -->']
COLORS = [(200, 40, 40), (40, 200, 40), (40, 40, 200)]


def encoded(color, draw):
    """A PNG file: noise around a color."""
    pixels = np.clip(draw.normal(color, 40, (40, 48, 3)), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Picture.fromarray(pixels).save(stream, "png")
    return {"bytes": stream.getvalue(), "path": None}


def save_labelled(folder):
    """36 images of three classes, as parquet."""
    draw = np.random.default_rng(0)
    labels = [number % 3 for number in range(36)]
    columns = {"image": [encoded(COLORS[label], draw) for label in labels], "label": labels}
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    Dataset.from_dict(columns, features=features).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


def save_unlabelled(folder):
    """12 images without labels, as files."""
    draw = np.random.default_rng(1)
    (folder / "test").mkdir()
    for number in range(12):
        (folder / "test" / f"{number:02}.png").write_bytes(encoded(COLORS[number % 3], draw)["bytes"])
    return folder


def lines(first, last, **changes):
    """Lines of metrics.jsonl, every fifth step."""
    for step in range(first, last + 1, 5):
        yield {
            "step": step,
            "epoch": step / 4,
            "loss": 1.6 - 0.02 * step,
            "positive_top1": 0.01 * step,
            "learning_rate": 1e-3,
            "momentum": 0.99,
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


def save_run(folder):
    """A run of 40 steps with a spike, a skipped step and a rollback from step 27 to 20."""
    torch.manual_seed(0)
    model = MoCoV3ForPreTraining(MoCoV3Config(backbone_config=dict(VIT), head_hidden_size=16, projection_dim=8))
    model.save_pretrained(folder)
    build_image_processor(32).save_pretrained(folder)
    arguments = ["--backbone_config", json.dumps(VIT), "--train_batch_size", "16", "--dataset_name", "/secret/<u>"]
    load_recipe("quickstart", arguments).save(folder / "recipe.yaml")
    (folder / "checkpoint-40").mkdir()
    state = {"step": 40, "global_batch_size": 8, "steps_per_epoch": 4, "total_steps": 40, "num_processes": 2}
    (folder / "checkpoint-40" / "state.json").write_text(json.dumps({"run": state}))
    thrown_away = list(lines(25, 25, loss=1.9, grad_norm=30.0))
    written = [*lines(5, 20), *thrown_away, *lines(25, 40, gradient_spikes=1, skipped_steps=1)]
    write_lines(folder / "metrics.jsonl", written)
    write_lines(folder / "knn.jsonl", [{"step": step, "epoch": 1, "knn_top1": step / 50} for step in (10, 20, 40)])
    events = [
        {"step": 17, "event": "spike", "grad_norm": 25.0, "times_usual": 12.0},
        {"step": 19, "event": "skipped", "grad_norm": None},
        {"step": 27, "event": "rollback", "to_step": 20, "skipped_batches": 7, "reason": "<i>loss</i>"},
    ]
    write_lines(folder / "events.jsonl", events)
    result = {
        "task": "knn",
        "date": "2026-01-02T03:04:05+00:00",
        "dataset": {"name": "<em>set</em>", "split": "test"},
        "metrics": {"knn20_top1": 0.815, "effective_rank": 5.5, "per_class": {"ant": 1.0}},
        "settings": {},
        "versions": {"python": "3.11.0", "torch": "2.14.0"},
        "hardware": {"cpu": "a cpu", "cpu_count": 2},
    }
    (folder / "results.json").write_text(json.dumps({"format": 1, "results": [result]}))
    return folder


def save_classifier(folder, backbone, names, seed=0):
    torch.manual_seed(seed)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    model = MoCoV3ForImageClassification(MoCoV3Config(backbone_config=dict(backbone), **labels))
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    build_image_processor(32).save_pretrained(folder)
    return folder


def save_trained_classifier(folder):
    """A ViT with a random head for the three classes, in another order, and the lines of its training."""
    save_classifier(folder, VIT, NAMES[::-1])
    written = [{"step": 5, "epoch": 0.5, "loss": 1.2, "learning_rate": 0.1}]
    written += [{"step": 10, "epoch": 1.0, "loss": 0.9, "learning_rate": 0.05}]
    written += [{"step": 10, "epoch": 1.0, "eval_top1": 0.7, "eval_top1_ema": 0.6}]
    written += [{"step": 20, "epoch": 2.0, "eval_top1": 0.6, "eval_top1_ema": 0.75}]
    write_lines(folder / "metrics.jsonl", written)
    return folder
