"""Channels, bit depth and normalization of the images of a run: from the recipe, or found in the data."""

import dataclasses
import sys
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import BaseImageProcessor

from ..data.labeled import EvaluationTransform
from ..data.photometric import PhotometricStage
from ..data.pixel_statistics import estimate_pixels
from ..loading import load_config, num_channels_of
from ..model.configuration_mocov3 import MoCoV3Config
from ..processing import PixelFormat, ProcessorTransform, build_image_processor, checked_range
from ..reporting import UsageError
from .recipe import Recipe, resumed_recipe


# Options that a run settles. A resumed run takes those of its checkpoint, not those of a new sample.
SETTLED = ("num_channels", "pixel_range", "image_mean", "image_std")


def settle_pixels(recipe: Recipe, source) -> tuple[Recipe, tuple[str, ...]]:
    """
    The recipe with the channels, range, mean and standard deviation that the images have, and what was found, one
    clause each. The recipe of 8-bit RGB images does not change.

    Args:
        recipe: Options of the run.
        source: The images.

    Raises:
        UsageError, ValueError: images that the model does not take, or of different numbers of channels; values for
            another number of channels.
    """
    recipe = with_settled_options(recipe)
    data, model_channels = recipe.data, channels_of_model(recipe)
    automatic = "auto" in (data.image_mean, data.image_std)
    is_adapted = recipe.model.model is not None and recipe.model.adapt_input_channels
    found = estimate_pixels(
        source,
        num_channels=data.num_channels,
        model_channels=model_channels or 3,
        pixel_range=data.pixel_range,
        nodata=data.nodata,
        input_data_format=data.input_data_format,
        estimate_mean=True if automatic else None if data.image_mean is None or data.image_std is None else False,
    )
    channels = found.pixel_format.num_channels
    if model_channels is not None and channels != model_channels and not is_adapted:
        name = "backbone_config" if recipe.model.model is None else f"--model {recipe.model.model}"
        fix = "" if recipe.model.model is None else ", or --adapt_input_channels true to start from its weights"
        raise UsageError(
            f"the images have {channels} channels, {name} takes {model_channels}: pass another model{fix}"
        )
    if recipe.views.channel_drop_probability > 0 and channels == 1:
        raise UsageError("--channel_drop_probability needs images of several channels, these have one")
    changes: dict[str, Any] = {}
    if channels != 3:
        changes["num_channels"] = channels
    if found.pixel_format.pixel_range is not None:
        changes["pixel_range"] = flat(found.pixel_format.pixel_range)
    for name, values in (("image_mean", found.mean), ("image_std", found.std)):
        if values is not None and getattr(data, name) in (None, "auto"):
            changes[name] = list(values)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(data, **changes))
    image_processor(recipe)  # checks the number of values
    return recipe, found.notes


def settle_pixels_together(recipe: Recipe, source, accelerator: Accelerator) -> Recipe:
    """
    The settled options of the first process, which prints what was found, in the recipe of every process.

    Raises:
        UsageError: on all processes, what one of them refuses.
    """
    notes: tuple[str, ...] = ()
    refusal = None
    try:
        recipe, notes = settle_pixels(recipe, source)
    except (ValueError, OSError) as error:  # on one host, for example, which the others must not wait for
        refusal = str(error)
    # Other options may differ: hosts that share no file system have folders of their own.
    answers = gather_object([(refusal, {name: getattr(recipe.data, name) for name in SETTLED})])
    for other_refusal, _ in answers:
        if other_refusal is not None:
            raise UsageError(other_refusal)
    for note in notes:
        accelerator.print(f"images: {note}", file=sys.stderr)
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **answers[0][1]))


def with_settled_options(recipe: Recipe) -> Recipe:
    """With the settled options of the checkpoint that is resumed, where the recipe leaves them open."""
    resumed = resumed_recipe(recipe)
    if resumed is None:
        return recipe
    saved = resumed.data
    changes = {
        name: getattr(saved, name)
        for name in SETTLED
        if getattr(recipe.data, name) in (None, "auto") and getattr(saved, name) is not None
    }
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **changes))


def load_own_config(name: str) -> MoCoV3Config:
    """The configuration of `--model`; UsageError for a model of another library."""
    config = load_config(name)
    if not isinstance(config, MoCoV3Config):
        raise UsageError(f"--model {name} is a {config.model_type!r} model: pass a MoCo v3 pre-training model")
    return config


def channels_of_model(recipe: Recipe) -> int | None:
    """Channels that the model takes; None if they follow from the images."""
    if recipe.model.model is not None:
        return num_channels_of(load_config(recipe.model.model))
    channels = recipe.model.backbone_config.get("num_channels")
    return channels if isinstance(channels, int) else None


def pixel_format(recipe: Recipe) -> PixelFormat:
    """Of the images of a settled recipe."""
    data = recipe.data
    channels = data.num_channels or (channels_of_model(recipe) if recipe.model.model is None else None) or 3
    pixel_range = None if data.pixel_range == "auto" else checked_range(data.pixel_range, channels)
    fill = data.image_mean if isinstance(data.image_mean, list) else None
    return PixelFormat(channels, pixel_range, data.nodata, data.input_data_format, fill)


def normalization(recipe: Recipe) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of a settled recipe, by channel, for pixels in 0..1."""
    processor = image_processor(recipe)
    return list(processor.image_mean), list(processor.image_std)


def build_photometric(recipe: Recipe, device: torch.device) -> PhotometricStage:
    """The device half of the augmentation."""
    views = recipe.views
    is_blurred = views.blur_probability_1 > 0 or views.blur_probability_2 > 0
    mean, std = normalization(recipe)
    optional = (views.vertical_flip_probability, views.rotation_probability, views.channel_drop_probability)
    blur_sigma = views.blur_sigma[1] if is_blurred else 0.0
    return PhotometricStage(mean, std, blur_sigma, optional_operations=any(optional)).to(device)


def image_processor(recipe: Recipe) -> BaseImageProcessor:
    """The image processor of evaluation, which is saved with the weights."""
    data = recipe.data
    mean, std = (values if isinstance(values, list) else None for values in (data.image_mean, data.image_std))
    return build_image_processor(
        recipe.views.image_size, pixel_format=pixel_format(recipe), image_mean=mean, image_std=std
    )


def evaluation_transform(recipe: Recipe) -> EvaluationTransform | ProcessorTransform:
    """The same as a transform of one image."""
    processor = image_processor(recipe)
    if pixel_format(recipe).is_rgb8:
        return EvaluationTransform(
            recipe.views.image_size, mean=tuple(processor.image_mean), std=tuple(processor.image_std)
        )
    return ProcessorTransform(processor)


def flat(pixel_range: tuple) -> list[float]:
    """A range as a recipe holds it: LOW HIGH, or one such pair after another."""
    return [limit for item in pixel_range for limit in (item if isinstance(item, tuple) else (item,))]
