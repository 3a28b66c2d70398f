"""What the images of a data set are like, from a sample: channels, bit depth, range, mean and standard deviation."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..processing import PixelFormat, checked_range
from .decode import BadImageError
from .pixels import Encoded, decode_image, unusual_image
from .shards import RemoteTarShard


# Images that are looked at, and values per channel and image that percentiles are computed from.
NUM_SAMPLED = 256
VALUES_PER_IMAGE = 4096
# Percentiles that become 0 and 1: a few extreme pixels, such as markers on a radiograph, must not set the contrast.
PERCENTILES = (0.5, 99.5)
# Of remote tars, which are copied as a whole.
_PLAIN_SUFFIXES = ("jpg", "jpeg", "webp")


@dataclass(frozen=True)
class PixelStatistics:
    """
    Estimates for a data set.

    Attributes:
        pixel_format: Of its images.
        mean, std: By channel, for pixels in 0..1; None if they were not asked for.
        num_sampled: Images that were looked at.
        filled_fraction: Share of the values of the sample that are without data.
        notes: What was found, one clause each; empty for 8-bit RGB.
    """

    pixel_format: PixelFormat
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    num_sampled: int = 0
    filled_fraction: float = 0.0
    notes: tuple[str, ...] = ()


def sample_images(source, number: int = NUM_SAMPLED, skip_plain: bool = True) -> Iterator[Encoded]:
    """
    Encoded images spread over a data set.

    Args:
        source: A `MapSource`, a `StreamSource`, or anything with a length and `read`. Of a stream, up to 4 shards are
            loaded, and only one if its length is unknown: it is read as a whole.
        number: At most so many.
        skip_plain: Whether to load no shard of remote tars that hold 8-bit images by their suffix.
    """
    readers: list[tuple[int, Callable]] = []
    if hasattr(source, "shards"):
        shards = source.shards
        if skip_plain and isinstance(shards[0], RemoteTarShard) and shards[0].image_column.lower() in _PLAIN_SUFFIXES:
            return
        for index in _spread(len(shards), 1 if shards[0].num_rows is None else 4):
            rows = shards[index].load()
            readers.append((len(rows), rows.read))
    else:
        readers.append((len(source), source.read))
    for length, read in readers:
        for row in _spread(length, -(-number // len(readers))):
            data = read(row)
            if data is not None:
                yield data


def _spread(length: int, number: int) -> list[int]:
    """At most `number` positions in a sequence, evenly spaced."""
    return [index * length // min(length, number) for index in range(min(length, number))]


def estimate_pixels(
    source,
    *,
    num_channels: int | None = None,
    model_channels: int = 3,
    pixel_range: Sequence | str | None = "auto",
    nodata: float | None = None,
    input_data_format: str | None = None,
    estimate_mean: bool | None = None,
    num_sampled: int = NUM_SAMPLED,
) -> PixelStatistics:
    """
    Find the format of a data set and, unless it is 8-bit RGB, the mean and standard deviation of its channels.

    Args:
        source: As in `sample_images`.
        num_channels: Channels to use; None for those of the data. Grayscale and RGB images become `model_channels`.
        model_channels: Channels of the model for data with 1 or 3.
        pixel_range: `"auto"`, or as in `PixelFormat`. Automatic: None if no image is deep; otherwise percentiles 0.5
            and 99.5 of the deep images, of all channels together for 1 and 3 channels, of each channel for others.
        nodata, input_data_format: As in `PixelFormat`.
        estimate_mean: Whether to estimate mean and standard deviation; None for whatever is not 8-bit RGB.
        num_sampled: Images to look at.

    Raises:
        ValueError: Images of different numbers of channels, or of another number than asked for; no usable image in
            the sample.
        MissingPackageError: As `decode_image`.
    """
    images = Sample(source, num_sampled, input_data_format, skip_plain=not estimate_mean)
    channels = images.choose_channels(num_channels, model_channels)
    notes = []
    if channels != 3:
        notes.append(f"{channels} channels")
    if pixel_range == "auto":
        pixel_range = images.percentiles(channels, nodata) if images.deep else None
        if pixel_range is not None:
            kinds = ", ".join(sorted({str(image.dtype).removeprefix("torch.") for image in images.deep}))
            notes.append(f"{kinds} values scaled from {shown_range(pixel_range)} to 0..1 (--pixel_range)")
    elif pixel_range is not None and images.encoded and not images.deep:
        raise ValueError("--pixel_range is for images with more than 8 bits, and these have 8: leave it out")
    pixel_format = PixelFormat(channels, checked_range(pixel_range, channels), nodata, input_data_format)
    if estimate_mean is None:
        estimate_mean = not pixel_format.is_rgb8
    if not estimate_mean:
        return PixelStatistics(pixel_format, num_sampled=len(images.encoded), notes=tuple(notes))
    mean, std, filled = mean_and_std(images.encoded, pixel_format)
    notes.append(f"mean {shown_values(mean)}, standard deviation {shown_values(std)} (--image_mean, --image_std)")
    if filled > 0:
        notes.append(f"{filled:.2%} of the values have no data and are filled with the mean of their channel")
    pixel_format = replace(pixel_format, fill=mean)
    return PixelStatistics(pixel_format, mean, std, len(images.encoded), filled, tuple(notes))


class Sample:
    """
    A sample of a data set.

    Attributes:
        encoded: The usable images.
        deep: Those with more than 8 bits, decoded, (C, H, W).
        channels: How many images have how many channels; plain 8-bit images, also grayscale ones, count as 3.
    """

    def __init__(self, source, number: int, input_data_format: str | None = None, skip_plain: bool = True):
        self.encoded: list[Encoded] = []
        self.deep: list[torch.Tensor] = []
        self.channels: Counter[int] = Counter()
        last_error = None
        for data in sample_images(source, number, skip_plain):
            try:
                image = unusual_image(data, input_data_format)
            except BadImageError as error:
                last_error = error
                continue
            self.encoded.append(data)
            self.channels[3 if image is None else len(image)] += 1
            if image is not None and image.dtype != torch.uint8:
                self.deep.append(image)
        if not self.encoded and last_error is not None:
            raise ValueError(f"no image of a sample can be used: the last one {last_error}")

    def choose_channels(self, num_channels: int | None, model_channels: int) -> int:
        """The number of channels to use; ValueError if images do not have it."""
        found = sorted(self.channels)
        if num_channels is None:
            plain = all(channels in (1, 3) for channels in found)
            if not plain and len(found) > 1:
                listed = ", ".join(f"{channels} ({self.channels[channels]} images)" for channels in found)
                raise ValueError(
                    f"the images have different numbers of channels: {listed}. Keep those of one number, or pass"
                    " --num_channels to skip the others"
                )
            num_channels = model_channels if plain else found[0]
        usable = {num_channels, *({1, 3} if num_channels in (1, 3) else ())}
        # An 8-bit image with 3 channels may have an alpha channel, and a document several pages.
        if found and not usable & set(found) and not (num_channels == 4 and 3 in found):
            raise ValueError(
                f"the images have {' or '.join(map(str, found))} channels, expected {num_channels}: pass"
                f" --num_channels {found[0]}"
            )
        return num_channels

    def percentiles(self, channels: int, nodata: float | None) -> tuple:
        """Range of the deep images: one pair for 1 and 3 channels, else one pair per channel."""
        together = channels in (1, 3)
        values: list[list[np.ndarray]] = [[] for _ in range(1 if together else channels)]
        for image in self.deep:
            if not together and len(image) != channels:
                continue
            step = max(1, image[0].numel() // VALUES_PER_IMAGE)
            flat = image.flatten(1)[:, ::step].to(torch.float64).numpy()
            keep = np.isfinite(flat) if nodata is None else np.isfinite(flat) & (flat != nodata)
            if together:
                values[0].append(flat[keep])
            else:
                for place, (row, kept) in enumerate(zip(flat, keep, strict=True)):
                    values[place].append(row[kept])
        is_whole = all(not image.dtype.is_floating_point for image in self.deep)
        pairs = tuple(_limits(np.concatenate(part), is_whole) for part in values)
        return pairs[0] if together else pairs


def _limits(values: np.ndarray, is_whole: bool) -> tuple[float, float]:
    if len(values) == 0:
        return 0.0, 1.0
    low, high = np.percentile(values, PERCENTILES)
    if is_whole:
        low, high = np.floor(low), np.ceil(high)
    low, high = (float(f"{limit:.6g}") for limit in (low, high))
    return (low, high) if low < high else (low, low + 1.0)


def mean_and_std(
    encoded: Sequence[Encoded], pixel_format: PixelFormat
) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """
    Mean and standard deviation of each channel over the pixels of images in 0..1, in one pass, and the share of values
    without data. A constant channel has standard deviation 1. Values are rounded to 4 digits.
    """
    count, filled = 0, 0
    total = torch.zeros(pixel_format.num_channels, dtype=torch.float64)
    squares = torch.zeros_like(total)
    for data in encoded:
        try:
            image, *_, num_filled = decode_image(data, pixel_format)
        except BadImageError:
            continue
        values = image.flatten(1).to(torch.float64)
        if image.dtype == torch.uint8:
            values = values / 255
        count, filled = count + values.shape[1], filled + num_filled
        total += values.sum(dim=1)
        squares += values.square().sum(dim=1)
    if count == 0:
        raise ValueError("no image of a sample has usable pixels")
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    std = torch.where(std > 1e-4, std, 1.0)
    rounded = [tuple(float(f"{value:.4g}") for value in values.tolist()) for values in (mean, std)]
    return rounded[0], rounded[1], filled / (count * pixel_format.num_channels)


def shown_range(pixel_range: tuple) -> str:
    """A range for a log line."""
    if isinstance(pixel_range[0], tuple):
        return ", ".join(f"{low:g}..{high:g}" for low, high in pixel_range)
    return f"{pixel_range[0]:g}..{pixel_range[1]:g}"


def shown_values(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
