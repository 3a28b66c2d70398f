"""The photometric operations on batches of images, on any device. photometric_cpu.py has faster forms for CPUs.

Shapes: B batch size, C channels, S image size.
"""

import math

import torch
from torch.nn import functional as F


PASSES = 3  # of the box filter that make a blur
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as in PIL


def grayscale(image: torch.Tensor) -> torch.Tensor:
    """(B, 1, S, S): luma of RGB (B, 3, S, S), or else the mean of all channels (B, C, S, S)."""
    if image.shape[1] != 3:
        return image.mean(dim=1, keepdim=True)
    red, green, blue = image.unbind(1)
    return (_LUMA[0] * red).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])[:, None]


def adjust_brightness(image: torch.Tensor, factor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply (B, C, S, S) in [0, 1] by a factor, a number or (B, 1, 1, 1). `out` may be the image itself."""
    return torch.mul(image, factor, out=out).clamp_(0, 1)


def adjust_contrast(image: torch.Tensor, factor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Blend (B, C, S, S) in [0, 1] with the mean of its grayscale: factor 0 returns the mean, 1 the image."""
    mean = grayscale(image.mean(dim=(-2, -1), keepdim=True))
    return torch.mul(image, factor, out=out).add_(mean * (1 - factor)).clamp_(0, 1)


def adjust_saturation(image: torch.Tensor, factor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Blend (B, C, S, S) in [0, 1] with its grayscale: factor 0 returns the grayscale, 1 the image."""
    gray = grayscale(image).mul_(1 - factor)
    return torch.mul(image, factor, out=out).add_(gray).clamp_(0, 1)


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
    weights = box_weights(sigma.to(torch.float32), max_sigma)
    for dim in (-1, -2):
        image = _blur_along(image, weights, dim)
    return image


def box_weights(sigma: torch.Tensor, max_sigma: float) -> torch.Tensor:
    """(B, reach + 1): weights of one box at each distance from its center.

    Three such boxes have exactly the variance sigma^2: Gwosdek et al., "Theoretical foundations of Gaussian
    convolution by extended box filtering" (2011), equations 7, 11 and 14, as in PIL.
    """
    variance = (sigma**2 / PASSES)[:, None]
    reach = max(1, math.ceil((math.sqrt(12 * max_sigma**2 / PASSES + 1) - 1) / 2))
    whole = torch.floor((torch.sqrt(12 * variance + 1) - 1) / 2)
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    distance = torch.arange(reach + 1, device=sigma.device, dtype=torch.float32)
    weights = (distance <= whole).float() + (distance == whole + 1) * fraction
    return weights / (2 * whole + 1 + 2 * fraction)


def _blur_along(image: torch.Tensor, weights: torch.Tensor, dim: int) -> torch.Tensor:
    reach, size = weights.shape[1] - 1, image.shape[dim]
    edge = PASSES * reach  # pixels whose filter extends beyond the image
    if size <= 4 * edge:
        return _box_passes(image, weights, dim)
    # The first `edge` pixels depend only on the first 2 * edge. The wrong values at a strip's inner end are cut off.
    first = _box_passes(image.narrow(dim, 0, 2 * edge), weights, dim).narrow(dim, 0, edge)
    last = _box_passes(image.narrow(dim, size - 2 * edge, 2 * edge), weights, dim).narrow(dim, edge, edge)
    box = torch.cat([weights.flip(1), weights[:, 1:]], dim=1)
    inside = _shift_and_add(image, convolved(box, box, box), dim)
    return torch.cat([first, inside, last], dim=dim)


def convolved(*kernels: torch.Tensor) -> torch.Tensor:
    """Full convolution of symmetric kernels (B, T): (B, 1 + sum of all T - 1)."""
    product = kernels[0]
    for kernel in kernels[1:]:
        taps = kernel.shape[1]
        windows = F.pad(product, (taps - 1, taps - 1)).unfold(1, taps, 1)
        product = (windows * kernel[:, None]).sum(-1)
    return product


def _shift_and_add(image: torch.Tensor, kernel: torch.Tensor, dim: int) -> torch.Tensor:
    """Filter each sample (C, S, S) with its own kernel (T,) along a dimension, without padding.

    Compiled, it is one pass over memory, for any memory format.
    """
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
    for _ in range(PASSES):
        padded = F.pad(image, pad, mode="replicate")
        image = weights[:, 0] * image
        for offset in range(1, reach + 1):
            pair = padded.narrow(dim, reach - offset, size) + padded.narrow(dim, reach + offset, size)
            image = image + weights[:, offset] * pair
    return image
