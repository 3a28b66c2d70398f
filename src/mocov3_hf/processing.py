"""The image processor of evaluation, saved with every model: resize, centre crop, normalise."""

from transformers import BitImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling


RESAMPLING = {"bilinear": PILImageResampling.BILINEAR, "bicubic": PILImageResampling.BICUBIC}


def build_image_processor(image_size: int = 224, resample: str = "bilinear") -> BitImageProcessor:
    """
    Evaluation's view of an image: the short side to 256/224 of `image_size`, then its centre, `(3, H, W)` float32.

    Args:
        image_size (`int`, *optional*, defaults to 224):
            Side of the crop in pixels; the short side becomes `round(image_size * 256 / 224)` before.
        resample (`str`, *optional*, defaults to `"bilinear"`):
            `"bilinear"` (official evaluation) or `"bicubic"` (fine-tuned models).

    Raises:
        ValueError: an unknown `resample`.
    """
    if resample not in RESAMPLING:
        raise ValueError(f"resample must be one of {sorted(RESAMPLING)}, got {resample!r}")
    # Every value is passed: the defaults of the class are CLIP's (its mean and deviation, bicubic, short side 224).
    return BitImageProcessor(
        do_resize=True,
        size={"shortest_edge": round(image_size * 256 / 224)},
        resample=RESAMPLING[resample],
        do_center_crop=True,
        crop_size={"height": image_size, "width": image_size},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(IMAGENET_DEFAULT_MEAN),
        image_std=list(IMAGENET_DEFAULT_STD),
        do_convert_rgb=True,
    )
