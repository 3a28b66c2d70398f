"""Supervised training of classifiers on transformers' `Trainer`, without those of its ways that falsify a figure."""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..data.decode import BadImageError
from ..data.labelled import LabelledImages, TrainingTransform
from .encoder import ProcessorTransform, load_any, quiet_transformers
from .evaluate import evaluate_classifier


# Legend of dimensions: B batch, H W image, C classes.

# Values of PIL's resampling filters, as image processors store them.
_INTERPOLATION = {2: "bilinear", 3: "bicubic"}
# Odd constants that keep the seeds of neighbouring rows, epochs and runs apart.
_EPOCH_STRIDE, _SEED_STRIDE = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F


class TrainingImages(Dataset):
    """A labelled split for `Trainer`: `{"pixel_values": (3, H, W) float32, "labels": int}`.

    What a transform draws is a function of seed, epoch and row: it depends neither on the number of processes or
    workers, nor on where a run was interrupted.

    Args:
        images: the split.
        transform: uint8 (3, H, W) to float32; draws from torch's generator of the process.
        seed: of the draws.

    Attributes:
        epoch: set by `ClassifierTrainer` at the start of each.
    """

    def __init__(self, images: LabelledImages, transform: Callable[[torch.Tensor], torch.Tensor], seed: int = 0):
        self.images, self.transform, self.seed, self.epoch = images, transform, seed, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """ValueError naming the row of an image that cannot be decoded."""
        try:
            image = self.images.decode(row)
        except BadImageError as error:
            raise ValueError(f"image in row {row} of the training split {error}: repair it or take it out") from error
        before = torch.get_rng_state()
        # The generator itself: `torch.manual_seed` would also queue a call for every device, at every image.
        torch.default_generator.manual_seed((self.seed * _SEED_STRIDE + self.epoch * _EPOCH_STRIDE + row) % 2**63)
        try:
            return {"pixel_values": self.transform(image), "labels": int(self.images.labels[row])}
        finally:
            torch.set_rng_state(before)


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """`pixel_values` (B, 3, H, W) and `labels` (B,) int64."""
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
    }


def training_transform(transform: ProcessorTransform, scale: tuple[float, float] = (0.08, 1.0)) -> TrainingTransform:
    """Random resized crop and flip in the size, interpolation, mean and deviation of a model's own preprocessing.

    Raises:
        ValueError: a processor without a size, or whose interpolation is neither bilinear nor bicubic.
    """
    settings = transform.processor.to_dict()
    size = (settings.get("crop_size") if settings.get("do_center_crop") else None) or settings.get("size") or {}
    side = size.get("height", size.get("shortest_edge"))
    interpolation = _INTERPOLATION.get(int(settings.get("resample") or 2))
    if side is None or interpolation is None:
        raise ValueError(
            f"{type(transform.processor).__name__} has size {size or None} and resampling {settings.get('resample')};"
            " training needs a size and bilinear (2) or bicubic (3): add --no_augment to train on its own output"
        )
    normalises = settings.get("do_normalize", True)
    return TrainingTransform(
        side,
        scale=tuple(scale),
        interpolation=interpolation,
        mean=tuple(settings["image_mean"]) if normalises else (0.0, 0.0, 0.0),
        std=tuple(settings["image_std"]) if normalises else (1.0, 1.0, 1.0),
    )


