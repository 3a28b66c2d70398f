"""Small data sets whole in device memory: uint8 images live there and are cropped there, in batches.

Order and parameters are the loader's own, so a run sees the same crops with and without the cache; pixels agree with
the CPU stage to one level (that one rounds between its two passes).
"""

import torch

from .bad_images import BadImage
from .cpu_stage import decode_first_usable
from .sources import MapSource
from .views import ViewSettings, crop_boxes, draw_view


# A quarter of a small GPU. Larger sets are better decoded as they come.
MAX_BYTES = 4 << 30


class DeviceCache:
    """All images of a source, decoded, on a device.

    Images of unequal sizes are padded to the largest height and width; padding is never read.

    Args:
        source: a `MapSource`.
        device: where to keep the images.
        max_bytes: refuse larger sets.

    Attributes:
        images: uint8 (N, 3, H, W) on the device.
        heights, widths: int64 (N,) on the CPU, in pixels.
        bad: the `BadImage`s met; their neighbours stand in for them.

    Raises:
        ValueError: a stream, or too large: with the size it would have.
    """

    def __init__(self, source: MapSource, device: torch.device | str, max_bytes: int = MAX_BYTES):
        if not isinstance(source, MapSource):
            raise ValueError("a streamed data set cannot be cached on the device: leave out --streaming")
        self.bad: list[BadImage] = []
        decoded, stored, batch = [], 0, source.open_batch(torch.arange(len(source)))
        for row in range(len(source)):
            image = decode_first_usable(batch.candidates(row), None, self.bad)[0]
            decoded.append(image)
            stored += image.numel()
            if stored > max_bytes:
                raise ValueError(
                    f"the first {row + 1} of {len(source)} images already fill {stored >> 20} MiB, more than the "
                    f"{max_bytes >> 20} MiB allowed on the device: leave out --cache_images_on_device"
                )
        self.heights = torch.tensor([image.shape[1] for image in decoded])
        self.widths = torch.tensor([image.shape[2] for image in decoded])
        shape = (len(decoded), 3, int(self.heights.max()), int(self.widths.max()))
        padded = shape[0] * shape[1] * shape[2] * shape[3]
        if padded > max_bytes:
            raise ValueError(
                f"{shape[0]} images padded to {shape[2]}x{shape[3]} pixels fill {padded >> 20} MiB, more than the "
                f"{max_bytes >> 20} MiB allowed on the device: leave out --cache_images_on_device"
            )
        images = torch.zeros(shape, dtype=torch.uint8)
        for row, image in enumerate(decoded):
            images[row, :, : image.shape[1], : image.shape[2]] = image
        self.images = images.to(device)

    def make_views(
        self, sample_ids: torch.Tensor, settings: tuple[ViewSettings, ViewSettings], seed: int, epoch: int
    ) -> dict:
        """Both views of a batch.

        Args:
            sample_ids: int64 (B,) on the CPU.
            settings, seed, epoch: as in `cpu_stage.make_views`.

        Returns:
            pixels uint8 (2, B, 3, S, S) and parameters float32 (2, B, K) on the device, sample_ids as given.
        """
        device, size = self.images.device, settings[0].image_size
        heights, widths = self.heights[sample_ids], self.widths[sample_ids]
        images = self.images[sample_ids.to(device, non_blocking=True)].to(torch.float32)
        pixels, parameters = [], []
        for view in range(2):
            draws = draw_view(settings[view], seed, epoch, sample_ids, view)
            boxes = crop_boxes(draws, heights, widths, settings[view]).to(device, non_blocking=True)
            pixels.append(crop_and_resize_batch(images, boxes, size))
            parameters.append(draws.parameters.to(device, non_blocking=True))
        return {"pixels": torch.stack(pixels), "parameters": torch.stack(parameters), "sample_ids": sample_ids}


def crop_and_resize_batch(images: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
    """Crop and resize with antialiasing, bilinear, a batch at once by two matrix products per image.

    Args:
        images: float32 (B, 3, H, W), levels of 0..255.
        boxes: int64 (B, 4), top, left, height, width, on the same device.
        size: S.

    Returns:
        uint8 (B, 3, S, S).
    """
    top, left, height, width = boxes.unbind(1)
    rows = _resize_matrix(top, height, images.shape[2], size)
    columns = _resize_matrix(left, width, images.shape[3], size)
    resized = rows[:, None] @ images @ columns[:, None].transpose(-1, -2)
    return resized.round().clamp(0, 255).to(torch.uint8)


def _resize_matrix(start: torch.Tensor, length: torch.Tensor, extent: int, size: int) -> torch.Tensor:
    """float32 (B, S, extent): weights of each source pixel in each result pixel, of a triangle filter as wide as the
    reduction, cut off at the borders of the crop."""
    scale = (length.to(torch.float32) / size)[:, None, None]
    source = torch.arange(extent, device=start.device)[None, None, :] - start[:, None, None]
    centre = (torch.arange(size, device=start.device, dtype=torch.float32)[None, :, None] + 0.5) * scale
    weights = (1 - (source + 0.5 - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = torch.where((source >= 0) & (source < length[:, None, None]), weights, 0.0)
    return weights / weights.sum(dim=2, keepdim=True)
