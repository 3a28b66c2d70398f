"""Export to programs that run without the model's Python code: ONNX and `torch.export`, with a dynamic batch."""

import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import BaseImageProcessor

from ..model.configuration_mocov3_vit import to_pair
from ..model.image_processing_mocov3 import MoCoV3ImageProcessor
from ..model.modeling_mocov3 import MoCoV3ForImageClassification, MoCoV3Model
from ..reporting import warn


# Legend of dimensions: B batch, C H W image.

# Steps of image processors that the metadata describe.
KNOWN_STEPS = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}


def output_name(model: nn.Module) -> str:
    """The output of a model that an export has."""
    return "logits" if isinstance(model, MoCoV3ForImageClassification) else "pooler_output"


class OneOutput(nn.Module):
    """The model as a function from pixel values (B, C, H, W) to logits or pooled features."""

    def __init__(self, model: MoCoV3Model | MoCoV3ForImageClassification):
        super().__init__()
        self.model = model
        self.output = output_name(model)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values)[self.output]


def image_shape(model: nn.Module, processor: BaseImageProcessor) -> tuple[int, int, int]:
    """(C, H, W) of the images that a model takes: a ViT's own size; the processor's crop for other backbones."""
    crop = processor.crop_size
    size = model.config.image_size or (crop["height"], crop["width"])
    return (model.config.num_channels or 3, *to_pair(size))


def preprocessing_metadata(model: nn.Module, processor: BaseImageProcessor) -> dict[str, str]:
    """
    What a program needs to know to run on images, as JSON by key; docs/interop.md explains the keys.

    A processor that does anything else than these steps has only its class under `image_processor`, with a warning.
    """
    settings = json.loads(processor.to_json_string())
    name, size = settings["image_processor_type"], settings.get("size") or {}
    is_ours = name == MoCoV3ImageProcessor.__name__
    scaling = ["scale"] if is_ours or settings.get("do_rescale") else []
    fitting = [step for step in ("resize", "center_crop") if settings.get(f"do_{step}")]
    steps = [*scaling, *fitting] if is_ours else [*fitting, *scaling]
    pixel_range = settings.get("pixel_range") if is_ours else [0, 1 / (settings.get("rescale_factor") or 1)]
    found = {
        "image_processor": name,
        "num_channels": image_shape(model, processor)[0],
        "image_size": image_shape(model, processor)[1:],
        "steps": [*steps, *(["normalize"] if settings.get("do_normalize") else [])],
        "resize": size,
        "resample": {2: "bilinear", 3: "bicubic"}.get(settings.get("resample")),
        "center_crop": settings.get("crop_size"),
        "pixel_range": pixel_range,
        "nodata": settings.get("nodata"),
        "image_mean": settings.get("image_mean"),
        "image_std": settings.get("image_std"),
    }
    others = {key for key, value in settings.items() if key.startswith("do_") and value is True} - KNOWN_STEPS
    is_known = size.keys() in ({"shortest_edge"}, {"height", "width"}) and found["resample"] is not None
    if others or "crop_pct" in settings or ("resize" in steps and not is_known):
        warn(f"{name} does more than resize, crop and normalize: the export has no metadata for preprocessing")
        found = {"image_processor": name}
    found["output"] = output_name(model)
    if isinstance(model, MoCoV3ForImageClassification):
        found["labels"] = [model.config.id2label[number] for number in range(model.config.num_labels)]
    return {key: json.dumps(value) for key, value in found.items()}


def trace(
    model: MoCoV3Model | MoCoV3ForImageClassification, processor: BaseImageProcessor
) -> torch.export.ExportedProgram:
    """The model's graph for any batch size."""
    images = torch.zeros(2, *image_shape(model, processor))
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=65536)}}
    with quiet():
        # strict: the non-strict tracer makes `len(tensor)` a constant
        return torch.export.export(OneOutput(model), (images,), dynamic_shapes=shapes, strict=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the deprecation warnings and progress lines of the exporters, which are about their own code."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)


def write_onnx(
    model: MoCoV3Model | MoCoV3ForImageClassification, processor: BaseImageProcessor, folder: Path
) -> tuple:
    """`model.onnx`, checked with onnx and run with onnxruntime."""
    import onnx
    import onnxruntime

    path, output = folder / "model.onnx", output_name(model)
    with quiet():
        program = torch.onnx.export(
            trace(model, processor), dynamo=True, input_names=["pixel_values"], output_names=[output], verbose=False
        )
        name_batch(program)
        program.model.metadata_props.update(preprocessing_metadata(model, processor))
        program.save(path)
    onnx.checker.check_model(path)
    save_settings(model, processor, folder)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run([output], {"pixel_values": pixel_values.numpy()})[0])

    return run, f"onnxruntime.InferenceSession({str(path)!r}).run([{output!r}], {{'pixel_values': images}})"


def name_batch(program: torch.onnx.ONNXProgram) -> None:
    """Name the dynamic dimension `batch`, where the exporter keeps the tracer's symbol."""
    graph = program.model.graph
    symbol = str(graph.inputs[0].shape[0])
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    for value in values:
        for index, size in enumerate(value.shape or ()):
            if not isinstance(size, int):
                value.shape[index] = re.sub(rf"\b{symbol}\b", "batch", str(size))


def write_torch_export(
    model: MoCoV3Model | MoCoV3ForImageClassification, processor: BaseImageProcessor, folder: Path
) -> tuple:
    """`model.pt2`, a program of `torch.export`."""
    path = folder / "model.pt2"
    with quiet():
        metadata = json.dumps(preprocessing_metadata(model, processor))
        torch.export.save(trace(model, processor), path, extra_files={"metadata.json": metadata})
        loaded = torch.export.load(path).module()
    save_settings(model, processor, folder)

    def run(pixel_values: torch.Tensor) -> torch.Tensor:
        return loaded(pixel_values)

    return run, f"torch.export.load({str(path)!r}).module()(images)"


def save_settings(model: nn.Module, processor: BaseImageProcessor, folder: Path) -> None:
    """Save the processor and the configuration, with the labels, beside the program."""
    processor.save_pretrained(folder)
    model.config.save_pretrained(folder)
