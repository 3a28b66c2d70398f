"""`ImageClassifier` and `FeatureExtractor`: transformers' pipelines in batches, with the same results."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data.decode import printable
from ..data.decode_limits import MAX_PIXELS
from ..data.workers import cores_of_process
from ..loading import load_classifier, load_encoder, load_processor, pooled_features, size_options
from ..problem_types import REGRESSION, THRESHOLDS
from ..processing import for_pixels, pixel_format_of
from ..weights import weights_hash
from .acceleration import BATCH_SIZES, OTHER_BATCH_SIZE, choose_dtype, prepare_for_inference, uses_channels_last
from .images import ImageInput, NamedImage, PreparedImage, find_images, is_file, prepared_images
from .preprocessing import Preprocessing


logger = logging.get_logger(__name__)

# Dimensions: n images, B batch, D size of the pooled features, C classes.

FUNCTIONS = ("sigmoid", "softmax", "none")
BAD_IMAGES = ("stop", "skip")
# More threads wait for each other.
MOST_THREADS = 8


class Predictor:
    """
    A saved model applied to images: the common part of `ImageClassifier` and `FeatureExtractor`.

    Args:
        model: Folder of `save_pretrained`, Hub id, or name of a published model.
        batch_size: Images per forward pass; None for 8 on a CPU and 128 elsewhere.
        dtype: "auto" (bfloat16 where the device has instructions for it, float16 on older GPUs with tensor cores, else
            float32), "float32" for the pipelines' digits, "bfloat16", "float16", or a torch dtype.
        device: None for the accelerator of this machine, or its CPU.
        num_workers: Threads that decode beside the model, 0 for none; None for one per core, at most 8.
        bad_images: "stop" raises at an image that cannot be decoded, "skip" logs it and continues.
        pixel_range: Values of images with more than 8 bits that become 0 and 1, `(low, high)` or a pair per channel;
            None for that of the saved image processor. An 8-bit processor scales 16-bit images by their type.
        max_pixels: Larger images cannot be decoded: a small file may hold a picture that fills the memory.

    Raises:
        ValueError: As `load_classifier`, or an invalid argument.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        *,
        batch_size: int | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        num_workers: int | None = None,
        bad_images: str = "stop",
        pixel_range: Sequence | None = None,
        max_pixels: int = MAX_PIXELS,
    ):
        if not isinstance(model, str | os.PathLike):
            raise ValueError(
                f"model must be a folder, a Hub id or a published name, got {type(model).__name__}: save a model with"
                " save_pretrained and pass its folder"
            )
        if bad_images not in BAD_IMAGES:
            raise ValueError(f"bad_images must be one of {', '.join(BAD_IMAGES)}, got {bad_images!r}")
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name} must be at least {least} and an integer, got {value!r}")
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.batch_size = batch_size or BATCH_SIZES.get(self.device.type, OTHER_BATCH_SIZE)
        self.num_workers = min(cores_of_process(), MOST_THREADS) if num_workers is None else num_workers
        self.bad_images, self.max_pixels = bad_images, max_pixels
        self.name = os.fspath(model)
        self.model = self.load(model)
        if dtype == "auto" and self.model.config.problem_type == REGRESSION:
            self.dtype = torch.float32  # bfloat16 has 8 bits for a value
        processor = load_processor(model, self.model.config)
        if pixel_range is not None:
            processor = for_pixels(processor, replace(pixel_format_of(processor), pixel_range=pixel_range))
        self.preprocessing = Preprocessing(processor)
        done = prepare_for_inference(self.model, self.dtype, self.device)
        self.channels_last = uses_channels_last(self.model)
        logger.info(f"{self.dtype} on {self.device}, batch_size={self.batch_size}, {', '.join(done) or 'plain model'}")

    @staticmethod
    def load(model: str | os.PathLike) -> PreTrainedModel:
        raise NotImplementedError

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def batches(
        self, images: str | os.PathLike | Iterable[ImageInput]
    ) -> Iterator[tuple[list[PreparedImage], torch.Tensor]]:
        """
        Batch by batch, in the order of the input.

        Args:
            images: One image, a folder, or any iterable of images, which is read as needed; of an iterator, files and
                PIL images are read before it is asked for the next one.

        Returns:
            Pairs of the images of a batch and the outputs (B', ·) float32 on the CPU for those that could be decoded:
            all, unless bad ones are skipped.

        Raises:
            ValueError: An image that cannot be used, by name.
        """
        prepared = prepared_images(
            as_images(images),
            self.preprocessing.prepare,
            self.num_workers,
            2 * self.batch_size,
            self.preprocessing.pixel_format,
            self.max_pixels,
        )
        while batch := list(islice(prepared, self.batch_size)):
            for image in batch:
                if image.error is not None:
                    self._report(image)
            pixels = [image.pixels for image in batch if image.pixels is not None]
            if not pixels:
                yield batch, torch.empty(0)
                continue
            with torch.inference_mode():
                pixel_values = self.preprocessing.finish(pixels, self.device).to(self.dtype)
                if self.channels_last:
                    pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
                outputs = self.forward(pixel_values).float().cpu()
            yield batch, outputs.clone()  # outside of inference mode: an ordinary tensor

    def _report(self, image: PreparedImage) -> None:
        if self.bad_images == "stop":
            raise ValueError(
                f"{printable(image.name)} {image.error.reason}: repair it, or skip it with --on_bad_image skip"
                " (in Python bad_images='skip')"
            ) from image.error
        logger.warning(f"skipped: {printable(image.name)} {image.error.reason}")


