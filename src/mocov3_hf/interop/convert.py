"""The command `mocov3 convert`: a checkpoint of another codebase becomes a verified model folder."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils import CONFIG_NAME

from .._version import __version__
from ..hub.remote_code import add_code
from ..loading import progress_bars
from ..new_folder import check_new_folder
from ..options import Command, option, parse
from ..processing import PixelFormat, build_image_processor
from ..reporting import RunError, reporting, warn
from ..run_folder import CONVERSION
from ..storage import atomic_folder, sha256_of, write_json
from ..zoo import at_mirror, checked_hash, convert_entry, convert_url, downloads_folder, find_entry, list_zoo, load_zoo
from .checkpoints import Converted, convert_state_dict, is_finite
from .files import read_checkpoint, read_labels
from .layouts import LAYOUTS, ConversionError


def convert_checkpoint(
    file: str | Path,
    output_dir: str | Path,
    *,
    entry: str | None = None,
    layout: str | None = None,
    stage: str | None = None,
    epochs: int | None = None,
    labels: str | Path | list[str] | None = None,
    default_labels: str | None = None,
    overwrite: bool = False,
    with_code: bool = False,
    origin: dict[str, str] | None = None,
    pixel_range: list[float] | None = None,
    image_mean: list[float] | None = None,
    image_std: list[float] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """
    Convert a checkpoint file to a folder that `from_pretrained` loads: weights, configuration, image processor and
    `conversion.json`, the report. The folder appears complete and verified, or not at all.

    Args:
        file (`str` or `Path`):
            The checkpoint; see `read_checkpoint`.
        output_dir (`str` or `Path`):
            A new or empty folder, or with `overwrite` one to replace.
        entry (`str`, *optional*), layout (`str`, *optional*), stage (`str`, *optional*), epochs (`int`, *optional*):
            Replace what is read from the file: the entry with the state dict, its layout, `"pretrained"`, `"linear"`
            or `"finetuned"`, and the number of epochs trained.
        labels (`str`, `Path` or `list[str]`, *optional*):
            Names of the classes, or what `read_labels` takes. Defaults to the checkpoint's own, then to
            `default_labels`.
        with_code (`bool`, *optional*, defaults to `False`):
            Whether to add the model's code, for `trust_remote_code` without this package.
        origin (`dict[str, str]`, *optional*):
            More about the source for the report, such as its URL.
        pixel_range (`list[float]`, *optional*):
            For the image processor, of images with more than 8 bits: `[low, high]`, or such a pair for each channel,
            one after another.
        image_mean (`list[float]`, *optional*), image_std (`list[float]`, *optional*):
            For the image processor, by channel, for pixels in 0..1.
        overrides:
            Of `convert_state_dict`.

    Raises:
        ConversionError: A file or labels that cannot be converted.
        UsageError: The output folder exists.
        RunError: The written folder does not load back as it was written.
    """
    check_new_folder(output_dir, overwrite, CONFIG_NAME, [file])
    checkpoint = read_checkpoint(file, entry)
    digest = sha256_of(file)
    if stage is None and checkpoint.linear:
        stage = "linear"
    converted = convert_state_dict(checkpoint.state_dict, layout=layout, stage=stage, **overrides)
    processor = build_processor(converted, checkpoint.state_dict, pixel_range, image_mean, image_std)
    label_source = set_labels(converted, labels, checkpoint.labels, default_labels)
    report = {
        "source": {
            "file": Path(file).name,
            "bytes": Path(file).stat().st_size,
            "sha256": digest,
            **(origin or {}),
            "entry": checkpoint.entry,
            "left_behind": checkpoint.others,
        },
        "layout": converted.layout,
        "stage": converted.stage,
        "epochs": epochs if epochs is not None else checkpoint.epochs,
        "model": converted.model_class.__name__,
        "labels": label_source,
        "parts": summarize(converted),
        "ignored": list(converted.ignored),
        "verified": "loaded back, bit-identical",
        "mocov3_hf": __version__,
    }
    with atomic_folder(output_dir, replace=overwrite) as folder:
        converted.build_model().save_pretrained(folder)
        processor.save_pretrained(folder)
        verify_folder(folder, converted.model_class, converted.state_dict)
        if with_code:
            add_code(folder)
        write_json(folder / CONVERSION, report)
    return report


def set_labels(
    converted: Converted, labels: str | Path | list[str] | None, own: list[str] | None, default: str | None
) -> str | None:
    """Set the class names in the configuration and return where they came from."""
    if "classifier.weight" not in converted.state_dict:
        if labels is not None:
            raise ConversionError("labels are given, but the checkpoint has no classification head")
        return None
    classes = len(converted.state_dict["classifier.weight"])
    if labels is not None:
        source, names = "given", labels if isinstance(labels, list) else read_labels(labels)
    elif own is not None and len(own) == classes:
        source, names = "checkpoint", own
    elif default is not None:
        source, names = default, read_labels(default)
    else:
        return None
    if len(names) != classes:
        raise ConversionError(f"{len(names)} labels for a classification head of {classes} classes")
    converted.config.id2label = dict(enumerate(names))
    converted.config.label2id = {name: index for index, name in reversed(list(enumerate(names)))}
    return source


def build_processor(
    converted: Converted,
    state_dict: dict[str, torch.Tensor],
    pixel_range: list[float] | None = None,
    image_mean: list[float] | None = None,
    image_std: list[float] | None = None,
) -> BaseImageProcessor:
    """The image processor of evaluation, with the checkpoint's own mean and standard deviation if it has them."""
    processor = build_image_processor(
        converted.image_size,
        resample="bicubic" if converted.stage == "finetuned" else "bilinear",
        pixel_format=PixelFormat(converted.config.num_channels or 3, pixel_range),
        image_mean=image_mean,
        image_std=image_std,
    )
    for name in ("mean", "std"):
        values = state_dict.get(f"data_preprocessor.{name}")
        # Between 0 and 255.
        if values is not None and {"mean": image_mean, "std": image_std}[name] is None:
            if values.numel() != len(processor.image_mean) or not is_finite(values):
                raise ConversionError(
                    f"data_preprocessor.{name} has {values.numel():,} values, expected {len(processor.image_mean)}"
                    " finite ones"
                )
            values = (values.flatten().double() / 255).tolist()
            if max(abs(a - b) for a, b in zip(values, getattr(processor, f"image_{name}"), strict=True)) > 1e-4:
                setattr(processor, f"image_{name}", values)
    return processor


