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
        return self.crop(self.draw(sample_ids, settings, seed, epoch), settings[0].image_size)

    def draw(
        self, sample_ids: torch.Tensor, settings: tuple[ViewSettings, ViewSettings], seed: int, epoch: int
    ) -> dict:
        """The first half of `make_views`, on the CPU: boxes int64 (2, B, 4), parameters and sample_ids."""
        heights, widths = self.heights[sample_ids], self.widths[sample_ids]
        draws = [draw_view(settings[view], seed, epoch, sample_ids, view) for view in range(2)]
        boxes = [crop_boxes(draws[view], heights, widths, settings[view]) for view in range(2)]
        return {
            "boxes": torch.stack(boxes),
            "parameters": torch.stack([view.parameters for view in draws]),
            "sample_ids": sample_ids,
        }

    def crop(self, drawn: dict, size: int) -> dict:
        """The second half, on the device."""
        boxes, rows = self._to_device(drawn["boxes"]), self._to_device(drawn["sample_ids"])
        images = self.images[rows].to(torch.float32)
        return {
            "pixels": torch.stack([crop_and_resize_batch(images, boxes[view], size) for view in range(2)]),
            "parameters": self._to_device(drawn["parameters"]),
            "sample_ids": drawn["sample_ids"],
        }

    def _to_device(self, numbers: torch.Tensor) -> torch.Tensor:
        """A copy that nobody waits for: on a GPU, that takes memory which the system does not move."""
        device = self.images.device
        return (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)


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