class ImageClassifier(Predictor):
    """
    `pipeline("image-classification")` in batches.

    ```python
    classify = ImageClassifier("runs/my-classifier")
    classify("cat.jpg")  # [{"label": "tabby", "score": 0.97}, ...]
    classify(["cat.jpg", "dog.jpg"], top_k=1)  # a list of such lists
    ```
    """

    @staticmethod
    def load(model: str | os.PathLike) -> PreTrainedModel:
        return load_classifier(model, dtype=torch.float32)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values, **size_options(self.model.base_model, pixel_values)).logits

    def __call__(
        self,
        images: str | os.PathLike | Iterable[ImageInput],
        top_k: int = 5,
        function_to_apply: str | None = None,
    ) -> list[dict] | list[list[dict] | None]:
        """
        Labels and scores, best first: one list for one image, a list of lists for several images or a folder. Of a
        multi-label classifier with thresholds (`config.label_thresholds`), `is_predicted` says whether a score reaches
        that of its class.

        Args:
            images: One image (path, encoded bytes, file opened in binary mode, PIL image, array, tensor), a folder, or
                a list, a generator or another iterable of images.
            top_k, function_to_apply: As in the pipeline.

        Returns:
            None for a bad image, if bad images are skipped.

        Raises:
            ValueError: An image that cannot be used, or an invalid argument.
        """
        results = [result for _, result in self.stream(images, top_k, function_to_apply)]
        return results[0] if is_one_image(images) else results

    def stream(
        self,
        images: str | os.PathLike | Iterable[ImageInput],
        top_k: int = 5,
        function_to_apply: str | None = None,
    ) -> Iterator[tuple[str, list[dict] | None]]:
        """Name and result of each image, in order. Memory holds one batch at a time."""
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        function = self.function(function_to_apply)
        for batch, logits in self.batches(images):
            thresholds = getattr(self.model.config, THRESHOLDS, None) if function == "sigmoid" else None
            rows = iter(self.best(apply(function, logits.numpy()), top_k, thresholds))
            for image in batch:
                yield image.name, None if image.pixels is None else next(rows)

    def best(self, scores: np.ndarray, top_k: int, thresholds: Sequence[float] | None = None) -> list[list[dict]]:
        """The `top_k` best of scores (B, C); ties in the order of the classes."""
        names = self.model.config.id2label
        order = np.argsort(-scores, axis=-1, kind="stable")[:, :top_k] if scores.size else []
        found = [
            [{"label": names[int(number)], "score": row[number].item()} for number in best]
            for row, best in zip(scores, order, strict=True)
        ]
        if thresholds is not None:
            for labels, best in zip(found, order, strict=True):
                for label, number in zip(labels, best, strict=True):
                    label["is_predicted"] = label["score"] >= thresholds[number]
        return found

    def function(self, name: str | None) -> str:
        """The pipeline's choice: none for regression, sigmoid for one class or multi-label, else softmax."""
        if name is not None:
            if name.lower() not in FUNCTIONS:
                raise ValueError(f"function_to_apply must be one of {', '.join(FUNCTIONS)}, got {name!r}")
            return name.lower()
        config = self.model.config
        if config.problem_type == "regression":
            return "none"
        if config.problem_type == "multi_label_classification" or config.num_labels == 1:
            return "sigmoid"
        return "softmax"


