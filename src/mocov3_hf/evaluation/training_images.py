"""Labeled images for training with `Trainer`: the augmentation is a function of seed, epoch and row."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import v2

from ..data.decode import BadImageError
from ..data.labeled import LabeledImages, TrainingTransform
from ..data.pixels import RGB8
from ..processing import PixelFormat, ProcessorTransform, Scaling
from .augmentation import RandAugmentOptions, random_erasing


# Legend of dimensions: B batch, C H W image.

# Values of PIL's resampling filters, as image processors store them.
_INTERPOLATION = {2: "bilinear", 3: "bicubic"}
# Odd constants, so that the seeds of neighboring rows, epochs and runs differ.
_EPOCH_STRIDE, _SEED_STRIDE = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F


class TrainingImages(Dataset):
    """
    A labeled split for `Trainer`: `{"pixel_values": (C, H, W) float32, "labels": int}`, or labels (num_labels,) of
    multi-label classification (float32) and of regression (float64).

    The random numbers of a transform are a function of seed, epoch and row: they depend neither on the number of
    processes or workers nor on interruptions of the run.

    Args:
        images: The split.
        transform: From an image (C, H, W) to float32; draws from torch's default generator.
        seed: Of the augmentation.
        pixel_format: Of the images that `transform` takes; None for its own, or else 8-bit RGB.

    Attributes:
        epoch: Set by `ClassifierTrainer` at the start of each epoch.
    """

    def __init__(
        self,
        images: LabeledImages,
        transform: Callable[[torch.Tensor], torch.Tensor],
        seed: int = 0,
        pixel_format: PixelFormat | None = None,
    ):
        self.images, self.transform, self.seed, self.epoch = images, transform, seed, 0
        self.pixel_format = pixel_format or getattr(transform, "pixel_format", RGB8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        The image of a row. `row + k * len(self)` is the same image with another augmentation, for the k-th repetition
        in an epoch. ValueError with the row of an image that cannot be decoded.
        """
        row = index % len(self)
        try:
            image = self.images.decode(row, self.pixel_format)
        except BadImageError as error:
            raise ValueError(
                f"image in row {row} of the training split {error}: repair or remove it, or pass --on_bad_image skip"
            ) from error
        before = torch.get_rng_state()
        # `torch.manual_seed` would also queue a call for every device, for every image.
        torch.default_generator.manual_seed((self.seed * _SEED_STRIDE + self.epoch * _EPOCH_STRIDE + index) % 2**63)
        try:
            return {"pixel_values": self.transform(image), "labels": _label(self.images.labels[row])}
        finally:
            torch.set_rng_state(before)


def _label(label: Any) -> int | torch.Tensor:
    if label.ndim == 0:
        return int(label)
    return torch.as_tensor(label, dtype=torch.float64 if label.dtype.kind == "f" else torch.float32)


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """`pixel_values` (B, C, H, W) and `labels` (B,) int64, or (B, num_labels)."""
    labels = [sample["labels"] for sample in samples]
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.stack(labels) if isinstance(labels[0], torch.Tensor) else torch.tensor(labels),
    }


class BalancedSampler(Sampler):
    """
    Class-balanced sampling: as many draws as there are images, each of a class at random and of one of its images at
    random. The draws of an epoch are a function of seed and epoch. Every repetition of an image in an epoch has an
    augmentation of its own (`TrainingImages.__getitem__`).

    Args:
        dataset: Of a single label per image. Its `epoch` is that of the draws.
        num_draws: Of an epoch.
    """

    def __init__(self, dataset: TrainingImages, num_draws: int):
        self.dataset, self.num_draws = dataset, num_draws
        _, counts = np.unique(dataset.images.labels, return_counts=True)
        self.rows = torch.as_tensor(np.argsort(dataset.images.labels, kind="stable"))
        self.counts = torch.as_tensor(counts)
        self.starts = self.counts.cumsum(0) - self.counts

    def __len__(self) -> int:
        return self.num_draws

    def __iter__(self) -> Iterator[int]:
        seed = self.dataset.seed * _SEED_STRIDE + self.dataset.epoch * _EPOCH_STRIDE
        generator = torch.Generator().manual_seed(seed % 2**63)
        classes = torch.randint(len(self.counts), (self.num_draws,), generator=generator)
        places = torch.rand(self.num_draws, generator=generator, dtype=torch.float64) * self.counts[classes]
        rows = self.rows[self.starts[classes] + places.long()].tolist()
        repetitions: Counter[int] = Counter()
        for row in rows:
            yield row + repetitions[row] * len(self.dataset)
            repetitions[row] += 1


def training_transform(
    transform: ProcessorTransform,
    scale: tuple[float, float] = (0.08, 1.0),
    rand_augment: RandAugmentOptions | None = None,
    erasing_probability: float = 0.0,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    Random resized crop and flip, with the size, interpolation, mean and std of the model's own preprocessing.

    Args:
        transform: Preprocessing for evaluation.
        scale: Range of the crop area, as a fraction of the image.
        rand_augment: Applied between flip and normalization, with the same interpolation; fills with the mean color.
        erasing_probability: Of random erasing, the last step.

    Returns:
        From images of the processor's format (C, H, W) to float32 (C, size, size). All random numbers come from
        torch's default generator.

    Raises:
        ValueError: The processor has no size, its interpolation is neither bilinear nor bicubic, or RandAugment for
            other images than 8-bit RGB.
    """
    settings = transform.processor.to_dict()
    size = (settings.get("crop_size") if settings.get("do_center_crop") else None) or settings.get("size") or {}
    side = size.get("height", size.get("shortest_edge"))
    resample = int(settings.get("resample") or 2)
    interpolation = _INTERPOLATION.get(resample)
    if side is None or interpolation is None:
        raise ValueError(
            f"{type(transform.processor).__name__} has size {size or None} and resampling {settings.get('resample')};"
            " training needs a size and bilinear (2) or bicubic (3): pass --augment false"
        )
    normalizes = settings.get("do_normalize", True)
    channels = transform.pixel_format.num_channels
    mean = tuple(settings["image_mean"]) if normalizes else (0.0,) * channels
    std = tuple(settings["image_std"]) if normalizes else (1.0,) * channels
    crop = {"size": side, "scale": tuple(scale), "interpolation": interpolation}
    if not transform.pixel_format.is_rgb8:
        if rand_augment is not None:
            raise ValueError("RandAugment works on 8-bit RGB images only: pass --rand_augment_num_ops 0")
        steps = [Scaling(transform.pixel_format), TrainingTransform(**crop, mean=mean, std=std)]
        return v2.Compose([*steps, *([random_erasing(erasing_probability)] if erasing_probability > 0 else [])])
    if rand_augment is None and erasing_probability == 0:
        return TrainingTransform(**crop, mean=mean, std=std)
    steps = [TrainingTransform(**crop, mean=None, std=None)]
    if rand_augment is not None:
        steps += [v2.ToPILImage(), rand_augment.build(mean, resample), v2.PILToTensor()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    if erasing_probability > 0:
        steps.append(random_erasing(erasing_probability))
    return v2.Compose(steps)
