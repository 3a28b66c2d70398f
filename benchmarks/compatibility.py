"""What other libraries do to a classifier's logits: LoRA, device maps, compilation, half precision and quantization.

    pip install peft torchao bitsandbytes
    python -m benchmarks.compatibility [--output benchmarks/results/compatibility_cpu.json]

A ViT-S classifier of 1000 classes with random weights, four noise images, on a CPU. Recorded are the smallest cosine
similarity with the logits of the float32 model, and the largest difference. A library that is not installed is
skipped. The table of docs/interop.md shows these numbers. The last line is JSON.
"""

import argparse
import copy
import platform
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from mocov3_hf import MoCoV3Config, MoCoV3ForImageClassification, MoCoV3ViTConfig

from .data_path import finish
from .limits import cpu_name


PACKAGES = ("torch", "transformers", "accelerate", "peft", "torchao", "bitsandbytes")
LARGE = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 1536}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}


def lora(model: nn.Module, _: Path) -> nn.Module:
    """With trained adapters, merged: compared with the adapted model instead of the plain one."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    merged = copy.deepcopy(adapted).merge_and_unload()
    merged.reference = adapted.forward
    return merged


def device_map(_: nn.Module, folder: Path) -> nn.Module:
    offload = str(folder / "offload")
    memory = {"cpu": sum(path.stat().st_size for path in folder.glob("*.safetensors")) // 2}
    return MoCoV3ForImageClassification.from_pretrained(
        folder, device_map="auto", max_memory=memory, offload_folder=offload
    )


def quantized(name: str) -> Callable:
    def quantize(model: nn.Module, _: Path) -> nn.Module:
        from torchao import quantization

        model = copy.deepcopy(model)
        quantization.quantize_(model, getattr(quantization, name)())
        return model

    return quantize


def bitsandbytes(**settings) -> Callable:
    def load(_: nn.Module, folder: Path) -> nn.Module:
        from transformers import BitsAndBytesConfig

        return MoCoV3ForImageClassification.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**settings))

    return load


def in_half(dtype: torch.dtype) -> Callable:
    return lambda _, folder: MoCoV3ForImageClassification.from_pretrained(folder, dtype=dtype)


WAYS: dict[str, tuple[str, Callable]] = {
    "PEFT LoRA": ("peft", lora),
    'device_map="auto"': ("accelerate", device_map),
    "torch.compile(fullgraph=True)": ("torch", lambda model, _: torch.compile(model, fullgraph=True)),
    "torch.bfloat16": ("torch", in_half(torch.bfloat16)),
    "torch.float16": ("torch", in_half(torch.float16)),
    "Int8WeightOnlyConfig": ("torchao", quantized("Int8WeightOnlyConfig")),
    "Int8DynamicActivationInt8WeightConfig": ("torchao", quantized("Int8DynamicActivationInt8WeightConfig")),
    "bitsandbytes 8-bit": ("bitsandbytes", bitsandbytes(load_in_8bit=True)),
    "bitsandbytes 4-bit": (
        "bitsandbytes",
        bitsandbytes(load_in_4bit=True, llm_int8_skip_modules=["classifier"]),
    ),
}


def logits(model: Callable, pixels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values=pixels.to(dtype)).logits.float().cpu()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="those to try")
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--output", help="file to which the JSON is written as well")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    backbone = MoCoV3ViTConfig(**(TINY if options.quick else LARGE))
    model = MoCoV3ForImageClassification(MoCoV3Config(backbone_config=backbone, num_labels=1000)).eval()
    pixels = torch.randn(4, 3, backbone.image_size, backbone.image_size)
    plain, rows, versions = logits(model, pixels), {}, {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for way in options.ways:
            package, prepare = WAYS[way]
            if package not in versions:
                rows[way] = {"skipped": f"{package} is not installed"}
                continue
            other = prepare(model, Path(folder)).eval()
            reference = logits(other.reference, pixels) if hasattr(other, "reference") else plain
            found = logits(other, pixels, getattr(other, "dtype", torch.float32))
            rows[way] = {
                "cosine": torch.cosine_similarity(found, reference).min().item(),
                "largest_difference": (found - reference).abs().max().item(),
            }
            print(f"{way}: {rows[way]}", file=sys.stderr)
    result = {"quick": options.quick, "device": cpu_name(), "python": platform.python_version(), "versions": versions}
    finish({**result, "rows": rows}, options.output)


if __name__ == "__main__":
    main()
