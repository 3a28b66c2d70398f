"""Features that are searched, with their images and their model."""

import io
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ..data.decode import BadImageError, printable
from ..data.pixels import check_image
from ..data.references import shown
from ..hints import describe_missing
from ..model.image_processing_mocov3 import MoCoV3ImageProcessor, scale_pixels
from ..processing import PixelFormat
from ..reporting import UsageError
from .feature_files import FeatureFolder
from .images import ImageInput, NamedImage, decode, detached, name_of
from .inputs import ImageOptions, open_inputs
from .predictors import FeatureExtractor, as_images, is_one_image


# Images that are copied to choose a threshold, and the share of their copies that it finds.
COPIED_IMAGES, FOUND_COPIES = 64, 0.9
# Share of the pairs of images that are less similar than the threshold, at least: few images are copies of others.
DIFFERENT_PAIRS = 0.95
# For images or a model that have been deleted.
DEFAULT_THRESHOLD = 0.95
# Longer side of a picture on the page, in pixels.
PICTURE_SIZE = 160


class Searched:
    """
    The features that are searched, with the images that they belong to.

    Args:
        folder: Of the features.
        model: Where their model is now; None for where it was.
        options: Of `FeatureExtractor`.
    """

    def __init__(self, folder: FeatureFolder, model: str | None = None, **options):
        self.folder, self.features = folder, folder.features
        self.model, self.options = model, options
        self.names = [shown(name) for name in folder.index["image"].to_pylist()]
        processor = folder.info["image_processor"]
        self.pixel_format = PixelFormat()
        if processor.get("image_processor_type") == MoCoV3ImageProcessor.__name__:
            self.pixel_format = PixelFormat(*(processor.get(key) for key in ("num_channels", "pixel_range", "nodata")))

    @cached_property
    def inputs(self) -> Sequence[str | NamedImage]:
        """The images of the command that extracted the features; ValueError if they have been deleted."""
        return open_inputs(ImageOptions(**self.folder.info["inputs"] | {"on_bad_image": "skip"}), is_reported=False)

    def read(self, row: int) -> torch.Tensor:
        """
        The image of a row, see `decode`.

        Raises:
            BadImageError, ValueError: It cannot be read, or is no longer where it was.
        """
        place = self.folder.index["input"][row].as_py()
        image = self.inputs[place] if place < len(self.inputs) else ""
        if shown(name_of(image, place)) != self.names[row]:
            raise BadImageError("is no longer where it was when the features were extracted")
        return decode(image, self.pixel_format)

    @cached_property
    def extractor(self) -> FeatureExtractor:
        """
        The model of the features.

        Raises:
            ValueError: No such model, or one of other weights.
        """
        info = self.folder.info
        name = self.model or info["model"]
        found = FeatureExtractor(name, dtype=info["computed_in"], bad_images="skip", **self.options)
        if found.weights_hash != info["weights_hash"]:
            raise UsageError(
                f"the features in {str(self.folder.path)!r} are of other weights than the model {name!r}: extract them"
                " again, or pass the model that they are of"
            )
        return found

    def picture(self, image: int | torch.Tensor) -> np.ndarray | None:
        """
        A small picture, uint8 (h, w, 3), of a row or of an image as `decode` returns it; None if it cannot be read.

        Of other than three channels, the first three are shown, or the first.
        """
        try:
            pixels = self.read(image) if isinstance(image, int) else image
            if pixels.dtype != torch.uint8 or not self.pixel_format.is_rgb8:
                scaled = scale_pixels(pixels, self.pixel_format.pixel_range, self.pixel_format.nodata)[0] * 255
                pixels = scaled[: 3 if len(scaled) >= 3 else 1].expand(3, -1, -1)
        except (ValueError, OSError):
            return None
        scale = min(1.0, PICTURE_SIZE / max(pixels.shape[-2:]))
        size = [max(1, round(side * scale)) for side in pixels.shape[-2:]]
        small = F.interpolate(pixels[None].float(), size, mode="bilinear", antialias=True)[0]
        return small.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def queries_of(query: Any) -> Iterable[ImageInput]:
    """The items of an argument `query`: images, and paths of files and folders."""
    if query is None:
        return []
    return [query] if isinstance(query, str | os.PathLike) or is_one_image(query) else query


