"""The device half of the augmentation, in batches: jitter, grayscale, blur, solarize, flip, normalise.

Plain tensor code with one set of parameters per sample, masks instead of branches and no shapes that depend on data,
so that `torch.compile` makes few kernels of it. It computes in float32 and returns the type asked for.

Legend: B batch, S image size, K parameters (`views.PARAMETER_NAMES`).
"""

import math

import torch
from torch import nn

from .views import JITTER_ORDERS, PARAMETER_NAMES


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_HUE = 3
_PASSES = 3


class PhotometricStage(nn.Module):
    """uint8 views and their parameters to normalised images. Holds no parameters and saves nothing.

    Args:
        mean, std: of the channels, for pixels in [0, 1].
        max_blur_sigma: the largest standard deviation in pixels that parameters may hold; it fixes the kernel's width.
    """

    def __init__(self, mean=IMAGENET_MEAN, std=IMAGENET_STD, max_blur_sigma: float = 2.0):
        super().__init__()
        self.max_blur_sigma = max_blur_sigma
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        # For each order: the three linear operations in turn, and how many of them come before hue.
        linear = [[op for op in order if op != _HUE] for order in JITTER_ORDERS]
        self.register_buffer("linear_ops", torch.tensor(linear), persistent=False)
        self.register_buffer(
            "hue_position", torch.tensor([order.index(_HUE) for order in JITTER_ORDERS]), persistent=False
        )

    def forward(
        self, pixels: torch.Tensor, parameters: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Apply everything.

        Args:
            pixels: uint8 (B, 3, S, S).
            parameters: float32 (B, K).
            dtype: of the result.

        Returns:
            (B, 3, S, S) in `dtype`, normalised.
        """
        values = dict(zip(PARAMETER_NAMES, parameters.to(torch.float32).unbind(1), strict=True))
        image = pixels.to(torch.float32) / 255
        image = self.jitter(image, values)
        gray = grayscale(image)
        image = torch.where(_column(values["grayscale"]) > 0.5, gray, image)
        image = gaussian_blur(image, values["blur_sigma"], self.max_blur_sigma)
        image = solarize(image, values["solarize_threshold"])
        image = torch.where(_column(values["flip"]) > 0.5, image.flip(-1), image)
        return ((image - self.mean) / self.std).to(dtype)

    def jitter(self, image: torch.Tensor, values: dict) -> torch.Tensor:
        """Brightness, contrast, saturation and hue in each sample's own order.

        The first three are blends of the image, its grayscale and that one's mean, so one formula with per-sample
        coefficients serves each turn; hue is computed once, between the turns before and after it.
        """
        order = values["order"].long()
        ops, hue_position = self.linear_ops[order], self.hue_position[order]
        factors = torch.stack([values["brightness"], values["contrast"], values["saturation"]], dim=1)
        for before in (True, False):
            for turn in range(3):
                active = (hue_position > turn) == before
                op = ops[:, turn]
                factor = torch.where(active, factors.gather(1, op[:, None])[:, 0], 1.0)
                image = _blend(image, factor, to_mean=op == 1, to_gray=op == 2)
            if before:
                image = adjust_hue(image, values["hue"])
        return image


def _column(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


def _blend(image, factor, to_mean, to_gray):
    gray = grayscale(image)
    mean = gray.mean(dim=(1, 2, 3), keepdim=True)
    rest = 1 - factor
    blended = _column(factor) * image + _column(rest * to_gray) * gray + _column(rest * to_mean) * mean
    return blended.clamp(0, 1)


def grayscale(image: torch.Tensor) -> torch.Tensor:
    """Luma (B, 1, S, S) of RGB (B, 3, S, S), with the ITU-R 601 weights PIL uses."""
    red, green, blue = image.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]


def adjust_hue(image: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Turn the hue of (B, 3, S, S) in [0, 1] by (B,) turns, through HSV; saturation and value stay."""
    red, green, blue = image.unbind(1)
    value, low = image.amax(dim=1), image.amin(dim=1)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, 1.0)
    sixths = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixths = sixths + 6 * shift.view(-1, 1, 1)
    # HSV to RGB without cases: f(n) = v - c * max(0, min(k, 4 - k, 1)), k = (n + sixths) mod 6.
    channels = []
    for n in (5, 3, 1):
        k = torch.remainder(sixths + n, 6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)


def gaussian_blur(image: torch.Tensor, sigma: torch.Tensor, max_sigma: float) -> torch.Tensor:
    """PIL's Gaussian blur: three box filters of fractional width in each direction, edges replicated at each.

    Args:
        image: (B, 3, S, S).
        sigma: (B,) standard deviations in pixels; 0 leaves a sample as it is.
        max_sigma: upper bound of sigma.
    """
    # Width of one box so that three give variance sigma^2 (Gwosdek et al., "Theoretical foundations of Gaussian
    # convolution by extended box filtering"): radius r whole pixels to each side and a fraction of the next.
    radius = (torch.sqrt(12 * sigma**2 / _PASSES + 1) - 1) / 2
    reach = max(1, math.ceil((math.sqrt(12 * max_sigma**2 / _PASSES + 1) - 1) / 2))
    whole = torch.floor(radius)
    # Extended box: weights 1 inside, `fraction` at the two ends, with the exact variance.
    length = 2 * whole + 1
    fraction = length * (whole * (whole + 1) - 3 * sigma**2 / _PASSES)
    fraction = fraction / (6 * (sigma**2 / _PASSES - (whole + 1) ** 2))
    total = length + 2 * fraction
    offsets = torch.arange(reach + 1, device=image.device)
    weights = torch.where(
        offsets[None] <= whole[:, None], 1.0, torch.where(offsets[None] == whole[:, None] + 1, fraction[:, None], 0.0)
    )
    weights = weights / total[:, None]
    for dim in (-1, -2):
        size = image.shape[dim]
        for _ in range(_PASSES):
            pad = (reach, reach, 0, 0) if dim == -1 else (0, 0, reach, reach)
            padded = nn.functional.pad(image, pad, mode="replicate")
            image = _column(weights[:, 0]) * image
            for offset in range(1, reach + 1):
                both = padded.narrow(dim, reach - offset, size) + padded.narrow(dim, reach + offset, size)
                image = image + _column(weights[:, offset]) * both
    return image


def solarize(image: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Invert values of (B, 3, S, S) in [0, 1] at or above (B,) thresholds in levels of 0..255."""
    return torch.where(image >= _column(threshold) / 255, 1 - image, image)
