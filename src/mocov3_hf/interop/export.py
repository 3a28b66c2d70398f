"""The command `mocov3 export`: models for other libraries, each verified against the outputs of ours."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers.utils import CONFIG_NAME

from ..loading import load_classifier, load_config, load_encoder, load_processor, quiet_transformers
from ..model.configuration_mocov3 import MoCoV3Config
from ..model.modeling_mocov3 import MoCoV3ForImageClassification, MoCoV3Model
from ..new_folder import check_new_folder
from ..options import Command, option, parse
from ..problem_types import REGRESSION
from ..reporting import RunError, reporting
from ..requirements import require_packages
from ..storage import atomic_folder
from .export_native import write_resnet, write_vit
from .export_programs import image_shape, output_name, write_onnx, write_torch_export
from .export_timm import write_timm
from .layouts import ConversionError


# Legend of dimensions: B batch, C H W image.

MAX_ERROR = 1e-4

Run = Callable[[torch.Tensor], torch.Tensor]
# A writer fills a folder. It returns a function that runs what it wrote on pixel values (B, C, H, W), and a line of
# Python that loads it.
WRITERS = {
    "vit": write_vit,
    "resnet": write_resnet,
    "timm": write_timm,
    "onnx": write_onnx,
    "torch_export": write_torch_export,
}


@dataclass(frozen=True)
class Exported:
    """
    What was exported.

    Attributes:
        format: A key of `WRITERS`.
        outputs: The output that was compared: `"logits"` or `"pooler_output"`.
        max_error: Largest absolute difference from our model's output; of a regression, whose targets have units,
            relative to the largest output of each target.
        usage: A line of Python that loads the export.
    """

    format: str
    outputs: str
    max_error: float
    usage: str


def export_model(
    model: str | Path, output_dir: str | Path, format: str, *, overwrite: bool = False, revision: str | None = None
) -> Exported:
    """
    Export a model to another library's format. The new folder appears complete and verified, or not at all.

    Args:
        model (`str` or `Path`):
            A folder, Hub id or published name of a classifier, an encoder or a pre-training model, whose encoder is
            exported.
        output_dir (`str` or `Path`):
            A new or empty folder, or with `overwrite` one to replace.
        format (`str`):
            `"vit"` or `"resnet"` (transformers' own classes), `"timm"`, `"onnx"` or `"torch_export"`.
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub model.

    Raises:
        ValueError: No such model, one that the format cannot hold, or an output folder that exists.
        MissingPackageError: `"onnx"` without the extra `export`.
        RunError: Outputs that differ from the model's by more than 1e-4.
    """
    if format not in WRITERS:
        raise ConversionError(f"unknown format {format!r}, expected one of {', '.join(WRITERS)}")
    check_new_folder(output_dir, overwrite, CONFIG_NAME, [model])
    if format == "onnx":  # torch exports with onnxscript
        modules = ("onnx", "onnxruntime", "onnxscript")
        require_packages("--format onnx", "export", {name: name for name in modules})
    options = {} if revision is None else {"revision": revision}
    loaded = load_for_export(model, **options)
    processor = load_processor(model, loaded.config, **options)
    with atomic_folder(output_dir, replace=overwrite) as folder:
        run, usage = WRITERS[format](loaded, processor, folder)
        max_error = largest_difference(loaded, run, image_shape(loaded, processor))
        if not max_error <= MAX_ERROR:
            raise RunError(
                f"the {format} export is not written: its outputs differ from the model's by {max_error:.2e}, allowed"
                f" is {MAX_ERROR:.0e}"
            )
    return Exported(format, output_name(loaded), max_error, usage.replace(str(folder), str(output_dir)))


def load_for_export(model: str | Path, **options: str) -> MoCoV3Model | MoCoV3ForImageClassification:
    """
    A classifier, or the encoder of any other model, in float32 and evaluation mode.

    Raises:
        ValueError: No such model, or not a model of this package.
    """
    config = load_config(model, **options)
    if not isinstance(config, MoCoV3Config):
        raise ConversionError(f"{str(model)!r} is a model of type {config.model_type!r}, expected 'mocov3'")
    is_classifier = (config.architectures or [""])[0] == MoCoV3ForImageClassification.__name__
    return (load_classifier if is_classifier else load_encoder)(model, dtype=torch.float32, **options)


@torch.no_grad()
def largest_difference(model: torch.nn.Module, run: Run, shape: tuple[int, int, int]) -> float:
    """`max_error` of `Exported` on noise (C, H, W), over batches of 1 and 3; nan if not finite."""
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for batch_size in (1, 3):
        images = torch.randn(batch_size, *shape, generator=generator)
        expected = model(images)[output_name(model)]
        actual = run(images)
        if actual.shape != expected.shape:
            raise RunError(f"the export returns shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
        if not torch.isfinite(actual).all():
            return float("nan")
        errors = (actual - expected).abs()
        if output_name(model) == "logits" and model.config.problem_type == REGRESSION:
            errors = errors / expected.abs().amax(dim=0)
        largest = max(largest, float(errors.max()))
    return largest


# The command


@dataclass(frozen=True)
class ModelOptions:
    """Model"""

    model: str = option(help="Model to export: a folder, a Hub id or a published name.", metavar="MODEL")
    model_revision: str | None = option(None, "Branch, tag or commit of a Hub model.", old=("revision",))


@dataclass(frozen=True)
class OutputOptions:
    """Output"""

    format: Literal["vit", "resnet", "timm", "onnx", "torch_export"] = option(
        help="What to write: transformers' own ViT or ResNet, timm, ONNX, or a program of torch.export.",
    )
    output_dir: str = option(help="New folder; it appears complete and verified, or not at all.", metavar="DIR")
    overwrite_output_dir: bool = option(False, "Replace --output_dir if it exists.", old=("overwrite",))


COMMAND = Command(
    "export",
    "Export a model to another library, verified against its outputs.",
    (ModelOptions, OutputOptions),
    positional="model",
)


def main(arguments: Iterable[str]) -> None:
    """The command `mocov3 export MODEL --format FORMAT --output_dir DIR`."""
    with reporting():
        model, output = parse(COMMAND, arguments)
        with quiet_transformers(progress=False):
            exported = export_model(
                model.model,
                output.output_dir,
                output.format,
                overwrite=output.overwrite_output_dir,
                revision=model.model_revision,
            )
        print(
            f"{exported.format} export: {output.output_dir}, max error of {exported.outputs} {exported.max_error:.2e}"
        )
        print(exported.usage)
