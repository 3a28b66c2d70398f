"""The command lines of scripts/classify.py and scripts/extract_features.py."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..data.sources import open_source
from .acceleration import DTYPES
from .images import ImageInput, find_images
from .predictors import BAD_IMAGES, FUNCTIONS, FeatureExtractor, ImageClassifier


def classify(argv: Sequence[str] | None = None, published: Callable[[str], str] | None = None) -> None:
    """
    One line of JSON per image, in order: `{"image": name, "labels": [{"label", "score"}, ...]}`.

    Args:
        argv: None for those of the process.
        published: gives the folder of a published model for its name, and other names back.
    """
    parser = _parser(
        "Labels and scores of images by a saved or published classifier.", "JSON lines; shown if left out"
    )
    parser.add_argument("--top_k", type=int, default=5, help="labels per image")
    parser.add_argument("--function_to_apply", choices=FUNCTIONS, help="default: as the model's configuration says")
    options = _parse(parser, argv)
    with _one_line():
        names, images = _inputs(options)
        predictor = _build(ImageClassifier, options, published)
        results = predictor.stream(images, options.top_k, options.function_to_apply)
        with _opened(options.output) as file:
            for index, (name, labels) in enumerate(tqdm(results, total=len(images), unit=" images", smoothing=0.05)):
                name = name if names is None else names[index]
                print(json.dumps({"image": name, "labels": labels}, ensure_ascii=False), file=file)


def extract_features(argv: Sequence[str] | None = None, published: Callable[[str], str] | None = None) -> None:
    """
    Features of images to a safetensors file: `features` (n, D) float32, and the names as JSON in its metadata under
    `images`. Arguments as `classify`.
    """
    parser = _parser("Features of images by a saved or published model.", "FILE.safetensors", output_required=True)
    options = _parse(parser, argv)
    with _one_line():
        names, images = _inputs(options)
        _check_output(options.output)
        predictor = _build(FeatureExtractor, options, published)
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
            raise ValueError(f"none of {first} images could be used: no features were written")
        save_file(
            {"features": torch.cat(rows)},
            options.output,
            metadata={"images": json.dumps(kept), "model": options.model, "dtype": str(predictor.dtype)},
        )
        print(f"{options.output}: {len(kept)} x {rows[0].shape[1]} features")


def _parser(description: str, output: str, output_required: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("images", nargs="*", help="files and folders of images")
    parser.add_argument("--model", required=True, help="folder of a model, name of a published one, or Hub id")
    parser.add_argument("--dataset_name", help="images of a data set instead: Hub id, or folder of parquet files")
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--split", default="test", help="split of the data set")
    parser.add_argument("--image_column")
    parser.add_argument("--output", required=output_required, help=f"file to write: {output}")
    parser.add_argument("--batch_size", type=int, help="default: 8 on a CPU, 128 elsewhere")
    parser.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="auto: bfloat16 where the device has instructions for it, else float32",
    )
    parser.add_argument("--device", help="default: the accelerator of this machine, or its CPU")
    parser.add_argument("--num_workers", type=int, help="threads that decode; default: one per core, 8 at most")
    parser.add_argument("--bad_images", choices=BAD_IMAGES, default="stop", help="what to do with broken images")
    return parser


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser.parse_args(argv)
    if bool(options.images) == bool(options.dataset_name):
        parser.error("give files and folders of images, or --dataset_name")
    return options


class _Rows:
    """The encoded images of a data set, read as they are needed."""

    def __init__(self, source):
        self.source = source

    def __len__(self) -> int:
        return self.source.num_samples

    def __iter__(self) -> Iterator[ImageInput]:
        return (self.source.read(index) for index in range(len(self)))


def _inputs(options: argparse.Namespace) -> tuple[list[str] | None, Iterable[ImageInput]]:
    """Names (None where an image tells its own) and images."""
    if options.dataset_name:
        source = open_source(
            options.dataset_name,
            config_name=options.dataset_config_name,
            split=options.split,
            image_column=options.image_column,
        )
        rows = _Rows(source)
        return [f"{options.split}[{index}]" for index in range(len(rows))], rows
    paths = []
    for path in options.images:
        paths += find_images(path) if os.path.isdir(path) else [path]
    missing = [path for path in paths if not os.path.exists(path)]
    if missing and options.bad_images == "stop":
        raise ValueError(f"image {missing[0]!r} does not exist")
    return None, paths


def _build(predictor: type, options: argparse.Namespace, published: Callable[[str], str] | None):
    return predictor(
        options.model if published is None else published(options.model),
        batch_size=options.batch_size,
        dtype=options.dtype,
        device=options.device,
        num_workers=options.num_workers,
        bad_images=options.bad_images,
    )


def _check_output(path: str) -> None:
    if not Path(path).resolve().parent.is_dir():
        raise ValueError(f"--output {path}: its folder does not exist")


@contextmanager
def _opened(path: str | None):
    if path is None:
        yield sys.stdout
        return
    _check_output(path)
    with open(path, "w", encoding="utf-8") as file:
        yield file


@contextmanager
def _one_line():
    """A ValueError ends the process with its message in one line, and status 1."""
    try:
        yield
    except ValueError as error:
        sys.exit(f"error: {(str(error).strip().splitlines() or [type(error).__name__])[-1]}")
