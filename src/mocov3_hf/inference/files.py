"""The commands `mocov3 classify` and `mocov3 extract`: images to a file of labels or features."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, TextIO

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..hints import describe_missing
from ..new_folder import check_new_folder
from ..options import Command, option, parse
from ..reporting import UsageError, reporting, warn
from ..run_folder import BAD_IMAGES
from ..storage import atomic_file, atomic_folder
from .feature_files import INFO, FeatureFolder, FeatureWriter, read_feature_folder
from .inputs import ImageOptions, open_inputs
from .predictors import FeatureExtractor, ImageClassifier


@dataclass(frozen=True)
class PredictorOptions:
    """Model"""

    model: str = option(help="Folder, Hub id or published name of a model.", metavar="MODEL")
    batch_size: int | None = option(
        None, "Images per forward pass. Defaults to 8 on a CPU and 128 elsewhere.", at_least=1
    )
    pixel_range: list[float] | None = option(
        None,
        "Values of images with more than 8 bits that become 0 and 1. Defaults to that of the saved image processor.",
        metavar="LOW HIGH",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Precision. auto is bfloat16 or float16 where the device has instructions for it, else float32."
    )
    device: str | None = option(None, "Device. Defaults to the accelerator of this machine, or its CPU.")
    dataloader_num_workers: int | None = option(
        None,
        "Threads that decode, 0 for none. Defaults to the share of the CPU cores, at most 8.",
        at_least=0,
        old=["num_workers"],
    )


@dataclass(frozen=True)
class ClassifyOptions:
    """Output"""

    output: str | None = option(None, "File of JSON lines. Defaults to the standard output.", metavar="FILE")
    top_k: int = option(5, "Labels per image.", at_least=1)
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = option(
        None, "Function from logits to scores. Defaults to what the model's configuration says."
    )


@dataclass(frozen=True)
class ExtractOptions:
    """Output"""

    output_dir: str | None = option(
        None, "New folder for features.json, index.parquet and safetensors.", metavar="DIR", required=True
    )
    overwrite_output_dir: bool = option(False, "Replace --output_dir if it exists.")
    output_dtype: Literal["float32", "float16"] = option(
        "float32", "Type of the features in the files; float16 takes half the space."
    )
    output: str | None = option(
        None,
        "Earlier form, deprecated: one file of all features, with the names as metadata.",
        metavar="FILE.safetensors",
        advanced=True,
    )


CLASSIFY = Command(
    "classify", "Print labels and scores of images.", (ImageOptions, PredictorOptions, ClassifyOptions), "images"
)
EXTRACT = Command(
    "extract", "Write the features of images to a file.", (ImageOptions, PredictorOptions, ExtractOptions), "images"
)


def classify(arguments: list[str]) -> None:
    """The command `mocov3 classify`: one JSON object per image, `{"image": name, "labels": [{"label", "score"}]}`."""
    with reporting():
        which, how, out = parse(CLASSIFY, arguments)
        images = open_inputs(which)
        path = None if out.output is None else file_to_write(out.output)
        results = build(ImageClassifier, which, how).stream(images, out.top_k, out.function_to_apply)
        with opened(path) as file:
            for name, labels in tqdm(results, total=len(images), unit=" images", smoothing=0.05):
                print(json_line({"image": name, "labels": labels}), file=file)


def extract(arguments: list[str]) -> None:
    """The command `mocov3 extract`: a folder of features, see `feature_files.py`."""
    with reporting():
        which, how, out = parse(EXTRACT, arguments)
        if out.output is not None:
            extract_to_file(which, how, out)
            return
        if out.output_dir is None:
            raise UsageError("--output_dir is missing: a new folder for features.json, index.parquet and safetensors")
        folder = extract_to_folder(which, how, out.output_dir, out.output_dtype, out.overwrite_output_dir)
        bad = folder.info["bad_images"]
        left_out = f"; {bad} images could not be decoded: {folder.path / BAD_IMAGES}" if bad else ""
        print(f"{out.output_dir}: {folder.info['rows']} x {folder.info['width']} features{left_out}")


def extract_to_folder(
    which: ImageOptions, how: PredictorOptions, output_dir: str, dtype: str = "float32", overwrite: bool = False
) -> FeatureFolder:
    """
    Write the features of images to a new folder, which appears complete or not at all.

    Args:
        dtype: `"float32"` or `"float16"`, of the files.

    Raises:
        ValueError: No images, a bad one that is not skipped, no model, or a folder that exists.
    """
    check_new_folder(output_dir, overwrite, INFO, [*which.images, how.model, *filter(None, [which.dataset_name])])
    # Absolute paths, so that the images are found again from anywhere.
    which = replace(which, images=[os.path.abspath(path) for path in which.images])
    images = open_inputs(which)
    predictor = build(FeatureExtractor, which, how)
    with atomic_folder(output_dir, replace=overwrite) as aside, bar_of(images) as bar:
        writer = FeatureWriter(aside, dtype)
        for batch, features in predictor.batches(images):
            writer.add(batch, features, getattr(images, "labels", None))
            bar.update(len(batch))
        if not writer.rows:
            raise UsageError(f"0 of {writer.bad} images could be decoded: no features were written")
        writer.close(
            {
                "model": os.path.abspath(how.model) if os.path.isdir(how.model) else how.model,
                "weights_hash": predictor.weights_hash,
                "computed_in": str(predictor.dtype).removeprefix("torch."),
                "image_processor": json.loads(predictor.preprocessing.processor.to_json_string()),
                "inputs": asdict(which),
            }
        )
    return read_feature_folder(output_dir)


def extract_to_file(which: ImageOptions, how: PredictorOptions, out: ExtractOptions) -> None:
    """The earlier form: `features` (n, D) float32, and their names as JSON under `images`."""
    if out.output_dir is not None:
        raise UsageError("pass --output_dir or --output, not both")
    images, path = open_inputs(which), file_to_write(str(out.output))
    warn("--output is deprecated: use --output_dir, which needs no more memory for more images")
    predictor = build(FeatureExtractor, which, how)
    kept, rows = [], []
    with bar_of(images) as bar:
        for batch, features in predictor.batches(images):
            kept += [image.name for image in batch if image.pixels is not None]
            rows += [features] if features.numel() else []
            bar.update(len(batch))
    if not rows:
        raise UsageError(f"0 of {len(images)} images could be decoded: no features were written")
    metadata = {"images": json.dumps(kept), "model": how.model, "dtype": str(predictor.dtype)}
    with atomic_file(path) as aside:
        save_file({"features": torch.cat(rows)}, aside, metadata=metadata)
    print(f"{out.output}: {len(kept)} x {rows[0].shape[1]} features")


def bar_of(images: Sequence) -> tqdm:
    return tqdm(total=len(images), unit=" images", smoothing=0.05)


def json_line(values: dict) -> str:
    """As JSON, in readable text where the names of files are valid text, else with escapes."""
    text = json.dumps(values, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(values)
    return text


def build(predictor: type, which: ImageOptions, how: PredictorOptions):
    return predictor(
        how.model,
        batch_size=how.batch_size,
        dtype=how.dtype,
        device=how.device,
        num_workers=how.dataloader_num_workers,
        bad_images=which.on_bad_image,
        pixel_range=how.pixel_range,
    )


def file_to_write(path: str) -> str:
    """The path of a file, with `~` expanded; UsageError where it cannot be written for lack of its folder."""
    path = os.path.expanduser(path)
    parent = Path(path).parent
    if not parent.is_dir():
        raise UsageError(f"--output {path}: {describe_missing(parent, fix='create it first')}")
    if Path(path).is_dir():
        raise UsageError(f"--output {path} is a folder: pass a file")
    return path


@contextmanager
def opened(path: str | None) -> Iterator[TextIO]:
    """The standard output, or a file that gets its name, and replaces what has it, once it is complete."""
    # Also as /dev/stdout: a file to which the standard output goes must stay what it is.
    if path is None or (os.path.isfile(path) and os.path.samestat(os.stat(path), os.fstat(1))):
        yield sys.stdout
        return
    is_special = os.path.exists(path) and not os.path.isfile(path)  # such as a pipe, which cannot be replaced
    place = nullcontext(path) if is_special else atomic_file(os.path.realpath(path))
    with place as aside, open(aside, "w", encoding="utf-8") as file:
        yield file
