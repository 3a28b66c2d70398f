"""The device stage of the augmentation on CPUs: each operation only for the samples that it changes, in place.

Small images are processed many at a time and large ones one by one, so that they fit in the cache. Equal to
`PhotometricStage.batched` up to float32 rounding, and tested against it.

Shapes: B batch size, N some of its samples, C channels, S image size, K number of parameters.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from .photometric_operations import (
    PASSES,
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    box_weights,
    convolved,
    gaussian_blur,
    grayscale,
)
from .views import BRIGHTNESS, CONTRAST, HUE, JITTER_ORDERS, NO_SOLARIZE, PARAMETER_NAMES, SATURATION


LARGEST = {torch.uint8: 255, torch.uint16: 65535}

# From benchmarks/photometric.py: values of the samples that are processed together, and the largest side of an image
# that is blurred by matrix products.
_CHUNK = 2**18
_SMALL = 64
_JITTER = (
    (BRIGHTNESS, "brightness", adjust_brightness),
    (CONTRAST, "contrast", adjust_contrast),
    (SATURATION, "saturation", adjust_saturation),
)

Sample = dict[str, float]  # the parameters of one


def augment_on_cpu(
    pixels: torch.Tensor,
    parameters: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    max_blur_sigma: float,
    optional_operations: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Apply all operations: the arguments and the result of `PhotometricStage` and its `forward`."""
    samples = [dict(zip(PARAMETER_NAMES, row, strict=True)) for row in parameters.tolist()]
    sigma = torch.tensor([values["blur_sigma"] for values in samples if values["blur_sigma"] > 0])
    blur = Blur(sigma, max_blur_sigma, pixels.shape[-1])
    images = torch.empty(pixels.shape, dtype=dtype)
    number = max(1, _CHUNK // pixels[:1].numel())
    for start in range(0, len(samples), number):
        chunk, part = samples[start : start + number], images[start : start + number]
        image = part if dtype == torch.float32 else torch.empty(part.shape)
        image.copy_(pixels[start : start + number]).div_(LARGEST[pixels.dtype])
        image = _change_colors(image, chunk)
        image = on_rows(blur, _rows(chunk, lambda v: v["blur_sigma"] > 0), image)
        rows = _rows(chunk, lambda v: v["solarize_threshold"] < NO_SOLARIZE)
        image = on_rows(solarize_in_place, rows, image, _amounts(chunk, rows, "solarize_threshold"))
        image = _flip(image, chunk, optional_operations).sub_(mean)
        if optional_operations:
            _drop_channels(image, chunk)
        if dtype == torch.float32:
            torch.div(image, std, out=part)
        else:
            part.copy_(image.div_(std))
    return images


def _rows(samples: list[Sample], is_changed: Callable[[Sample], bool]) -> list[int]:
    return [row for row, values in enumerate(samples) if is_changed(values)]


def _amounts(samples: list[Sample], rows: list[int], name: str):
    """A parameter of some samples: a number for one, otherwise (N, 1, 1, 1)."""
    amounts = [samples[row][name] for row in rows]
    return amounts[0] if len(amounts) == 1 else torch.tensor(amounts).view(-1, 1, 1, 1)


def on_rows(operation: Callable, rows: list[int], image: torch.Tensor, *arguments) -> torch.Tensor:
    """Apply an operation, which may be in place, to some samples of (B, C, S, S). Returns all of them."""
    if not rows:
        return image
    if len(rows) == len(image):
        return operation(image, *arguments)
    index = torch.tensor(rows)
    return image.index_copy_(0, index, operation(image.index_select(0, index), *arguments))


def _change_colors(image: torch.Tensor, samples: list[Sample]) -> torch.Tensor:
    """Jitter in the order of each sample, then grayscale."""
    is_rgb = image.shape[1] == 3
    for place in range(len(JITTER_ORDERS[0])):
        here = [JITTER_ORDERS[int(values["order"])][place] for values in samples]
        for operation, name, adjust in _JITTER if is_rgb else _JITTER[:2]:
            rows = [row for row, values in enumerate(samples) if here[row] == operation and values[name] != 1]
            amounts = _amounts(samples, rows, name)
            image = on_rows(lambda part, by, adjust=adjust: adjust(part, by, out=part), rows, image, amounts)
        if is_rgb:
            rows = [row for row, values in enumerate(samples) if here[row] == HUE and values["hue"] != 0]
            image = turn_hues(image, rows, [samples[row]["hue"] for row in rows])
    return on_rows(lambda part: part.copy_(grayscale(part)), _rows(samples, lambda v: v["grayscale"] > 0.5), image)


def _flip(image: torch.Tensor, samples: list[Sample], optional_operations: bool) -> torch.Tensor:
    image = on_rows(lambda part: part.flip(-1), _rows(samples, lambda v: v["flip"] > 0.5), image)
    if optional_operations:
        image = on_rows(lambda part: part.flip(-2), _rows(samples, lambda v: v["vertical_flip"] > 0.5), image)
        for turns in (1, 2, 3):
            rows = _rows(samples, lambda v, turns=turns: v["rotation"] == turns)
            image = on_rows(lambda part, turns=turns: part.rot90(turns, (-2, -1)), rows, image)
    return image


def _drop_channels(image: torch.Tensor, samples: list[Sample]) -> None:
    """Set the channel that a sample loses to the mean, here 0."""
    number = image.shape[1]
    for row in _rows(samples, lambda v: v["dropped_channel"] > 0):
        image[row, min(int(samples[row]["dropped_channel"] * number), number - 1)] = 0


def turn_hues(image: torch.Tensor, rows: list[int], shifts: list[float]) -> torch.Tensor:
    """`adjust_hue` of some samples of (B, 3, S, S), in place. Those that `_turn_hue` handles alike go together."""
    kinds: dict[tuple[int, int], tuple[list[int], list[float]]] = {}
    for row, shift in zip(rows, shifts, strict=True):
        whole = round(6 * shift)
        rest = 6 * shift - whole
        members, rests = kinds.setdefault((whole, 1 if rest >= 0 else -1), ([], []))
        members.append(row)
        rests.append(abs(rest))
    for (whole, sign), (members, rests) in kinds.items():
        amounts = rests[0] if len(rests) == 1 else torch.tensor(rests).view(-1, 1, 1)
        image = on_rows(partial(_turn_hue, whole=whole, sign=sign), members, image, amounts)
    return image


def _turn_hue(image: torch.Tensor, rest, whole: int, sign: int) -> torch.Tensor:
    """Turn the hue of (N, 3, S, S) by whole + sign * rest sixths, in place; rest is a number up to 1/2 or (N, 1, 1).

    Without divisions and with a third of the memory traffic of `adjust_hue`. Turning by a whole number of sixths
    permutes the channels. An odd number also replaces each channel by v + m - channel, with v the largest and m the
    smallest one. For the rest, let p, q and r be a channel and the two that follow it, downwards if the sign is
    negative, and t = rest * (v - m). The channel p becomes

        clamp(p - q + clamp(q - r + m + t, m + t, v - t), m, v)

    In each sixth of the circle, one of the three is v and one is m, and this is the linear piece of HSV.
    """
    red, green, blue = planes = image.unbind(1)
    high = torch.maximum(red, green)
    torch.maximum(high, blue, out=high)
    low = torch.minimum(red, green)
    torch.minimum(low, blue, out=low)
    moved = (high - low).mul_(rest)
    least, most = low + moved, high - moved
    turn = whole // 2 if whole % 2 == 0 else (whole - 3) // 2
    turned = [planes[(channel - turn) % 3] for channel in range(3)]
    following = [turned[(channel + sign) % 3] for channel in range(3)]
    pairs = zip(turned, following, strict=True) if whole % 2 == 0 else zip(following, turned, strict=True)
    apart = [one - other for one, other in pairs]
    for channel, plane in enumerate(planes):
        torch.add(apart[(channel + sign) % 3], least, out=moved)
        moved.clamp_(least, most).add_(apart[channel])
        torch.clamp(moved, low, high, out=plane)
    return image


def solarize_in_place(image: torch.Tensor, threshold) -> torch.Tensor:
    """`solarize` without `torch.where`, which takes ten times as long. Below the threshold it changes no bit."""
    is_inverted = image.clone().ge_(threshold / 255)
    return image.addcmul_(is_inverted, torch.rsub(image, 1, alpha=2))


class Blur:
    """`gaussian_blur` for CPUs, which computes in advance what the samples of a batch need.

    Args:
        sigma: (N,) of the samples to blur, in the order in which they will be passed.
        max_sigma: As in `gaussian_blur`.
        size: Of the images.
    """

    def __init__(self, sigma: torch.Tensor, max_sigma: float, size: int):
        self.sigma, self.max_sigma = sigma, max_sigma
        weights = box_weights(sigma, max_sigma)
        self.edge = PASSES * (weights.shape[1] - 1)  # pixels whose filter extends beyond the image
        self.is_small = size <= max(_SMALL, 2 * self.edge)
        # The matrix of a small image has the rows of a larger one that are near an edge.
        self.matrices = _box_matrices(weights, size if self.is_small else 2 * self.edge)
        if not self.is_small:
            box = torch.cat([weights[:, 1:].flip(1), weights], dim=1)
            self.kernels = convolved(box, box, box)
            self.zeros = ((self.kernels == 0).sum(1) // 2).tolist()  # at either end
        self.used = 0

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Blur the next (N, C, S, S), which may be in place."""
        first, self.used = self.used, self.used + len(image)
        if self.is_small:
            matrices = self.matrices[first : self.used, None]
            return matrices @ image @ matrices.mT
        if not torch.backends.mkldnn.is_available():
            # torch's own convolution with many groups takes seven times as long as this.
            return gaussian_blur(image, self.sigma[first : self.used], self.max_sigma)
        for row, sample in enumerate(image, start=first):
            kernel = self.kernels[row, self.zeros[row] : self.kernels.shape[1] - self.zeros[row]]
            self._blur(sample, kernel, self.matrices[row].view(2, self.edge, 2 * self.edge))
        return image

    def _blur(self, image: torch.Tensor, kernel: torch.Tensor, ends: torch.Tensor) -> None:
        """Blur (C, S, S). Each direction is a depthwise convolution of rows, in which a column is a channel."""
        channels, size, _ = image.shape
        plane, edge = size * size, self.edge
        padding = len(kernel) // 2
        kernel = kernel.expand(size, 1, 1, -1).contiguous()
        columns = image.as_strided((channels, size, 1, size), (plane, 1, plane, size))
        strips = image.as_strided((channels, 2, 2 * edge, size), (plane, plane - 2 * edge * size, size, 1))
        for _ in range(2):
            blurred = F.conv2d(columns, kernel, padding=(0, padding), groups=size)[:, :, 0].mT.contiguous()
            # The first and the last rows, which the convolution pads with zeros.
            blurred.as_strided((channels, 2, edge, size), (plane, plane - edge * size, size, 1)).copy_(ends @ strips)
            image.copy_(blurred.mT)


def _box_matrices(weights: torch.Tensor, size: int) -> torch.Tensor:
    """(N, size, size): the three box filters along a dimension, with replicated edges, as one matrix."""
    reach = weights.shape[1] - 1
    offsets = torch.arange(-reach, reach + 1)
    places = (torch.arange(size)[:, None] + offsets).clamp(0, size - 1).expand(len(weights), -1, -1)
    taps = weights[:, None, offsets.abs()].expand(-1, size, -1)
    box = torch.zeros(len(weights), size, size).scatter_add_(2, places, taps)
    return box @ box @ box