class FeatureExtractor(Predictor):
    """
    `pipeline("image-feature-extraction", pool=True)` in batches.

    ```python
    extract = FeatureExtractor("runs/my-run")
    features = extract("path/to/images")  # (n, D) float32
    ```
    """

    @staticmethod
    def load(model: str | os.PathLike) -> PreTrainedModel:
        return load_encoder(model, dtype=torch.float32)

    @cached_property
    def weights_hash(self) -> str:
        """`weights.weights_hash` of the saved encoder, which is loaded again: the one here is changed for speed."""
        return weights_hash(self.load(self.name))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pooled_features(self.model, pixel_values)

    def __call__(self, images: str | os.PathLike | Iterable[ImageInput]) -> torch.Tensor:
        """
        Features (n, D) float32 of a folder or an iterable of images, (1, D) of one image.

        Returns:
            A row of NaN for a bad image, if bad images are skipped.

        Raises:
            ValueError: No images, none that could be decoded, or as `batches`.
        """
        good, features, number = [], [], 0
        for batch, rows in self.batches(images):
            good += [number + place for place, image in enumerate(batch) if image.pixels is not None]
            number += len(batch)
            if rows.numel():
                features.append(rows)
        if not features:
            why = f"0 of {number} images could be decoded" if number else "there are no images"
            raise ValueError(f"no features: {why}")
        found = torch.cat(features)
        if len(found) == number:
            return found
        return found.new_full((number, found.shape[1]), float("nan")).index_copy(0, torch.tensor(good), found)

    def stream(self, images: str | os.PathLike | Iterable[ImageInput]) -> Iterator[tuple[list[str], torch.Tensor]]:
        """Names and features (B', D) batch by batch, without bad images. Memory holds one batch at a time."""
        for batch, rows in self.batches(images):
            yield [image.name for image in batch if image.pixels is not None], rows


def apply(function: str, logits: np.ndarray) -> np.ndarray:
    """Scores of logits (B, C) float32, computed in float32 as in the pipeline."""
    if function == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    if function == "softmax" and logits.size:
        shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return shifted / shifted.sum(axis=-1, keepdims=True)
    return logits


def is_one_image(images) -> bool:
    """Whether an input is one image, not a folder or an iterable."""
    if isinstance(images, (str, os.PathLike)):
        return not os.path.isdir(os.path.expanduser(images))
    if isinstance(images, torch.Tensor | np.ndarray):
        return images.ndim != 4
    is_image = isinstance(images, bytes | bytearray | memoryview | Image.Image | NamedImage) or is_file(images)
    return is_image or isinstance(images, Mapping) or not isinstance(images, Iterable)


def as_images(images: str | os.PathLike | Iterable[ImageInput]) -> Iterable[ImageInput]:
    """Any input as an iterable of images."""
    if is_one_image(images):
        return [images]
    return find_images(images) if isinstance(images, (str, os.PathLike)) else images


def choose_device(device: str | torch.device | None) -> torch.device:
    """A device that is available; None is the accelerator of this machine, or its CPU. ValueError otherwise."""
    if device is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    # Each kind of device has its own errors for a missing driver, build or index.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} is not available, leave it out or pass cpu: {reason}") from error
    return found
