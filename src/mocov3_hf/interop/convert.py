"""A checkpoint file of another codebase to a model folder of this one: read, convert, write, verify, report."""

from pathlib import Path
from typing import Any

import torch
from transformers import BitImageProcessor

from .._version import __version__
from ..processing import build_image_processor
from ..remote_code import add_code
from .checkpoints import Converted, convert_state_dict
from .errors import CheckpointError
from .files import read_checkpoint, read_labels
from .folders import (
    REPORT_NAME,
    atomic_folder,
    format_table,
    sha256_of,
    summarise,
    verify_folder,
    write_json,
)


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
    **overrides: Any,
) -> dict[str, Any]:
    """
    Convert a checkpoint file to a folder that `from_pretrained` loads: weights, configuration, image processor and
    `conversion.json`, the report. The folder appears whole, after it was loaded back and compared, or not at all.

    Args:
        file (`str` or `Path`):
            The checkpoint; see `read_checkpoint`.
        output_dir (`str` or `Path`):
            A new or empty folder, or with `overwrite` one to replace.
        entry (`str`, *optional*), layout (`str`, *optional*), stage (`str`, *optional*), epochs (`int`, *optional*):
            What the file tells otherwise or not at all: the entry with the state dict, its layout, `"pretrained"`,
            `"linear"` or `"finetuned"`, and for how long it was trained.
        labels (`str`, `Path` or `list[str]`, *optional*):
            Names of the classes, or where `read_labels` finds them. Left out, the checkpoint's own are taken, and
            `default_labels` where it has none.
        with_code (`bool`, *optional*, defaults to `False`):
            Whether the folder carries the model's code, for `trust_remote_code` without this package.
        origin (`dict[str, str]`, *optional*):
            More about the source for the report, as its URL.
        overrides:
            As of `convert_state_dict`.

    Raises:
        CheckpointError: anything about the file, the labels or the folder that stops the conversion.
    """
    checkpoint = read_checkpoint(file, entry)
    if stage is None and checkpoint.linear:
        stage = "linear"
    converted = convert_state_dict(checkpoint.state_dict, layout=layout, stage=stage, **overrides)
    label_source = set_labels(converted, labels, checkpoint.labels, default_labels)
    report = {
        "source": {
            "file": Path(file).name,
            "bytes": Path(file).stat().st_size,
            "sha256": sha256_of(file),
            **(origin or {}),
            "entry": checkpoint.entry,
            "left_behind": checkpoint.others,
        },
        "layout": converted.layout,
        "stage": converted.stage,
        "epochs": epochs if epochs is not None else checkpoint.epochs,
        "model": converted.model_class.__name__,
        "labels": label_source,
        "parts": summarise(converted),
        "ignored": list(converted.ignored),
        "verified": "loaded back, bit-equal",
        "mocov3_hf": __version__,
    }
    with atomic_folder(output_dir, overwrite) as folder:
        converted.build_model().save_pretrained(folder)
        build_processor(converted, checkpoint.state_dict).save_pretrained(folder)
        verify_folder(folder, converted.model_class, converted.state_dict)
        if with_code:
            add_code(folder)
        write_json(folder / REPORT_NAME, report)
    return report


def set_labels(
    converted: Converted, labels: str | Path | list[str] | None, own: list[str] | None, default: str | None
) -> str | None:
    """Give the configuration its class names; gives back where they came from."""
    if "classifier.weight" not in converted.state_dict:
        if labels is not None:
            raise CheckpointError("labels are given, and the checkpoint has no classification head")
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
        raise CheckpointError(f"{len(names)} labels for a classification head of {classes} classes")
    converted.config.id2label = dict(enumerate(names))
    converted.config.label2id = {name: index for index, name in reversed(list(enumerate(names)))}
    return source


def build_processor(converted: Converted, state_dict: dict[str, torch.Tensor]) -> BitImageProcessor:
    """The evaluation processor; with the checkpoint's own mean and deviation where it carries them."""
    processor = build_image_processor(
        converted.image_size, resample="bicubic" if converted.stage == "finetuned" else "bilinear"
    )
    for name in ("mean", "std"):
        values = state_dict.get(f"data_preprocessor.{name}")
        if values is not None:  # in units of 0 to 255
            values = (values.flatten().double() / 255).tolist()
            if max(abs(a - b) for a, b in zip(values, getattr(processor, f"image_{name}"), strict=True)) > 1e-4:
                setattr(processor, f"image_{name}", values)
    return processor


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
        lines.append(f"ignored (no part of a model): {', '.join(report['ignored'])}")
    if source["left_behind"]:
        lines.append(f"left behind in the file: {', '.join(source['left_behind'])}")
    total = {name: sum(row[name] for row in report["parts"]) for name in ("tensors", "parameters", "bytes")}
    lines.append(
        f"{total['tensors']:,} tensors, {total['parameters']:,} parameters, {total['bytes']:,} bytes written to"
        f" {output_dir}; {report['verified']}"
    )
    return "\n".join(lines)
