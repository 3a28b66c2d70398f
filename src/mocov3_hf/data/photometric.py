"""The device stage of the augmentation, in batches: jitter, grayscale, blur, solarize, flips, normalize.

Plain tensor code with one set of parameters per sample. It uses masks instead of branches and has no data-dependent
shapes, so that `torch.compile` fuses it into few kernels. On a CPU without compilation, each operation is computed for
the samples to which it applies. The results are equal up to float32 rounding.

All computation is in float32, independent of the returned dtype.

Images with another number of channels than 3 are augmented as in torchgeo's MoCo v3: neither hue nor saturation, and
grayscale is the mean of all channels.

Shapes: B batch size, C channels, S image size, K number of parameters (`views.PARAMETER_NAMES`).
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from .views import JITTER_ORDERS, NO_SOLARIZE, PARAMETER_NAMES


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as in PIL
_PASSES = 3
# On CPUs (benchmarks/photometric.py): pixels of the samples that are processed together, and the largest side of an
# image that is blurred by matrix products.
_CHUNK = 2**18
_SMALL = 64
_LARGEST = {torch.uint8: 255, torch.uint16: 65535}


class PhotometricStage(nn.Module):
    """Views and their parameters to normalized images. Without trainable parameters or saved state.

    Args:
        mean, std: Of the C channels, for pixels in [0, 1].
        max_blur_sigma: Largest standard deviation in pixels among the parameters, from `ViewSettings`; 0 for no blur.
            It fixes the width of the kernel: for a larger one, the blur is wrong.
        optional_operations: Whether to apply vertical flips, rotations and channel drop.
    """

    def __init__(
        self,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        max_blur_sigma: float = 2.0,
        optional_operations: bool = False,
    ):
        super().__init__()
        self.max_blur_sigma, self.optional_operations = float(max_blur_sigma), optional_operations
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        slots, hue_first = zip(*(_slots(order) for order in JITTER_ORDERS), strict=True)
        self.register_buffer("slots", torch.tensor(slots), persistent=False)
        self.register_buffer("hue_first", torch.tensor(hue_first), persistent=False)

    @torch.no_grad()
    def forward(
        self, pixels: torch.Tensor, parameters: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Apply all operations.

        Args:
            pixels: uint8 or uint16 (B, C, S, S).
            parameters: float32 (B, K).
            dtype: Of the result.

        Returns:
            (B, C, S, S) in `dtype`, normalized.
        """
        if pixels.device.type == "cpu" and not torch.compiler.is_compiling():
            number = max(1, _CHUNK // pixels[:1].numel())
            images = torch.empty(pixels.shape, dtype=dtype)
            for part, *chunk in zip(*(each.split(number) for each in (images, pixels, parameters)), strict=True):
                part.copy_(self.selected(*chunk))
            return images
        return self.batched(pixels, parameters, dtype)

    def batched(self, pixels: torch.Tensor, parameters: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`forward` with masks on any device: the path of GPUs and `torch.compile`."""
        values = by_name(parameters)
        image = self._jitter(pixels.to(torch.float32) / _LARGEST[pixels.dtype], values)
        image = torch.where(values["grayscale"] > 0.5, grayscale(image), image)
        if self.max_blur_sigma > 0:
            image = gaussian_blur(image, parameters[:, PARAMETER_NAMES.index("blur_sigma")], self.max_blur_sigma)
        image = solarize(image, values["solarize_threshold"])
        image = torch.where(values["flip"] > 0.5, image.flip(-1), image)
        if self.optional_operations:
            image = torch.where(values["vertical_flip"] > 0.5, image.flip(-2), image)
            for turns in (1, 2, 3):
                image = torch.where(values["rotation"] == turns, image.rot90(turns, (-2, -1)), image)
            image = torch.where(self._is_dropped(values["dropped_channel"]), self.mean, image)
        return ((image - self.mean) / self.std).to(dtype)

    def _is_dropped(self, dropped_channel: torch.Tensor) -> torch.Tensor:
        """bool (B, C, 1, 1) of parameters (B, 1, 1, 1)."""
        number = len(self.mean)
        channel = torch.floor(dropped_channel * number).clamp(max=number - 1)
        places = torch.arange(number, device=dropped_channel.device)[:, None, None]
        return (places == channel) & (dropped_channel > 0)

    def _jitter(self, image: torch.Tensor, values: dict) -> torch.Tensor:
        """Apply each sample's four operations in its own order, without branches.

        Contrast needs a mean over the image and hue is expensive. They divide the order into slots. Brightness and
        saturation are applied in every slot, with factor 1 (no change) where they do not belong.
        """
        order, is_rgb = values["order"].flatten().long(), image.shape[1] == 3
        slots, hue_first = self.slots[order], self.hue_first[order].view(-1, 1, 1, 1)

        def slot(image: torch.Tensor, index: int) -> torch.Tensor:
            bright_early, saturate, bright_late = slots[:, index, :, None, None, None].unbind(1)
            image = adjust_brightness(image, torch.where(bright_early, values["brightness"], 1.0))
            if is_rgb:
                image = adjust_saturation(image, torch.where(saturate, values["saturation"], 1.0))
            return adjust_brightness(image, torch.where(bright_late, values["brightness"], 1.0))

        image = slot(image, 0)
        if is_rgb:
            image = torch.where(hue_first, adjust_hue(image, values["hue"]), image)
        image = slot(image, 1)
        image = adjust_contrast(image, values["contrast"])
        image = slot(image, 2)
        if is_rgb:
            image = torch.where(hue_first, image, adjust_hue(image, values["hue"]))
        return slot(image, 3)

    def selected(self, pixels: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        """`forward` on a CPU: each operation for the samples that it changes."""
        samples = [dict(zip(PARAMETER_NAMES, row, strict=True)) for row in parameters.tolist()]
        columns = by_name(parameters)
        image = pixels.contiguous().to(torch.float32).div_(_LARGEST[pixels.dtype])
        jitter = {_BRIGHTNESS: ("brightness", 1, adjust_brightness), _CONTRAST: ("contrast", 1, adjust_contrast)}
        if image.shape[1] == 3:
            jitter |= {_SATURATION: ("saturation", 1, adjust_saturation), _HUE: ("hue", 0, adjust_hue)}

        def rows_where(is_changed: Callable[[dict[str, float]], bool]) -> list[int]:
            return [row for row, values in enumerate(samples) if is_changed(values)]

        for place in range(len(JITTER_ORDERS[0])):
            here = [JITTER_ORDERS[int(values["order"])][place] for values in samples]
            for operation, (name, neutral, adjust) in jitter.items():
                rows = [row for row, v in enumerate(samples) if here[row] == operation and v[name] != neutral]
                image = on_rows(adjust, rows, image, columns[name])
        image = on_rows(lambda part: part.copy_(grayscale(part)), rows_where(lambda v: v["grayscale"] > 0.5), image)
        image = on_rows(
            lambda part, sigma: gaussian_blur(part, sigma.flatten(), self.max_blur_sigma),
            rows_where(lambda v: v["blur_sigma"] > 0),
            image,
            columns["blur_sigma"],
        )
        rows = rows_where(lambda v: v["solarize_threshold"] < NO_SOLARIZE)
        image = on_rows(solarize, rows, image, columns["solarize_threshold"])
        image = on_rows(lambda part: part.flip(-1), rows_where(lambda v: v["flip"] > 0.5), image)
        if self.optional_operations:
            image = on_rows(lambda part: part.flip(-2), rows_where(lambda v: v["vertical_flip"] > 0.5), image)
            for turns in (1, 2, 3):
                rows = rows_where(lambda v, turns=turns: v["rotation"] == turns)
                image = on_rows(lambda part, turns=turns: part.rot90(turns, (-2, -1)), rows, image)
            image = torch.where(self._is_dropped(columns["dropped_channel"]), self.mean, image)
        return (image - self.mean).div_(self.std)


def by_name(parameters: torch.Tensor) -> dict[str, torch.Tensor]:
    """Parameters (B, K) as float32 columns (B, 1, 1, 1)."""
    return dict(zip(PARAMETER_NAMES, parameters.to(torch.float32)[:, :, None, None, None].unbind(1), strict=True))


def on_rows(operation: Callable, rows: list[int], image: torch.Tensor, *columns: torch.Tensor) -> torch.Tensor:
    """Apply an operation to some samples of (N, C, S, S), in place unless it is all, with their rows of (N, ...)."""
    if not rows:
        return image
    if len(rows) == len(image):
        return operation(image, *columns)
    index = torch.tensor(rows)
    part = operation(image.index_select(0, index), *(column.index_select(0, index) for column in columns))
    return image.index_copy_(0, index, part)


def _slots(order: tuple[int, ...]) -> tuple[list[list[bool]], bool]:
    """The positions of brightness and saturation in an order, and whether hue comes before contrast.

    Slots: 0 before contrast and hue; 1 between, hue first; 2 between, contrast first; 3 after both. Each slot holds
    brightness, saturation, brightness, in this order.
    """
    place = {operation: index for index, operation in enumerate(order)}
    hue_first = place[_HUE] < place[_CONTRAST]

    def slot(operation: int) -> int:
        after_hue, after_contrast = place[operation] > place[_HUE], place[operation] > place[_CONTRAST]
        if after_hue and after_contrast:
            return 3
        return 1 if after_hue else 2 if after_contrast else 0

    slots = [[False] * 3 for _ in range(4)]
    slots[slot(_BRIGHTNESS)][0 if place[_BRIGHTNESS] < place[_SATURATION] else 2] = True
    slots[slot(_SATURATION)][1] = True
    return slots, hue_first


def grayscale(image: torch.Tensor) -> torch.Tensor:
    """(B, 1, S, S): luma of RGB (B, 3, S, S), or else the mean of all channels (B, C, S, S)."""
    if image.shape[1] != 3:
        return image.mean(dim=1, keepdim=True)
    red, green, blue = image.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)[:, None]


def adjust_brightness(image: torch.Tensor, factor) -> torch.Tensor:
    """Multiply (B, C, S, S) in [0, 1] by a factor, a number or (B, 1, 1, 1)."""
    return (image * factor).clamp_(0, 1)


def adjust_contrast(image: torch.Tensor, factor) -> torch.Tensor:
    """Blend (B, C, S, S) in [0, 1] with the mean of its grayscale: factor 0 returns the mean, 1 the image."""
    mean = grayscale(image).mean(dim=(-3, -2, -1), keepdim=True)
    return (image * factor).add_(mean * (1 - factor)).clamp_(0, 1)


def adjust_saturation(image: torch.Tensor, factor) -> torch.Tensor:
    """Blend (B, C, S, S) in [0, 1] with its grayscale: factor 0 returns the grayscale, 1 the image."""
    return (image * factor).add_(grayscale(image) * (1 - factor)).clamp_(0, 1)


def adjust_hue(image: torch.Tensor, shift) -> torch.Tensor:
    """Shift the hue of (B, 3, S, S) in [0, 1] by turns, a number or (B, 1, 1, 1). S and V of HSV do not change."""
    red, green, blue = image.split(1, dim=1)
    value, low = image.amax(dim=1, keepdim=True), image.amin(dim=1, keepdim=True)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, 1.0)
    sixths = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixths = sixths + 6 * shift
    # HSV to RGB without branches: f(n) = v - c * max(0, min(k, 4 - k, 1)), k = (n + sixths) mod 6, n = 5, 3, 1.
    k = torch.cat([sixths + 5, sixths + 3, sixths + 1], dim=1)
    k = k.sub_(torch.floor(k / 6).mul_(6))  # faster than torch.remainder
    return value - torch.minimum(k, 4 - k).clamp_(0, 1).mul_(chroma)


def solarize(image: torch.Tensor, threshold) -> torch.Tensor:
    """Invert pixels of (B, C, S, S) in [0, 1] at or above a threshold (level 0..255), a number or (B, 1, 1, 1)."""
    return torch.where(image >= threshold / 255, 1 - image, image)


def gaussian_blur(image: torch.Tensor, sigma: torch.Tensor, max_sigma: float) -> torch.Tensor:
    """PIL's Gaussian blur: three box filters of fractional width in each direction, with replicated edges.

    In the interior, the three filters are one convolution. They run one by one only near the edges.

    Args:
        image: (B, C, S, S).
        sigma: (B,), standard deviations in pixels; 0 is no blur.
        max_sigma: Upper bound of sigma.
    """
    weights = _box_weights(sigma.to(torch.float32), max_sigma)
    if image.device.type == "cpu" and max(image.shape[-2:]) <= _SMALL:
        rows, columns = (_box_matrices(weights, size) for size in image.shape[-2:])
        return rows @ image @ columns.mT
    for dim in (-1, -2):
        image = _blur_along(image, weights, dim)
    return image


def _box_weights(sigma: torch.Tensor, max_sigma: float) -> torch.Tensor:
    """(B, reach + 1): weights of one box at each distance from its center.

    Three such boxes have exactly the variance sigma^2: Gwosdek et al., "Theoretical foundations of Gaussian
    convolution by extended box filtering" (2011), equations 7, 11 and 14, as in PIL.
    """
    variance = (sigma**2 / _PASSES)[:, None]
    reach = max(1, math.ceil((math.sqrt(12 * max_sigma**2 / _PASSES + 1) - 1) / 2))
    whole = torch.floor((torch.sqrt(12 * variance + 1) - 1) / 2)
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    distance = torch.arange(reach + 1, device=sigma.device, dtype=torch.float32)
    weights = (distance <= whole).float() + (distance == whole + 1) * fraction
    return weights / (2 * whole + 1 + 2 * fraction)


def _box_matrices(weights: torch.Tensor, size: int) -> torch.Tensor:
    """(B, 1, size, size): the three box filters along a dimension, with replicated edges, as one matrix."""
    reach = weights.shape[1] - 1
    offsets = torch.arange(-reach, reach + 1)
    places = (torch.arange(size)[:, None] + offsets).clamp(0, size - 1).expand(len(weights), -1, -1)
    taps = weights[:, None, offsets.abs()].expand(-1, size, -1)
    box = torch.zeros(len(weights), size, size).scatter_add_(2, places, taps)
    return (box @ box @ box)[:, None]


def _blur_along(image: torch.Tensor, weights: torch.Tensor, dim: int) -> torch.Tensor:
    reach, size = weights.shape[1] - 1, image.shape[dim]
    edge = _PASSES * reach  # pixels whose filter extends beyond the image
    if size <= 4 * edge:
        return _box_passes(image, weights, dim)
    # The first `edge` pixels depend only on the first 2 * edge. The wrong values at a strip's inner end are cut off.
    first = _box_passes(image.narrow(dim, 0, 2 * edge), weights, dim).narrow(dim, 0, edge)
    last = _box_passes(image.narrow(dim, size - 2 * edge, 2 * edge), weights, dim).narrow(dim, edge, edge)
    box = torch.cat([weights.flip(1), weights[:, 1:]], dim=1)
    inside = _correlate(image, _convolved(box, box, box), dim)
    return torch.cat([first, inside, last], dim=dim)


def _convolved(*kernels: torch.Tensor) -> torch.Tensor:
    """Full convolution of symmetric kernels (B, T): (B, 1 + sum of all T - 1)."""
    product = kernels[0]
    for kernel in kernels[1:]:
        taps = kernel.shape[1]
        windows = F.pad(product, (taps - 1, taps - 1)).unfold(1, taps, 1)
        product = (windows * kernel[:, None]).sum(-1)
    return product


def _correlate(image: torch.Tensor, kernel: torch.Tensor, dim: int) -> torch.Tensor:
    """Filter each sample (C, S, S) with its own kernel (T,) along a dimension, without padding."""
    return (_convolve if image.device.type == "cpu" else _shift_and_add)(image, kernel, dim)


def _convolve(image: torch.Tensor, kernel: torch.Tensor, dim: int) -> torch.Tensor:
    batch, channels, height, width = image.shape
    taps = kernel.repeat_interleave(channels, dim=0)[:, None]
    taps = taps[:, :, None, :] if dim == -1 else taps[:, :, :, None]
    result = F.conv2d(image.reshape(1, batch * channels, height, width), taps, groups=batch * channels)
    return result.view(batch, channels, *result.shape[-2:])


def _shift_and_add(image: torch.Tensor, kernel: torch.Tensor, dim: int) -> torch.Tensor:
    """For GPUs: one pass over memory when compiled, for any memory format."""
    taps = kernel[:, :, None, None, None].unbind(1)
    size = image.shape[dim] - len(taps) + 1
    result = taps[0] * image.narrow(dim, 0, size)
    for offset, tap in enumerate(taps[1:], start=1):
        result = torch.addcmul(result, tap, image.narrow(dim, offset, size))
    return result


def _box_passes(image: torch.Tensor, weights: torch.Tensor, dim: int) -> torch.Tensor:
    reach, size = weights.shape[1] - 1, image.shape[dim]
    weights = weights[:, :, None, None, None]
    pad = (reach, reach, 0, 0) if dim == -1 else (0, 0, reach, reach)
    for _ in range(_PASSES):
        padded = F.pad(image, pad, mode="replicate")
        image = weights[:, 0] * image
        for offset in range(1, reach + 1):
            pair = padded.narrow(dim, reach - offset, size) + padded.narrow(dim, reach + offset, size)
            image = image + weights[:, offset] * pair
    return image
