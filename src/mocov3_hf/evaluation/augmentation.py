"""Augmentations of fine-tuning on torchvision's: RandAugment with a drawn magnitude, and the mixing of batches."""

from dataclasses import dataclass
from functools import cache

import torch
from torchvision.transforms import v2


# Legend of dimensions: B batch, C classes, H W image.

# The scale of magnitudes, 0 to 10, in steps of a tenth.
MAX_MAGNITUDE = 10
_BINS = 10 * MAX_MAGNITUDE + 1


@dataclass(frozen=True)
class RandAugment:
    """RandAugment (Cubuk et al. 2020) with a magnitude drawn for every operation: uint8 (3, H, W) to the same.

    The operations and their ranges are torchvision's, whose strength always increases with the magnitude; what
    torchvision has no word for is added around them: the normal draw of the magnitude, and that an operation may be
    left out.

    Args:
        num_ops: operations per image, one after the other, drawn with repetition.
        magnitude: mean of the magnitude, 0 (nothing) to 10 (the strongest of torchvision's table).
        std: standard deviation of the magnitude, which is cut off at 0 and 10 and rounded to a tenth.
        probability: of each operation to be applied.
        fill: levels (3,) of what is moved in from outside; None for black.

    Raises:
        ValueError: a value out of its range.
    """

    num_ops: int = 2
    magnitude: float = 9.0
    std: float = 0.5
    probability: float = 1.0
    fill: tuple[int, ...] | None = None

    def __post_init__(self):
        if (
            self.num_ops < 0
            or not 0 <= self.magnitude <= MAX_MAGNITUDE
            or not self.std >= 0
            or not 0 <= self.probability <= 1
        ):
            raise ValueError(
                f"RandAugment needs operations >= 0, a magnitude in 0..{MAX_MAGNITUDE}, a deviation >= 0 and a"
                f" probability in 0..1, got {self.num_ops}, {self.magnitude}, {self.std} and {self.probability}"
            )

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        for _ in range(self.num_ops):
            if torch.rand(()) < self.probability:
                image = _operation(self.draw_bin(), self.fill)(image)
        return image

    def draw_bin(self) -> int:
        """Ten times a magnitude."""
        drawn = self.magnitude + self.std * torch.randn(()).item()
        return round(10 * min(max(drawn, 0.0), MAX_MAGNITUDE))


@cache
def _operation(index: int, fill: tuple[float, ...] | None) -> v2.RandAugment:
    """One operation of torchvision's at one of the magnitudes: which, and in which direction, it draws itself."""
    return v2.RandAugment(
        num_ops=1,
        magnitude=index,
        num_magnitude_bins=_BINS,
        interpolation=v2.InterpolationMode.BILINEAR,
        fill=None if fill is None else list(fill),
    )


def batch_mixing(mixup_alpha: float, cutmix_alpha: float, num_classes: int) -> v2.Transform | None:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) of a batch, one of the two by a fair coin.

    Args:
        mixup_alpha, cutmix_alpha: of the Beta distribution of the shares; 0 leaves one out.
        num_classes: C.

    Returns:
        Images (B, 3, H, W) and labels (B,) to images and soft labels (B, C), drawing from torch's generator; None
        where both are left out.
    """
    mixings = [
        kind(alpha=alpha, num_classes=num_classes)
        for kind, alpha in ((v2.MixUp, mixup_alpha), (v2.CutMix, cutmix_alpha))
        if alpha > 0
    ]
    if len(mixings) == 2:
        return v2.RandomChoice(mixings)
    return mixings[0] if mixings else None