def verify_folder(folder: Path, model_class: type[PreTrainedModel], expected: dict[str, torch.Tensor]) -> None:
    """
    Load a written folder as a user does and compare it bit by bit with what was to be written.

    Raises:
        RunError: A key is missing, unexpected or differs.
    """
    model, info = model_class.from_pretrained(folder, dtype="auto", output_loading_info=True)
    problems = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    if problems:
        raise RunError(f"the written model does not load back: {problems}")
    loaded = model.state_dict()
    different = [key for key, value in expected.items() if not torch.equal(loaded[key], value)]
    if different or loaded.keys() != expected.keys():
        raise RunError(f"the written model loads back differently: {', '.join(different[:8]) or 'other keys'}")


# The report


def summarize(converted: Converted) -> list[dict[str, Any]]:
    """One row per part of the model: its origin, tensors, parameters and bytes."""
    rows: dict[str, dict[str, Any]] = {}
    for key, tensor in converted.state_dict.items():
        part = part_of(key)
        row = rows.setdefault(part, {"part": part, "from": [], "tensors": 0, "parameters": 0, "bytes": 0})
        origin = converted.sources[key]
        if origin not in row["from"]:
            row["from"].append(origin)
        is_buffer = key.endswith(("running_mean", "running_var", "num_batches_tracked"))
        row["tensors"] += 1
        row["parameters"] += 0 if is_buffer else tensor.numel()
        row["bytes"] += tensor.numel() * tensor.element_size()
    for row in rows.values():
        row["from"] = common_prefix(row["from"])
    return list(rows.values())


def part_of(key: str) -> str:
    """The part of the model that a key belongs to: an encoder or a head."""
    module = key.split(".backbone.")[0] if ".backbone." in key else key.split(".layers.")[0]
    if key.startswith("backbone."):
        module = "backbone"
    return module.removesuffix(".weight").removesuffix(".bias")


def common_prefix(names: list[str]) -> str:
    """The dotted path that names have in common, with `.*` for the rest."""
    if len(names) == 1:
        return names[0]
    shared = [parts[0] for parts in zip(*(name.split(".") for name in names), strict=False) if len(set(parts)) == 1]
    return ".".join([*shared, "*"])


def format_report(report: dict[str, Any], output_dir: str | Path) -> str:
    """The report of a conversion as text for a terminal."""
    source = report["source"]
    head = f"{report['model']} ({report['stage'] or 'stage unknown'}"
    head += f", {report['epochs']} epochs)" if report["epochs"] is not None else ")"
    lines = [
        f"{source['file']}  {source['bytes']:,} bytes  sha256 {source['sha256']}",
        f"layout {report['layout']} -> {head}",
        format_table(report["parts"], ["part", "from", "tensors", "parameters", "bytes"]),
    ]
    if report["ignored"]:
        lines.append(f"ignored (not part of a model): {', '.join(report['ignored'])}")
    if source["left_behind"]:
        lines.append(f"not converted: {', '.join(source['left_behind'])}")
    total = {name: sum(row[name] for row in report["parts"]) for name in ("tensors", "parameters", "bytes")}
    lines.append(
        f"{total['tensors']:,} tensors, {total['parameters']:,} parameters, {total['bytes']:,} bytes written to"
        f" {output_dir}; {report['verified']}"
    )
    return "\n".join(lines)


