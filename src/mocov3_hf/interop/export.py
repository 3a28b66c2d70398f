"""The command `scripts/export.py`: models out of this package, each verified on the spot against what went in."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor
from transformers.utils import logging

from ..model.configuration_mocov3 import MoCoV3Config, to_pair
from ..model.modeling_mocov3 import MoCoV3ForImageClassification, MoCoV3Model
from ..processing import build_image_processor
from .errors import CheckpointError
from .export_native import write_resnet, write_vit
from .export_programs import image_shape, write_onnx, write_torch_export
from .export_timm import write_timm
from .folders import atomic_folder


# Legend of dimensions: B batch, C H W image, D width of the pooled vector.

MAX_ERROR = 1e-4

Run = Callable[[torch.Tensor], torch.Tensor]
# A writer fills a folder and gives back how to run what it wrote, on pixel values (B, C, H, W), and how to use it.
WRITERS = {
    "vit": write_vit,
    "resnet": write_resnet,
    "timm": write_timm,
    "onnx": write_onnx,
    "torch_export": write_torch_export,
}


@dataclass(frozen=True)
class Exported:
    """What was exported: `max_error` is the largest difference of an output from our model's."""

    format: str
    outputs: str
    max_error: float
    usage: str


def export_model(
    path: str | Path, output_dir: str | Path, format: str, *, overwrite: bool = False, revision: str | None = None
) -> Exported:
    """
    Export a model folder to another library's form; the new folder appears whole and verified, or not at all.

    Args:
        path (`str` or `Path`):
            A folder or Hub repository of a classifier, an encoder or a whole pre-training model, of which the encoder
            is exported.
        output_dir (`str` or `Path`):
            A new or empty folder, or with `overwrite` one to replace.
        format (`str`):
            `"vit"`, `"resnet"` (transformers' own classes), `"timm"`, `"onnx"` or `"torch_export"`.
        revision (`str`, *optional*):
            Of a Hub repository.

    Raises:
        CheckpointError: no such model, one that the format cannot hold, or outputs that differ by more than 1e-4.
    """
    if format not in WRITERS:
        raise CheckpointError(f"unknown format {format!r}, expected one of {sorted(WRITERS)}")
    model = load_for_export(path, revision)
    processor = load_processor(path, model.config, revision)
    with atomic_folder(output_dir, overwrite) as folder:
        run, usage = WRITERS[format](model, processor, folder)
        max_error = largest_difference(model, run, image_shape(model, processor))
        if not max_error <= MAX_ERROR:
            raise CheckpointError(
                f"the {format} export differs from the model by {max_error:.2e} and is not written: allowed are"
                f" {MAX_ERROR:.0e}"
            )
    usage = usage.replace(str(folder), str(output_dir))
    return Exported(format, output_name(model), max_error, usage)


def load_for_export(path: str | Path, revision: str | None = None) -> MoCoV3Model | MoCoV3ForImageClassification:
    """
    The classifier of a folder, or else its encoder, in float32 and evaluation mode.

    Raises:
        CheckpointError: no such folder, or no model of this package in it.
    """
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no model folder: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(config, MoCoV3Config):
        raise CheckpointError(f"{path} holds a model of type {config.model_type!r}, expected 'mocov3'")
    classifier = (config.architectures or [""])[0] == MoCoV3ForImageClassification.__name__
    model_class = MoCoV3ForImageClassification if classifier else MoCoV3Model
    try:
        model, info = model_class.from_pretrained(
            path, revision=revision, dtype=torch.float32, output_loading_info=True
        )
    except OSError as error:
        raise CheckpointError(f"{path} has no weights: {' '.join(str(error).split())[:200]}") from error
    if info["missing_keys"]:
        raise CheckpointError(f"{path} lacks weights: {', '.join(sorted(info['missing_keys'])[:8])}")
    return model.eval()


def load_processor(path: str | Path, config: MoCoV3Config, revision: str | None = None) -> BaseImageProcessor:
    try:
        return AutoImageProcessor.from_pretrained(path, revision=revision)
    except OSError:
        return build_image_processor(max(to_pair(getattr(config.backbone_config, "image_size", 224))))


def output_name(model: torch.nn.Module) -> str:
    return "logits" if isinstance(model, MoCoV3ForImageClassification) else "pooler_output"


@torch.no_grad()
def largest_difference(model: torch.nn.Module, run: Run, shape: tuple[int, int, int]) -> float:
    """Largest absolute difference of the outputs on noise of `(C, H, W)`, over batches of several sizes."""
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for batch_size in (1, 3):
        images = torch.randn(batch_size, *shape, generator=generator)
        expected = model(images)[output_name(model)]
        actual = run(images)
        if actual.shape != expected.shape:
            raise CheckpointError(f"the export gives {tuple(actual.shape)}, expected {tuple(expected.shape)}")
        largest = max(largest, float((actual - expected).abs().max()))
        if not torch.isfinite(actual).all():
            return float("nan")
    return largest


def main(argv: list[str] | None = None) -> int:
    """Run the command; gives back its exit status. Errors are one line on stderr."""
    parser = argparse.ArgumentParser(description="Export a MoCo v3 model, verified against its outputs.")
    parser.add_argument("path", metavar="PATH", help="a model folder or a Hub repository")
    parser.add_argument("--format", required=True, choices=list(WRITERS), help="what to write")
    parser.add_argument("--output_dir", required=True, help="the new folder; it appears whole or not at all")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--overwrite", action="store_true", help="replace --output_dir where it exists")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        exported = export_model(
            args.path, args.output_dir, args.format, overwrite=args.overwrite, revision=args.revision
        )
    except CheckpointError as error:
        print(f"export: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"{exported.format} in {args.output_dir}: max error of {exported.outputs} {exported.max_error:.2e}")
    print(exported.usage)
    return 0
