"""
MoCo v3 with a plain `Trainer`: a collator that makes both views, and a callback that updates the momentum encoder.

docs/trainer.md has an example whose losses are those of `mocov3 pretrain`, and what `mocov3 pretrain` does besides.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .data.bad_images import ImageReader
from .data.decode import BadImageError, encoded_bytes
from .data.memory import encoded
from .data.photometric import IMAGENET_MEAN, IMAGENET_STD, PhotometricStage
from .data.pixels import RGB8
from .data.shards import encoded_image
from .data.views import ViewSettings, make_views, two_views
from .model.image_processing_mocov3 import is_deep_mode
from .model.modeling_mocov3_pretraining import MoCoV3ForPreTraining
from .optim import cosine_ema_decay
from .processing import PixelFormat
from .reporting import UsageError, warn


class TwoViewCollator:
    """
    Both augmented views of a batch: `pixel_values` and `pixel_values_2`, each float32 (B, C, S, S), normalized.

    The augmentation is a pure function of seed, epoch and sample, as in `mocov3 pretrain`. `MoCoV3Callback` sets the
    epoch. Without it, the augmentation is drawn by torch's random generator, which `Trainer` seeds. Pass
    `remove_unused_columns=False` to `TrainingArguments`, which otherwise removes the images.

    Args:
        image_size: Side length S of the views in pixels.
        views: Settings of view 1 and view 2, of one image size; None for the pair of MoCo v3.
        seed: Of the augmentation.
        image_column: Key of the images in an example: PIL image, array, tensor, encoded bytes, path, or what
            `datasets.Image(decode=False)` returns, which is fastest.
        id_column: Key of the number of a sample, such as its row; None to derive it from the content of the image, so
            that identical images have the same augmentation.
        image_mean, image_std: By channel, for pixels in 0..1.
        pixel_format: Of images that are not 8-bit RGB.

    Raises:
        UsageError: When called: an example without the column, or an image that cannot be decoded.
    """

    def __init__(
        self,
        image_size: int = 224,
        *,
        views: tuple[ViewSettings, ViewSettings] | None = None,
        seed: int = 0,
        image_column: str = "image",
        id_column: str | None = None,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        pixel_format: PixelFormat = RGB8,
    ):
        self.views = two_views(image_size=image_size) if views is None else views
        self.seed, self.image_column, self.id_column, self.pixel_format = seed, image_column, id_column, pixel_format
        optional = any(
            view.vertical_flip_probability or view.rotation_probability or view.channel_drop_probability
            for view in self.views
        )
        largest_sigma = max(view.blur_sigma[1] if view.blur_probability > 0 else 0.0 for view in self.views)
        self.photometric = PhotometricStage(image_mean, image_std, largest_sigma, optional_operations=optional)
        # In shared memory, so that data-loading workers that persist over epochs see it.
        self._epoch = torch.full((), -1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """From now on, draw the augmentation of this epoch."""
        self._epoch.fill_(epoch)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        epoch = int(self._epoch)
        if epoch < 0:
            epoch = int(torch.randint(1 << 31, ()))
        made = make_views(_Examples(self, examples), self.views, self.seed, epoch, self.pixel_format)
        if made["bad"]:
            raise UsageError(f"{made['bad'][0]}: remove it from the data set")
        first, second = (self.photometric(made["pixels"][view], made["parameters"][view]) for view in range(2))
        return {"pixel_values": first, "pixel_values_2": second}


class _Examples:
    """A batch for `make_views`: images by row, and what identifies their samples."""

    def __init__(self, collator: TwoViewCollator, examples: Sequence[Mapping[str, Any]]):
        names = [name for name in (collator.image_column, collator.id_column) if name is not None]
        for name in names:
            if name not in examples[0]:
                hint = ", and pass remove_unused_columns=False to TrainingArguments" if name == names[0] else ""
                raise UsageError(f"an example has no column {name!r}, only {', '.join(examples[0])}: name it{hint}")
        self.images = [self.image(row, example[collator.image_column]) for row, example in enumerate(examples)]
        if collator.id_column is None:
            ids = [_number(image) for image in self.images]
        else:
            ids = [int(example[collator.id_column]) for example in examples]
        self.sample_ids = torch.tensor(ids, dtype=torch.int64)

    def image(self, row: int, value: Any) -> bytes | np.ndarray:
        try:
            if isinstance(value, Image.Image) and not is_deep_mode(value.mode):
                return np.asarray(ImageOps.exif_transpose(value).convert("RGB"))
            if isinstance(value, torch.Tensor):
                return value.detach().cpu().numpy()
            value = encoded(value) if isinstance(value, Image.Image) else encoded_image(value)
            return value if isinstance(value, np.ndarray) else encoded_bytes(value)
        except BadImageError as error:
            raise UsageError(f"image {row} of a batch {error}") from error

    def read(self, row: int) -> bytes | np.ndarray:
        return self.images[row]

    def describe(self, row: int) -> None:
        """Only the number is known."""

    def candidates(self, row: int) -> Iterator[tuple[int, ImageReader]]:
        """(sample id, what reads it) of a row, then of the others: a bad image is reported when the batch is made."""
        for place in (row, *range(len(self.images))):
            yield int(self.sample_ids[place]), ImageReader(self.read, place)


def _number(image: bytes | np.ndarray) -> int:
    """62 bits that the content of an image determines."""
    data = image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 2


class MoCoV3Callback(TrainerCallback):
    """
    Updates the momentum encoder before every step, and sets the epoch of a `TwoViewCollator`.

    Args:
        ema_decay: EMA decay of the momentum encoder, at the start.
        ema_schedule: "cosine" to raise it to 1 over the run (official `--moco-m-cos`), or "constant".

    Raises:
        UsageError: When training begins: another model; gradient accumulation; several GPUs in one process; a sharded
            model.
    """

    def __init__(self, ema_decay: float = 0.99, ema_schedule: str = "cosine"):
        if not 0 <= ema_decay <= 1:
            raise UsageError(f"ema_decay must be between 0 and 1, got {ema_decay}")
        if ema_schedule not in ("cosine", "constant"):
            raise UsageError(f"ema_schedule takes cosine or constant, got {ema_schedule!r}")
        self.ema_decay, self.ema_schedule = ema_decay, ema_schedule

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if not isinstance(model, MoCoV3ForPreTraining):
            raise UsageError(f"MoCoV3Callback trains a MoCoV3ForPreTraining, got a {type(model).__name__}")
        if args.gradient_accumulation_steps > 1:
            raise UsageError(
                f"gradient_accumulation_steps is {args.gradient_accumulation_steps}: small batches have fewer"
                " negatives, which is a different objective. Set it to 1; for a batch larger than memory, mocov3"
                " pretrain --gradient_cache_chunk_size computes the exact gradient"
            )
        if args.n_gpu > 1:
            raise UsageError(
                f"{args.n_gpu} GPUs in one process each see the negatives of their own part of a batch: start a"
                " process per GPU with accelerate launch or torchrun, or set CUDA_VISIBLE_DEVICES to one"
            )
        if args.fsdp or args.deepspeed:
            raise UsageError("FSDP and DeepSpeed do not support a momentum encoder: leave them out")
        if not args.dataloader_drop_last:
            warn("the last batch of an epoch may have fewer negatives: pass dataloader_drop_last=True")

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        collator = getattr(kwargs.get("train_dataloader"), "collate_fn", None)
        collator = getattr(collator, "data_collator", collator)  # inside the collator that removes columns
        if isinstance(collator, TwoViewCollator):
            collator.set_epoch(int((state.epoch or 0) + 1e-6))  # before data-loading workers start

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        decay = self.ema_decay
        if self.ema_schedule == "cosine":
            decay = cosine_ema_decay(state.global_step, state.max_steps, self.ema_decay)
        model.update_momentum_encoder(decay)
