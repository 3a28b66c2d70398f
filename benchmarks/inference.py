"""Speed of `ImageClassifier` and `FeatureExtractor` on one CPU core, compared with the transformers pipelines.

    python benchmarks/inference.py [--images DIR] [--models vit_small resnet50] [--output FILE.json]

Random weights and JPEG files (those of photos.py without --images). All variants process the same files and alternate
round by round. Reported are CPU time per image (median and range) and ratios within a round. The limit is measured in
the same rounds: decoding alone, plus the model's multiply-adds at the rate of a large matrix product in the same
precision. The results are compared with the pipeline's. The last line is the result as JSON.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from photos import make_photos
from step import cpu_name

import mocov3_hf  # noqa: F401  (registers the models)
from mocov3_hf import MoCoV3Config, MoCoV3ForImageClassification
from mocov3_hf.inference import FeatureExtractor, ImageClassifier
from mocov3_hf.inference.images import decode, find_images
from mocov3_hf.pretraining.estimate import multiply_adds
from mocov3_hf.processing import build_image_processor


BACKBONES = {
    "vit_small": {
        "model_type": "mocov3_vit",
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "resnet50": {"model_type": "resnet", "depths": [3, 4, 6, 3]},
}
GEMM_SIZE = 1024
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def save_model(name: str, folder: Path) -> tuple[str, int]:
    """Save a 1000-class classifier with random weights; returns its folder and the multiply-adds per image."""
    torch.manual_seed(0)
    model = MoCoV3ForImageClassification(
        MoCoV3Config(backbone_config=BACKBONES[name], num_labels=1000, zero_init_residual=False)
    )
    torch.nn.init.normal_(model.classifier.weight, std=0.05)
    model.save_pretrained(folder / name)
    build_image_processor().save_pretrained(folder / name)
    with torch.no_grad():
        return str(folder / name), multiply_adds(model.eval(), torch.zeros(1, 3, 224, 224))


def make_variants(folder: str, task: str, batch_size: int) -> dict:
    """The variants by name; each is a function of a list of files."""
    if task == "classification":
        pipeline, options, ours = transformers.pipeline("image-classification", model=folder), {}, ImageClassifier
    else:
        pipeline = transformers.pipeline("image-feature-extraction", model=folder)
        options, ours = {"pool": True}, FeatureExtractor
    predictors = {dtype: ours(folder, dtype=dtype, num_workers=0, device="cpu") for dtype in DTYPES}
    return {
        "pipeline": lambda files: pipeline(files, **options),
        f"pipeline, batch_size={batch_size}": lambda files: pipeline(files, batch_size=batch_size, **options),
        **{f"ours, {dtype}": predictor for dtype, predictor in predictors.items()},
    }


def limits() -> dict:
    """Matrix products that measure the hardware limit, by precision."""
    found = {}
    for name, dtype in DTYPES.items():
        a, b = torch.randn(2, GEMM_SIZE, GEMM_SIZE).to(dtype)
        found[name] = lambda _, a=a, b=b: a @ b
    return found


def measure(variants: dict, files: list[str], rounds: int, label: str) -> dict[str, list[float]]:
    """CPU seconds of every variant. The order alternates; the first round is a warm-up."""
    seconds = {name: [] for name in variants}
    for index in range(rounds + 1):
        for name in list(variants)[:: 1 if index % 2 else -1]:
            start = time.process_time()
            variants[name](files)
            if index:
                seconds[name].append(time.process_time() - start)
        print(f"{label}: round {index}/{rounds}", file=sys.stderr, flush=True)
    return seconds


def summary(values: list[float], scale: float = 1.0) -> dict:
    values = sorted(scale * value for value in values)
    return {"median": statistics.median(values), "min": values[0], "max": values[-1]}


def agreement(task: str, found, expected) -> dict[str, float]:
    """Agreement with the pipeline: first labels and their scores of a classifier, or distance of features."""
    if task == "features":
        expected = torch.tensor(expected).flatten(1)
        return {"relative_distance": (torch.linalg.norm(found - expected) / torch.linalg.norm(expected)).item()}
    pairs = [(ours[0], theirs[0]) for ours, theirs in zip(found, expected, strict=True)]
    return {
        "same_first_label": statistics.fmean(ours["label"] == theirs["label"] for ours, theirs in pairs),
        "largest_score_difference": max(abs(ours["score"] - theirs["score"]) for ours, theirs in pairs),
    }


def run(name: str, task: str, files: list[str], rounds: int, batch_size: int, folder: Path) -> dict:
    path, macs = save_model(name, folder)
    variants = make_variants(path, task, batch_size)
    expected = variants["pipeline"](files)
    prepare = ImageClassifier(path, dtype="float32", device="cpu").preprocessing.prepare
    extra = {f"gemm {dtype}": product for dtype, product in limits().items()}
    extra["decode and crop"] = lambda files: [prepare(decode(file)) for file in files]
    with torch.inference_mode():
        seconds = measure(variants | extra, files, rounds, f"{name} {task}")
    count = len(files)
    decoding = statistics.median(seconds["decode and crop"]) / count
    result = {"model": name, "task": task, "gmacs_per_image": macs / 1e9, "images": count, "variants": {}}
    result["decode_ms_per_image"] = 1e3 * decoding
    for variant in variants:
        ratios = [a / b for a, b in zip(seconds["pipeline"], seconds[variant], strict=True)]
        entry = {"ms_per_image": summary(seconds[variant], 1e3 / count), "times_the_pipeline": summary(ratios)}
        if variant.startswith("ours"):
            gemm = statistics.median(seconds[f"gemm {variant.split()[-1]}"])
            rate = 2 * GEMM_SIZE**3 / gemm
            limit = decoding + 2 * macs / rate
            entry |= {"gemm_gflops": rate / 1e9, "limit_ms_per_image": 1e3 * limit}
            entry["fraction_of_limit"] = limit * count / statistics.median(seconds[variant])
            entry["agreement"] = agreement(task, variants[variant](files), expected)
        result["variants"][variant] = entry
        spread = entry["times_the_pipeline"]
        print(
            f"{name} {task} {variant}: {entry['ms_per_image']['median']:.1f} ms per image, {spread['median']:.2f}×"
            f" the pipeline ({spread['min']:.2f} to {spread['max']:.2f})"
            + (f", {entry['fraction_of_limit']:.0%} of the limit" if "fraction_of_limit" in entry else ""),
            flush=True,
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="folder of images")
    parser.add_argument("--models", nargs="+", choices=list(BACKBONES), default=list(BACKBONES))
    parser.add_argument("--tasks", nargs="+", choices=["classification", "features"], default=["classification"])
    parser.add_argument("--num_images", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=8, help="batch size of the batched pipeline")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", help="file to which the JSON is written as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.images is None:
            make_photos(folder / "photos", options.num_images)
        files = find_images(options.images or folder / "photos")[: options.num_images]
        result = {
            "device": f"one core of {cpu_name()}",
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "points": [
                run(model, task, files, options.rounds, options.batch_size, folder)
                for model in options.models
                for task in options.tasks
            ],
        }
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
