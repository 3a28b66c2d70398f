"""Fine-tuning augmentation of the published recipes, by timm: RandAugment, random erasing, Mixup and CutMix."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


# Legend of dimensions: B batch, C classes, H W image.
# timm is imported where it is used: it loads its whole model zoo, which no other command needs.

MAX_MAGNITUDE = 10
# At exactly 10 timm posterizes to 0 bits: a black image, or an error in Pillow 13.
_BELOW_MAX = 9.999


class SeededByTorch:
    """An augmentation of timm, whose draws become a function of torch's generator.

    timm draws from `random`, NumPy and torch. Each call seeds the first two with a draw from torch's generator, and
    restores their state afterwards.

    Args:
        augmentation: the callable of timm.
    """

    def __init__(self, augmentation: Callable):
        self.augmentation = augmentation

    def __call__(self, *inputs) -> Any:
        python_state, numpy_state = random.getstate(), np.random.get_state()
        seed = torch.randint(2**32, (), dtype=torch.int64).item()
        random.seed(seed)
        np.random.seed(seed)
        try:
            return self.augmentation(*inputs)
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)

    def __repr__(self) -> str:
        return repr(self.augmentation)


@dataclass(frozen=True)
class RandAugmentOptions:
    """RandAugment (Cubuk et al. 2020) as in timm. The defaults are `rand-m9-mstd0.5-inc1-p1` in timm's notation.

    Args:
        num_ops: operations per image, applied in sequence, drawn with replacement.
        magnitude: mean of the magnitude, 0 to 10.
        std: standard deviation of the magnitude, drawn for each operation and clipped to [0, 10].
        probability: of applying each operation. The default of timm's notation is 0.5.

    Raises:
        ValueError: a value out of range.
    """

    num_ops: int = 2
    magnitude: float = 9.0
    std: float = 0.5
    probability: float = 1.0

    def __post_init__(self):
        if (
            self.num_ops < 0
            or not 0 <= self.magnitude <= MAX_MAGNITUDE
            or not self.std >= 0
            or not 0 <= self.probability <= 1
        ):
            raise ValueError(
                f"RandAugment needs num_ops >= 0, a magnitude in 0..{MAX_MAGNITUDE}, a std >= 0 and a probability in"
                f" 0..1, got {self.num_ops}, {self.magnitude}, {self.std} and {self.probability}"
            )

    def build(self, mean: tuple[float, ...], resample: int) -> SeededByTorch:
        """The transform of a PIL image, with timm's operations that get stronger as the magnitude increases.

        Args:
            mean: RGB in 0..1, the fill color outside the image.
            resample: PIL's interpolation filter.
        """
        from timm.data.auto_augment import RandAugment, rand_augment_choices, rand_augment_ops

        fill = tuple(round(255 * value) for value in mean)
        hparams = {
            "img_mean": fill,
            "interpolation": resample,
            "magnitude_std": self.std,
            "magnitude_max": _BELOW_MAX,
        }
        choices = rand_augment_choices("", increasing=True)
        return SeededByTorch(
            RandAugment(rand_augment_ops(self.magnitude, self.probability, hparams, choices), self.num_ops)
        )


def random_erasing(probability: float) -> SeededByTorch:
    """Random erasing (Zhong et al. 2020) of a normalized image (3, H, W), in place: a rectangle of 2 to 33 % of the
    area becomes standard normal noise, drawn for each pixel."""
    from timm.data.random_erasing import RandomErasing

    return SeededByTorch(RandomErasing(probability, mode="pixel", device="cpu"))


def batch_mixing(mixup_alpha: float, cutmix_alpha: float, num_classes: int) -> SeededByTorch | None:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019), chosen with equal probability for each batch.

    Label smoothing is left to the loss, which gives the same soft labels and also covers training without mixing.

    Args:
        mixup_alpha, cutmix_alpha: parameters of the Beta distributions; 0 disables one of the two.
        num_classes: C.

    Returns:
        A function of images (B, 3, H, W), changed in place, and labels (B,), with B even, which returns the images and
        soft labels (B, C). None when both are disabled.
    """
    if mixup_alpha == 0 and cutmix_alpha == 0:
        return None
    from timm.data import Mixup

    return SeededByTorch(Mixup(mixup_alpha, cutmix_alpha, label_smoothing=0.0, num_classes=num_classes))