def format_table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Rows as aligned text, numbers to the right."""
    cells = [[f"{row[c]:,}" if isinstance(row[c], int) else str(row[c]) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    numeric = [all(isinstance(row[c], int | float) for row in rows) for c in columns]
    lines = [
        "  ".join(text.rjust(w) if n else text.ljust(w) for text, w, n in zip(line, widths, numeric, strict=True))
        for line in [columns, *cells]
    ]
    return "\n".join(line.rstrip() for line in lines)


# The command


@dataclass(frozen=True)
class SourceOptions:
    """Source"""

    source: str = option(
        help="Checkpoint of the official code, mmpretrain, DeiT, timm or torchvision: a file, a URL, or the name of a"
        " published model (mocov3 zoo lists them).",
        metavar="FILE|URL|NAME",
    )
    sha256: str | None = option(None, "SHA-256 of the file, or its beginning.", metavar="HEX")
    mirror: str | None = option(None, "Server with the publisher's paths to download from.", metavar="URL")


@dataclass(frozen=True)
class OutputOptions:
    """Output"""

    output_dir: str = option(help="New folder; it appears complete and verified, or not at all.", metavar="DIR")
    overwrite_output_dir: bool = option(False, "Replace --output_dir if it exists.", old=("overwrite",))
    with_code: bool = option(False, "Add the model's code, for trust_remote_code without this package.")
    labels: str | None = option(
        None, "Names of the classes: a file with one per line, a JSON file, or imagenet-1k.", metavar="FILE"
    )


@dataclass(frozen=True)
class ContentOptions:
    """Content of the checkpoint, where it is not recognized"""

    entry: str | None = option(None, "Entry of the file that holds the state dict.")
    layout: str | None = option(None, f"Naming of the keys: {', '.join(LAYOUTS)}.")
    stage: Literal["pretrained", "linear", "finetuned"] | None = option(None, "Training stage.")
    epochs: int | None = option(None, "Number of epochs that the model was trained for.", at_least=0)
    num_attention_heads: int | None = option(None, "Attention heads (ViT-S and ViT-B: 12, ViT-L: 16).", at_least=1)
    image_size: int | None = option(None, "Side of the images in pixels.", at_least=1)
    pixel_range: list[float] | None = option(
        None, "Values of images with more than 8 bits that become 0 and 1, or a pair per channel.", metavar="LOW HIGH"
    )
    image_mean: list[float] | None = option(None, "Mean of each channel. Defaults to ImageNet's, or 0.5.")
    image_std: list[float] | None = option(None, "Standard deviation of each channel. Defaults to ImageNet's, or 0.5.")
    temperature: float | None = option(None, "Temperature of InfoNCE; 0.2 for ViT, 1.0 for ResNet.", above=0)


COMMAND = Command(
    "convert",
    "Convert a checkpoint of another codebase, or a published model, to a model folder.",
    (SourceOptions, OutputOptions, ContentOptions),
    positional="source",
)


def main(arguments: Iterable[str]) -> None:
    """The command `mocov3 convert SOURCE --output_dir DIR`."""
    with reporting():
        arguments = list(arguments)
        if "--list" in arguments:
            warn("--list is deprecated: use mocov3 zoo")
            print(list_zoo())
            return
        source, output, content = parse(COMMAND, arguments)
        with progress_bars(False):
            report = convert_source(source, output, content)
        print(format_report(report, output.output_dir))


def convert_source(source: SourceOptions, output: OutputOptions, content: ContentOptions) -> dict[str, Any]:
    """Convert a file, a URL or a published model and return the report."""
    check_new_folder(output.output_dir, output.overwrite_output_dir, CONFIG_NAME)  # before a download
    options = {name: value for name, value in vars(content).items() if value is not None}
    options |= {"overwrite": output.overwrite_output_dir, "with_code": output.with_code}
    if output.labels is not None:
        options["labels"] = output.labels
    place = Path(source.source).expanduser()
    if source.source in load_zoo() and not os.path.exists(place):
        return convert_entry(source.source, output.output_dir, source.mirror, source.sha256, **options)
    if "://" in source.source:
        url, origin = at_mirror(source.source, source.mirror), {"url": source.source}
        return convert_url(url, downloads_folder(), output.output_dir, source.sha256, origin=origin, **options)
    expected = "" if source.sha256 is None else checked_hash(source.sha256)
    if expected and os.path.isfile(place) and not sha256_of(place).startswith(expected):
        raise ConversionError(f"{place} has a wrong hash: its SHA-256 does not begin with {source.sha256}")
    if not os.path.exists(place) and source.source == place.name and not place.suffix:
        find_entry(source.source)  # raises with the nearest names
    return convert_checkpoint(place, output.output_dir, **options)