def checked_queries(queries: Iterable[ImageInput], on_bad_image: str) -> list[ImageInput]:
    """The images and those in the folders; UsageError for one that cannot be used, before anything is computed."""
    images: list[ImageInput] = []
    for query in queries:
        if not isinstance(query, str | os.PathLike):
            images.append(detached(query))
            continue
        if on_bad_image == "stop" and not os.path.exists(os.path.expanduser(query)):
            raise UsageError(describe_missing(query, "query"))
        images += as_images(query)
    for index, image in enumerate(images if on_bad_image == "stop" else ()):
        data = bytes(image) if isinstance(image, bytearray | memoryview) else image
        if isinstance(data, str | os.PathLike | bytes):
            try:
                check_image(data)
            except BadImageError as error:
                name = printable(name_of(image, index))
                raise UsageError(f"query {name} {error.reason}: pass another image") from error
    return images


def altered_copies(image: torch.Tensor) -> list[torch.Tensor]:
    """An image uint8 (3, H, W) as people copy it: as JPEG again, at three quarters of its size, cropped by 5 %."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    width, height = picture.size
    stream = io.BytesIO()
    picture.save(stream, "jpeg", quality=75)
    edge = (round(width * 0.025), round(height * 0.025))
    copies = [
        Image.open(stream).convert("RGB"),
        picture.resize((max(1, width * 3 // 4), max(1, height * 3 // 4)), Image.Resampling.BICUBIC),
        picture.crop((*edge, width - edge[0], height - edge[1])),
    ]
    return [torch.from_numpy(np.array(copy)).permute(2, 0, 1) for copy in copies]


def choose_threshold(searched: Searched) -> tuple[float, str]:
    """
    The cosine similarity from which on images are near-duplicates, for this model and these images: that which
    `FOUND_COPIES` of the `altered_copies` of some of the images reach, but above that of `DIFFERENT_PAIRS` of the
    pairs of different images.

    Returns:
        The threshold, rounded down to four digits, and how it was chosen, in one sentence.
    """
    rows = np.unique(np.linspace(0, len(searched.names) - 1, COPIED_IMAGES).astype(int)).tolist()
    try:
        if not searched.pixel_format.is_rgb8:
            raise ValueError("images of other than three 8-bit channels are not copied")
        extract = searched.extractor
        images, why = [], "no image can be read"
        for row in rows:
            try:
                image = searched.read(row)
            except ValueError as error:
                why = str(error)
                continue
            if not any(torch.equal(image, other) for other in images):
                images.append(image)
        if not images:
            raise ValueError(why)
    except ValueError as error:
        if searched.model is not None and isinstance(error, UsageError):
            raise
        return DEFAULT_THRESHOLD, f"the default, because it could not be chosen with copies of the images: {error}"
    features = F.normalize(extract(part for image in images for part in (image, *altered_copies(image))), dim=1)
    originals, copies = features[::4], features.view(len(images), 4, -1)[:, 1:]
    of_copies = torch.einsum("nd,ncd->nc", originals, copies).flatten()
    chosen, kinds = of_copies.quantile(1 - FOUND_COPIES), "re-encoded, resized and cropped copies"
    number = f"{len(images)} image{'s' if len(images) > 1 else ''}"
    text = f"{FOUND_COPIES:.0%} of {kinds} of {number} reach it"
    pairs = (originals @ originals.T)[tuple(torch.triu_indices(len(images), len(images), offset=1))]
    if len(pairs) and pairs.quantile(DIFFERENT_PAIRS) > chosen:
        chosen = pairs.quantile(DIFFERENT_PAIRS)
        share = float((of_copies >= chosen).float().mean())
        text = (
            f"{DIFFERENT_PAIRS:.0%} of the pairs of {number} stay below it, and only {share:.0%}"
            f" of {kinds} reach it: the model tells copies from other images badly, or many of the images are copies"
        )
    return np.floor(float(chosen) * 10_000).item() / 10_000, text