class ClassifierTrainer(Trainer):
    """`Trainer` for classifiers of images.

    The loss is the mean cross-entropy over the batch. A frozen part stays in eval mode (without gradient alone, its
    BatchNorm statistics would drift). Validation is `evaluate_classifier`: every image once, whatever the number of
    processes. Weights of a checkpoint are loaded strictly: `Trainer` itself passes over keys that do not fit with no
    more than a warning.

    Args:
        model: a classifier of transformers.
        args: of `Trainer`.
        train_dataset: the images to train on.
        test_images, test_transform: the split for `evaluate`, labels numbered as the outputs of the model.
        test_options: of `rows_of_split`.
        frozen: the part of the model to keep as it is.
        options: others of `Trainer`, `optimizers` among them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        train_dataset: TrainingImages,
        test_images: LabelledImages,
        test_transform: Callable[[torch.Tensor], torch.Tensor],
        test_options: Mapping[str, Any] | None = None,
        frozen: nn.Module | None = None,
        **options,
    ):
        self.test_images, self.test_transform = test_images, test_transform
        self.test_options, self.frozen = dict(test_options or {}), frozen
        super().__init__(
            model,
            args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=TrainingImages(test_images, test_transform),
            **options,
        )
        # The loss is ours, a mean over the batch: it knows nothing of a number of items.
        self.model_accepts_loss_kwargs = False
        self.add_callback(_Epochs(train_dataset))

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        if self.frozen is not None:
            self.frozen.eval()
        outputs = model(pixel_values=inputs["pixel_values"])
        loss = F.cross_entropy(outputs.logits.float(), inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Metrics of `evaluate_classifier` on the test images, but for those of every class; logged."""
        metrics = evaluate_classifier(self.model, self.test_images, self.test_transform, **self.test_options)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items() if name != "per_class"}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        reload_strictly(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        reload_strictly(self.model, self.state.best_model_checkpoint)


class _Epochs(TrainerCallback):
    def __init__(self, dataset: TrainingImages):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Workers are started, with their copies of the data set, after this.
        self.dataset.epoch = int((state.epoch or 0) + 1e-6)


def reload_strictly(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Load the weights of a folder into a model, through `from_pretrained` and a strict load.

    Raises:
        ValueError: weights that are missing, left over, or of another shape: nothing was loaded then.
    """
    with quiet_transformers():
        loaded, info = load_any(os.fspath(folder), type(model), ignore_mismatched_sizes=True)
    wrong = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": sorted(str(found[0]) for found in info["mismatched_keys"]),
    }
    named = "; ".join(f"{len(keys)} {what} ({', '.join(keys[:2])})" for what, keys in wrong.items() if keys)
    if named:
        raise ValueError(f"weights in {os.fspath(folder)!r} are not those of {type(model).__name__}: {named}")
    state = loaded.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if {name: tuple(tensor.shape) for name, tensor in state.items()} != expected:
        raise ValueError(
            f"{os.fspath(folder)!r} holds another model than the one in training: start a new --output_dir"
        )
    model.load_state_dict(state, strict=True)


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest complete `checkpoint-N` of a folder, None without one.

    One that a crash left half-written is passed over: `Trainer` writes the state of the run last.
    """
    found = {
        int(path.name.removeprefix("checkpoint-")): str(path)
        for path in Path(output_dir).glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit() and (path / TRAINER_STATE_NAME).is_file()
    }
    return found[max(found)] if found else None


def share_of_batch(train_batch_size: int, per_device: int | None, num_processes: int, num_images: int) -> int:
    """Images per process and step.

    Args:
        train_batch_size: of all processes together.
        per_device: of one process, which then wins; None for its share.
        num_processes: of this run.
        num_images: of the training split.

    Raises:
        ValueError: a batch that cannot be shared equally, is empty, or exceeds the split.
    """
    if per_device is None and train_batch_size % num_processes != 0:
        raise ValueError(
            f"{num_processes} processes cannot share a batch of {train_batch_size} images equally: pass a"
            " --train_batch_size that is a multiple of them, or --per_device_train_batch_size"
        )
    share = train_batch_size // num_processes if per_device is None else per_device
    if not 1 <= share * num_processes <= num_images:
        raise ValueError(
            f"the batch must hold between 1 image and the {num_images} of the training split, got"
            f" {share * num_processes}: pass another --train_batch_size"
        )
    return share


def training_arguments(
    output_dir: str | os.PathLike,
    *,
    batch_size: int,
    learning_rate: float,
    num_train_epochs: int,
    mixed_precision: str = "no",
    num_workers: int = 0,
    seed: int = 0,
    **options,
) -> TrainingArguments:
    """Arguments of `Trainer` for training by the published protocols: cosine to 0 at every step, no clipping.

    Args:
        output_dir: for checkpoints.
        batch_size: images per step and process.
        learning_rate: at the first step.
        num_train_epochs, mixed_precision, num_workers, seed: of the training.
        options: others of `TrainingArguments`, over these.
    """
    on_cpu = not torch.accelerator.is_available()
    return TrainingArguments(
        **{
            "output_dir": os.fspath(output_dir),
            "per_device_train_batch_size": batch_size,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "cosine",
            "num_train_epochs": num_train_epochs,
            # The default would clip, and hide a loss that is no number.
            "max_grad_norm": 0.0,
            "logging_nan_inf_filter": False,
            "bf16": mixed_precision == "bf16",
            "fp16": mixed_precision == "fp16",
            "dataloader_num_workers": num_workers,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "ddp_find_unused_parameters": False,
            "remove_unused_columns": False,
            "use_cpu": on_cpu,
            "seed": seed,
            "data_seed": seed,
            "report_to": "none",
            **options,
        }
    )


def check_finite(model: nn.Module) -> None:
    """ValueError where a trained weight is not a number."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not math.isfinite(parameter.detach().abs().sum().item()):
            raise ValueError(f"training has diverged, {name} is not finite: pass a smaller learning rate")
