"""A saved image processor: resize and crop per image in uint8, rescale and normalize per batch."""

from collections.abc import Sequence

import torch
from transformers import BaseImageProcessor
from transformers.utils import logging

from ..data.decode import BadImageError
from ..loading import first_line
from ..processing import pixel_format_of


logger = logging.get_logger(__name__)

# Dimensions: B batch, H W decoded image, h w model input.

# Odd, portrait and landscape, smaller and larger than any usual crop.
_PROBE_SIZES = ((97, 141), (333, 250), (260, 519))


class Preprocessing:
    """
    The pixels that an image processor returns, bit by bit.

    Resize and center crop are the processor's own methods on the decoded uint8 image; rescaling and normalization are
    its own too, but on a batch. A processor that does anything else, as its results on noise show, is called for each
    image as a whole, and `is_batched` is False.

    Args:
        processor: As `AutoImageProcessor` loads it.

    Attributes:
        pixel_format: Of the images that `prepare` takes.
    """

    def __init__(self, processor: BaseImageProcessor):
        self.processor, self.pixel_format = processor, pixel_format_of(processor)
        # The processor of other formats has the same methods, but scales and fills each image before it resizes.
        self.is_batched = self.pixel_format.is_rgb8 and self._reproduces()
        if self.pixel_format.is_rgb8 and not self.is_batched:
            logger.warning(
                f"{type(processor).__name__} does more than resize, crop and normalize with torchvision: it is called"
                " for each image, which is slower"
            )

    def prepare(self, image: torch.Tensor) -> torch.Tensor:
        """
        An image (C, H, W), in any memory layout, to uint8 (C, h, w); float32 where `is_batched` is False.

        Raises:
            BadImageError: No pixel has data.
        """
        if self.is_batched:
            return self._crop(image)
        try:
            return self._process(image)
        except ValueError as error:
            if self.pixel_format.is_rgb8:
                raise
            raise BadImageError(first_line(error)) from error

    def finish(self, images: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
        """
        The images that `prepare` returned, as float32 (B, C, h, w) on a device.

        Raises:
            ValueError: Images of different sizes.
        """
        sizes = {tuple(image.shape) for image in images}
        if len(sizes) > 1:
            raise ValueError(
                f"{type(self.processor).__name__} makes images of several sizes, {min(sizes)} and {max(sizes)}: pass"
                " batch_size=1, or let the processor crop"
            )
        batch = torch.stack(list(images)).to(device, non_blocking=True)
        return self._normalize(batch) if self.is_batched else batch

    def _process(self, image: torch.Tensor) -> torch.Tensor:
        # Three rows of pixels could be taken for channels: the layout is passed.
        return self.processor(image, return_tensors="pt", input_data_format="channels_first")["pixel_values"][0]

    def _crop(self, image: torch.Tensor) -> torch.Tensor:
        processor, image = self.processor, image[None]
        if processor.do_resize:
            image = processor.resize(image=image, size=processor.size, resample=processor.resample)
        if processor.do_center_crop:
            image = processor.center_crop(image, processor.crop_size)
        return image[0]

    def _normalize(self, batch: torch.Tensor) -> torch.Tensor:
        processor = self.processor
        mean, std = (
            tuple(values) if isinstance(values, list) else values
            for values in (processor.image_mean, processor.image_std)
        )
        return processor.rescale_and_normalize(
            batch, processor.do_rescale, processor.rescale_factor, processor.do_normalize, mean, std
        )

    def _reproduces(self) -> bool:
        if getattr(self.processor, "backend", None) != "torchvision" or getattr(self.processor, "do_pad", False):
            return False
        generator = torch.Generator().manual_seed(0)
        for size in _PROBE_SIZES:
            noise = torch.randint(256, (*size, 3), dtype=torch.uint8, generator=generator).permute(2, 0, 1)
            expected = self._process(noise)
            try:
                found = self._normalize(self._crop(noise)[None])[0]
            # Another kind of processor: other arguments, or missing attributes.
            except (AttributeError, TypeError, ValueError):
                return False
            if not torch.equal(found, expected):
                return False
        return True
