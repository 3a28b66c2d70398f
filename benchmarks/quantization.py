"""Speed and error of torch.export, bfloat16 and int8 on one CPU core, measured in alternation.

    pip install torchao "mocov3_hf[export]"
    python benchmarks/quantization.py [--encoder FOLDER --dataset_name DATA] [--output FILE.json]

Speed: random weights of ViT-S/16 and ResNet-50 at 224 pixels; every variant runs on the same pixels, round by round in
alternating order. Reported are CPU time per image (median and range) and ratios to float32 within a round. Error: the
features of a trained encoder, `--encoder`, on images of `--dataset_name`: cosine similarity to those of float32, and
how often the nearest-neighbor class is the same. The last line is the result as JSON.

- int8 weights: torchao's `Int8WeightOnlyConfig` on the linear layers, which compute in float32.
- int8 dynamic: torchao's `Int8DynamicActivationInt8WeightConfig`, which also computes the linear layers in int8.
- int8 onnxruntime: `quantize_dynamic` for a ViT, `quantize_static` with `--calibration_images` images for a ResNet, of
  which torchao leaves the convolutions as they are.
"""

import argparse
import copy
import json
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import onnxruntime
import torch
import transformers
from inference import BACKBONES, summary
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from step import cpu_name
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

from mocov3_hf import MoCoV3Config, MoCoV3Model
from mocov3_hf.data.labeled import open_labeled
from mocov3_hf.interop.export import export_model
from mocov3_hf.loading import load_encoder, load_processor
from mocov3_hf.metrics import knn_predict
from mocov3_hf.processing import ProcessorTransform, build_image_processor


TORCHAO = {
    "int8 weights, torchao": Int8WeightOnlyConfig,
    "int8 dynamic, torchao": Int8DynamicActivationInt8WeightConfig,
}


class Calibration(CalibrationDataReader):
    """Batches of pixel values for `quantize_static`."""

    def __init__(self, pixel_values: torch.Tensor):
        self.batches = iter(pixel_values.split(8))

    def get_next(self):
        batch = next(self.batches, None)
        return None if batch is None else {"pixel_values": batch.numpy()}


def session_of(path: Path):
    """A function of pixel values that runs an ONNX file on one core."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])


def variants_of(folder: Path, work: Path, calibration: torch.Tensor) -> dict:
    """The variants by name; each is a function from pixel values (B, C, H, W) to features (B, D) float32."""
    model = load_encoder(folder, dtype=torch.float32)

    def features(module: nn.Module, dtype=torch.float32):
        return lambda pixels: module(pixels.to(dtype)).pooler_output.flatten(1).float()

    found = {"float32": features(model), "bfloat16": features(copy.deepcopy(model).bfloat16(), torch.bfloat16)}
    for name, config in TORCHAO.items():
        quantized = copy.deepcopy(model)
        quantize_(quantized, config())
        found[name] = features(quantized)
    export_model(folder, work / "program", "torch_export")
    found["float32, torch.export"] = torch.export.load(work / "program" / "model.pt2").module()
    export_model(folder, work / "onnx", "onnx")
    path = work / "onnx" / "model.onnx"
    found["float32, onnxruntime"] = session_of(path)
    if model.config.backbone_config.model_type == "resnet":
        quant_pre_process(str(path), str(work / "prepared.onnx"))
        reader = Calibration(calibration)
        quantize_static(work / "prepared.onnx", work / "int8.onnx", reader, QuantFormat.QDQ, per_channel=True)
        found["int8 static, onnxruntime"] = session_of(work / "int8.onnx")
    else:
        quantize_dynamic(path, work / "int8.onnx")
        found["int8 dynamic, onnxruntime"] = session_of(work / "int8.onnx")
    return found


@torch.inference_mode()
def measure(variants: dict, batch_size: int, rounds: int, label: str) -> dict:
    """CPU milliseconds per image of every variant. The first round is a warm-up."""
    pixels = torch.randn(batch_size, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(rounds + 1):
        for name in list(variants)[:: 1 if index % 2 else -1]:
            start = time.process_time()
            variants[name](pixels)
            if index:
                seconds[name].append(time.process_time() - start)
        print(f"{label}: round {index}/{rounds}", file=sys.stderr, flush=True)
    result = {}
    for name, values in seconds.items():
        ratios = [ours / plain for ours, plain in zip(values, seconds["float32"], strict=True)]
        result[name] = {"ms_per_image": summary(values, 1e3 / batch_size), "times_float32": summary(ratios)}
        print(f"{label} {name}: {result[name]['times_float32']['median']:.2f} times float32", flush=True)
    return result


@torch.inference_mode()
def errors(folder: Path, dataset_name: str, num_images: int, work: Path) -> dict:
    """How features of a trained encoder differ from float32, and what that does to a nearest-neighbor classifier."""
    images = open_labeled(dataset_name, split="test")
    transform = ProcessorTransform(load_processor(folder, load_encoder(folder).config))
    pixels = torch.stack([transform(images.decode(row)) for row in range(num_images)])
    labels, half = torch.as_tensor(images.labels[:num_images]), num_images // 2
    variants = variants_of(folder, work, pixels[:64])
    result = {}
    plain = predicted = None
    for name, run in variants.items():
        found = torch.cat([run(part) for part in pixels.split(50)])
        best = knn_predict(found[half:], found[:half], labels[:half], 20)[20][:, 0]
        plain, predicted = (found, best) if plain is None else (plain, predicted)
        cosine = torch.cosine_similarity(found, plain)
        result[name] = {
            "cosine_mean": cosine.mean().item(),
            "cosine_min": cosine.min().item(),
            "same_class": (best == predicted).double().mean().item(),
            "knn20_top1": (best == labels[half:]).double().mean().item(),
        }
        print(f"{name}: {json.dumps(result[name])}", flush=True)
    return {"images": num_images, "bank": half, "variants": result}


def save_encoder(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    MoCoV3Model(MoCoV3Config(backbone_config=BACKBONES[name])).save_pretrained(folder)
    build_image_processor().save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=list(BACKBONES), default=list(BACKBONES))
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--encoder", type=Path, help="trained encoder of which the error is measured")
    parser.add_argument("--dataset_name", help="labeled images for the error")
    parser.add_argument("--num_images", type=int, default=2000)
    parser.add_argument("--calibration_images", type=int, default=8)
    parser.add_argument("--output", help="file to which the JSON is written as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    result = {
        "device": f"one core of {cpu_name()}",
        "versions": {name: version(name) for name in ("torch", "torchao", "onnxruntime", "transformers")},
        "python": platform.python_version(),
        "speed": [],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.encoder is not None:
            result["error"] = errors(options.encoder, options.dataset_name, options.num_images, folder / "error")
        for model in options.models:
            saved = save_encoder(model, folder / model)
            noise = torch.randn(options.calibration_images, 3, 224, 224)
            variants = variants_of(saved, folder / f"{model} work", noise)
            for batch_size in options.batch_sizes:
                label = f"{model} batch {batch_size}"
                measured = measure(variants, batch_size, options.rounds, label)
                result["speed"].append({"model": model, "batch_size": batch_size, "variants": measured})
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
