"""The commands `mocov3 classify` and `mocov3 extract`: images to a file of labels or features."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..data.sources import open_source
from ..hints import describe_missing
from ..options import Command, option, parse
from ..reporting import UsageError, reporting
from ..storage import atomic_file
from .images import ImageInput, find_images
from .predictors import FeatureExtractor, ImageClassifier


@dataclass(frozen=True)
class ImageOptions:
    """Images"""

    images: list[str] = option([], "Files and folders of images.", metavar="IMAGES")
    dataset_name: str | None = option(
        None, "Images of a data set instead: Hub id, or folder of parquet files.", metavar="DATASET"
    )
    dataset_config_name: str | None = option(None, "Configuration of a data set that has several.")
    test_split: str = option("test", "Split of the data set.", old=["split"])
    image_column: str | None = option(None, "Column of images. Found if there is only one.")
    on_bad_image: Literal["stop", "skip"] = option(
        "stop", "What to do with images that cannot be decoded.", old=["bad_images"]
    )


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

    output: str = option(
        help="File to write: features (n, D) and, as metadata, the names.", metavar="FILE.safetensors"
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
        names, images = open_inputs(which)
        path = None if out.output is None else file_to_write(out.output)
        results = build(ImageClassifier, which, how).stream(images, out.top_k, out.function_to_apply)
        with opened(path) as file:
            for index, (name, labels) in enumerate(tqdm(results, total=len(images), unit=" images", smoothing=0.05)):
                name = name if names is None else names[index]
                print(json_line({"image": name, "labels": labels}), file=file)


def extract(arguments: list[str]) -> None:
    """The command `mocov3 extract`: `features` (n, D) float32, and their names as JSON under `images`."""
    with reporting():
        which, how, out = parse(EXTRACT, arguments)
        names, images = open_inputs(which)
        path = file_to_write(out.output)
        predictor = build(FeatureExtractor, which, how)
        kept, rows = [], []
        with tqdm(total=len(images), unit=" images", smoothing=0.05) as bar:
            first = 0
            for batch, features in predictor.batches(images):
                kept += [
                    image.name if names is None else names[first + place]
                    for place, image in enumerate(batch)
                    if image.pixels is not None
                ]
                first += len(batch)
                rows += [features] if features.numel() else []
                bar.update(len(batch))
        if not rows:
            raise UsageError(f"none of the {first} images could be decoded: no features were written")
        metadata = {"images": json.dumps(kept), "model": how.model, "dtype": str(predictor.dtype)}
        with atomic_file(path) as aside:
            save_file({"features": torch.cat(rows)}, aside, metadata=metadata)
        print(f"{out.output}: {len(kept)} x {rows[0].shape[1]} features")


def json_line(values: dict) -> str:
    """As JSON, in readable text where the names of files are valid text, else with escapes."""
    text = json.dumps(values, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(values)
    return text


class Rows:
    """The encoded images of a data set, read as they are needed."""

    def __init__(self, source):
        self.source = source

    def __len__(self) -> int:
        return self.source.num_samples

    def __iter__(self) -> Iterator[ImageInput]:
        return (self.source.read(index) for index in range(len(self)))


def open_inputs(options: ImageOptions) -> tuple[list[str] | None, Iterable[ImageInput]]:
    """Names (None where every image has its own) and images; UsageError where there are none."""
    if bool(options.images) == bool(options.dataset_name):
        raise UsageError("no images: pass files and folders, or --dataset_name" if not options.images else
                         "pass either files and folders of images or --dataset_name, not both")  # fmt: skip
    if options.dataset_name:
        source = open_source(
            options.dataset_name,
            config_name=options.dataset_config_name,
            split=options.test_split,
            image_column=options.image_column,
        )
        rows = Rows(source)
        return [f"{options.test_split}[{index}]" for index in range(len(rows))], rows
    paths: list[str] = []
    for path in map(os.path.expanduser, options.images):
        paths += find_images(path) if os.path.isdir(path) else [path]
    missing = [path for path in paths if not os.path.exists(path)]
    if missing and options.on_bad_image == "stop":
        text = describe_missing(missing[0], "image")
        raise UsageError(f"{text}{'' if text.endswith('?') else '.'} To skip it, pass --on_bad_image skip")
    return None, paths


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
        raise UsageError(f"--output {path}: {describe_missing(parent)}; create it first")
    if Path(path).is_dir():
        raise UsageError(f"--output {path} is a folder: pass a file")
    return path


@contextmanager
def opened(path: str | None):
    if path is None:
        yield sys.stdout
        return
    with open(path, "w", encoding="utf-8") as file:
        yield file
