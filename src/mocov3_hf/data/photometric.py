"""The device stage of the augmentation, in batches: jitter, grayscale, blur, solarize, flips, normalize.

Plain tensor code with one set of parameters per sample. It uses masks instead of branches and has no data-dependent
shapes, so that `torch.compile` fuses it into few kernels. On a CPU without compilation, each operation is computed for
the samples to which it applies. The results are equal up to float32 rounding.

All computation is in float32, independent of the returned dtype.

Images with another number of channels than 3 are augmented as in torchgeo's MoCo v3: neither hue nor saturation, and
grayscale is the mean of all channels.

Shapes: B batch size, C channels, S image size, K number of parameters (`views.PARAMETER_NAMES`).
"""

import torch
from torch import nn

from .photometric_cpu import LARGEST, augment_on_cpu
from .photometric_operations import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    gaussian_blur,
    grayscale,
    solarize,
)
from .views import BRIGHTNESS, CONTRAST, HUE, JITTER_ORDERS, PARAMETER_NAMES, SATURATION


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
            return augment_on_cpu(
                pixels, parameters, self.mean, self.std, self.max_blur_sigma, self.optional_operations, dtype
            )
        return self.batched(pixels, parameters, dtype)

    def batched(self, pixels: torch.Tensor, parameters: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`forward` with masks on any device: the path of GPUs and `torch.compile`."""
        values = by_name(parameters)
        image = self._jitter(pixels.to(torch.float32) / LARGEST[pixels.dtype], values)
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


def by_name(parameters: torch.Tensor) -> dict[str, torch.Tensor]:
    """Parameters (B, K) as float32 columns (B, 1, 1, 1)."""
    return dict(zip(PARAMETER_NAMES, parameters.to(torch.float32)[:, :, None, None, None].unbind(1), strict=True))


def _slots(order: tuple[int, ...]) -> tuple[list[list[bool]], bool]:
    """The positions of brightness and saturation in an order, and whether hue comes before contrast.

    Slots: 0 before contrast and hue; 1 between, hue first; 2 between, contrast first; 3 after both. Each slot holds
    brightness, saturation, brightness, in this order.
    """
    place = {operation: index for index, operation in enumerate(order)}
    hue_first = place[HUE] < place[CONTRAST]

    def slot(operation: int) -> int:
        after_hue, after_contrast = place[operation] > place[HUE], place[operation] > place[CONTRAST]
        if after_hue and after_contrast:
            return 3
        return 1 if after_hue else 2 if after_contrast else 0

    slots = [[False] * 3 for _ in range(4)]
    slots[slot(BRIGHTNESS)][0 if place[BRIGHTNESS] < place[SATURATION] else 2] = True
    slots[slot(SATURATION)][1] = True
    return slots, hue_first
