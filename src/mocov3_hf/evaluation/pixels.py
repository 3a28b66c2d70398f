"""The preprocessing of an evaluation: that of the model, for the channels and the bit depth of the images."""

from transformers import PreTrainedConfig

from ..data.labeled import LabeledImages
from ..data.pixel_statistics import Sample, mean_and_std, shown_range, shown_values
from ..loading import load_processor, num_channels_of
from ..processing import PixelFormat, ProcessorTransform, for_pixels, pixel_format_of
from ..reporting import UsageError, is_first_process
from .common import EvaluationOptions


# Images that are looked at.
NUM_SAMPLED = 64


def open_transform(
    options: EvaluationOptions, config: PreTrainedConfig, images: LabeledImages, interpolation: str | None = None
) -> ProcessorTransform:
    """
    The preprocessing of the model's image processor. Where that is made for 8-bit images and these are deeper, or
    where the options say so, it is adapted to their range; what was estimated is printed.

    Args:
        options: Of the command.
        config: Of the loaded model.
        images: The training split, or else the split to evaluate.
        interpolation: As `load_processor`.

    Raises:
        ValueError: Images with other channels than the model's, or as `load_processor`.
    """
    processor = load_processor(options.model, config, image_size=options.image_size, interpolation=interpolation)
    saved, channels = pixel_format_of(processor), num_channels_of(config)
    sample = Sample(images.source, NUM_SAMPLED, options.input_data_format)
    try:
        sample.choose_channels(channels, channels)
    except ValueError as error:
        found = " or ".join(map(str, sorted(sample.channels)))
        raise UsageError(
            f"the images have {found} channels, and model {options.model!r} takes {channels}: pass images or a model"
            " with the same number of channels"
        ) from error
    pixel_range = saved.pixel_range if options.pixel_range is None else options.pixel_range
    if pixel_range == "auto" or (pixel_range is None and sample.deep):
        pixel_range = sample.percentiles(channels, saved.nodata) if sample.deep else None
        if pixel_range is not None:
            _print(f"values scaled from {shown_range(pixel_range)} to 0..1 (--pixel_range)")
    pixel_format = PixelFormat(channels, pixel_range, saved.nodata, options.input_data_format, saved.fill)
    mean = std = None
    if saved.num_channels != channels:  # of a model with an adapted first layer
        mean, std, _ = mean_and_std(sample.encoded, pixel_format)
        _print(f"mean {shown_values(mean)}, standard deviation {shown_values(std)}")
    return ProcessorTransform(for_pixels(processor, pixel_format, mean, std), pixel_format)


def channels_of_images(options: EvaluationOptions, images: LabeledImages) -> int:
    """The number of channels of images, 3 for grayscale ones; ValueError for images of different numbers."""
    return Sample(images.source, NUM_SAMPLED, options.input_data_format).choose_channels(None, 3)


def _print(note: str) -> None:
    if is_first_process():
        print(f"images: {note}")
