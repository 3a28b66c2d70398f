"""Keep a small data set in device memory as uint8 or uint16, and crop batches there.

Order and parameters are the same as without the cache. Pixels differ from the CPU stage by at most one level, since
the CPU stage rounds between its two passes.
"""

import math

import torch

from ..processing import PixelFormat
from .bad_images import BadImage, decode_first_usable
from .pixels import RGB8
from .sources import MapSource
from .views import ViewSettings, crop_boxes, draw_view


# A quarter of the memory of a small GPU.
MAX_BYTES = 4 << 30


class DeviceCache:
    """All images of a source, decoded, on a device.

    Images of different sizes are padded to the largest height and width. The padding is never read.

    Args:
        source: A `MapSource`.
        device: Device of the images.
        max_bytes: Largest size of the cache in bytes.
        pixel_format: Of the images; 8-bit RGB without it.

    Attributes:
        images: uint8 (N, C, H, W) on the device; for deep images int16, the bits of uint16.
        num_filled: Images in which values without data were filled.
        heights, widths: int64 (N,) on the CPU, image sizes in pixels.
        bad: List of `BadImage`. A neighbor replaces each of them.

    Raises:
        ValueError: The data set is streamed or too large.
    """

    def __init__(
        self,
        source: MapSource,
        device: torch.device | str,
        max_bytes: int = MAX_BYTES,
        pixel_format: PixelFormat = RGB8,
    ):
        if not isinstance(source, MapSource):
            raise ValueError(
                "a streamed data set cannot be cached on the device: remove --streaming or --cache_images_on_device"
            )
        self.bad: list[BadImage] = []
        self.num_filled, self.largest = 0, 65535 if pixel_format.is_deep else 255
        decoded, stored, batch = [], 0, source.open_batch(torch.arange(len(source)))
        for row in range(len(source)):
            image, *_, filled = decode_first_usable(batch.candidates(row), None, self.bad, pixel_format)
            self.num_filled += filled > 0
            if pixel_format.is_deep:
                image = (image * 65535).round_().to(torch.uint16)
            decoded.append(image)
            stored += image.nbytes
            if stored > max_bytes:
                raise ValueError(
                    f"the first {row + 1} of {len(source)} images need {stored >> 20} MiB of device memory, more than "
                    f"the allowed {max_bytes >> 20} MiB: remove --cache_images_on_device"
                )
        self.heights = torch.tensor([image.shape[1] for image in decoded])
        self.widths = torch.tensor([image.shape[2] for image in decoded])
        shape = (len(decoded), pixel_format.num_channels, int(self.heights.max()), int(self.widths.max()))
        padded = math.prod(shape) * pixel_format.dtype.itemsize
        if padded > max_bytes:
            raise ValueError(
                f"{shape[0]} images padded to {shape[2]}x{shape[3]} pixels need {padded >> 20} MiB of device memory, "
                f"more than the allowed {max_bytes >> 20} MiB: remove --cache_images_on_device"
            )
        images = torch.zeros(shape, dtype=pixel_format.dtype)
        for row, image in enumerate(decoded):
            images[row, :, : image.shape[1], : image.shape[2]] = image
        # Few operations, indexing among them, support uint16 on every device.
        self.images = (images.view(torch.int16) if pixel_format.is_deep else images).to(device)

    def make_views(
        self, sample_ids: torch.Tensor, settings: tuple[ViewSettings, ViewSettings], seed: int, epoch: int
    ) -> dict:
        """Both views of a batch.

        Args:
            sample_ids: int64 (B,) on the CPU.
            settings, seed, epoch: As in `views.make_views`.

        Returns:
            A dictionary: pixels uint8 or uint16 (2, B, C, S, S) and parameters float32 (2, B, K) on the device, and
            sample_ids.
        """
        return self.crop(self.draw(sample_ids, settings, seed, epoch), settings[0].image_size)

    def draw(
        self, sample_ids: torch.Tensor, settings: tuple[ViewSettings, ViewSettings], seed: int, epoch: int
    ) -> dict:
        """First half of `make_views`, on the CPU: boxes int64 (2, B, 4), parameters and sample_ids."""
        heights, widths = self.heights[sample_ids], self.widths[sample_ids]
        draws = [draw_view(settings[view], seed, epoch, sample_ids, view) for view in range(2)]
        boxes = [crop_boxes(draws[view], heights, widths, settings[view]) for view in range(2)]
        return {
            "boxes": torch.stack(boxes),
            "parameters": torch.stack([view.parameters for view in draws]),
            "sample_ids": sample_ids,
        }

    def crop(self, drawn: dict, size: int) -> dict:
        """Second half of `make_views`, on the device."""
        boxes, rows = self._to_device(drawn["boxes"]), self._to_device(drawn["sample_ids"])
        images = self.images[rows]
        if self.largest > 255:
            images = images.view(torch.uint16)
        images, largest = images.to(torch.float32), self.largest
        return {
            "pixels": torch.stack([crop_and_resize_batch(images, boxes[view], size, largest) for view in range(2)]),
            "parameters": self._to_device(drawn["parameters"]),
            "sample_ids": drawn["sample_ids"],
        }

    def _to_device(self, numbers: torch.Tensor) -> torch.Tensor:
        """Copy without synchronization. For a GPU this requires pinned memory."""
        device = self.images.device
        return (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)


def crop_and_resize_batch(images: torch.Tensor, boxes: torch.Tensor, size: int, largest: int = 255) -> torch.Tensor:
    """Crop and resize a batch, bilinear with antialiasing, by two matrix products per image.

    Args:
        images: float32 (B, C, H, W), levels 0..largest.
        boxes: int64 (B, 4), top, left, height, width, on the same device.
        size: Side length S of the result in pixels.
        largest: 255, or 65535 for deep images.

    Returns:
        uint8 (B, C, S, S), or uint16.
    """
    top, left, height, width = boxes.unbind(1)
    rows = _resize_matrix(top, height, images.shape[2], size)
    columns = _resize_matrix(left, width, images.shape[3], size)
    resized = rows[:, None] @ images @ columns[:, None].transpose(-1, -2)
    return resized.round().clamp(0, largest).to(torch.uint8 if largest == 255 else torch.uint16)


def _resize_matrix(start: torch.Tensor, length: torch.Tensor, extent: int, size: int) -> torch.Tensor:
    """float32 (B, S, extent): weight of each source pixel in each result pixel.

    A triangle filter, scaled with the reduction and cut off at the borders of the crop.
    """
    scale = (length.to(torch.float32) / size)[:, None, None]
    source = torch.arange(extent, device=start.device)[None, None, :] - start[:, None, None]
    center = (torch.arange(size, device=start.device, dtype=torch.float32)[None, :, None] + 0.5) * scale
    weights = (1 - (source + 0.5 - center).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = torch.where((source >= 0) & (source < length[:, None, None]), weights, 0.0)
    return weights / weights.sum(dim=2, keepdim=True)
