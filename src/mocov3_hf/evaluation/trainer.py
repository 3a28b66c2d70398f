"""Supervised training of classifiers on transformers' `Trainer`, without those of its ways that falsify a figure."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import RandomSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from ..data.labelled import LabelledImages
from .checkpoints import check_settings, load_average, reload_strictly, save_average, save_settings
from .encoder import base_encoder, size_options
from .evaluate import evaluate_classifier
from .training_images import TrainingImages, collate


# Legend of dimensions: B batch, H W image, C classes.

METRICS_NAME = "metrics.jsonl"
# Summaries of a whole run, which belong to no step.
_NO_STEP = ("train_runtime", "train_loss")
# Odd, and larger than any number of processes and of parts of a step: their seeds never meet.
_SEED_STRIDE, _STEP_STRIDE, _PART_STRIDE = 0x9E3779B97F4A7C15, 1 << 24, 1 << 16


class ClassifierTrainer(Trainer):
    """`Trainer` for classifiers of images.

    The loss is the mean cross-entropy over the batch. A frozen part stays in eval mode (without gradient alone, its
    BatchNorm statistics would drift). Validation is `evaluate_classifier`: every image once, whatever the number of
    processes. Weights of a checkpoint are loaded strictly: `Trainer` itself passes over keys that do not fit with no
    more than a warning. What a step draws (dropout, stochastic depth, the mixing of the batch) is a function of seed,
    step and process: a run can be resumed to the bit.

    Args:
        model: a classifier of transformers.
        args: of `Trainer`; its `label_smoothing_factor` goes into the loss, and with `dataloader_drop_last` every step
            has a full batch.
        train_dataset: the images to train on.
        test_images, test_transform: the split for `evaluate`, labels numbered as the outputs of the model.
        test_options: of `rows_of_split`.
        frozen: the part of the model to keep as it is.
        mixing: as returned by `batch_mixing`.
        ema_momentum: m of the EMA of the weights, `average ← (1 - m) · average + m · weights` after every step; 0
            disables it. It starts as a copy; BatchNorm statistics are those of the model. `evaluate` then evaluates
            both, the EMA with the suffix `_ema`.
        settings: what a run that goes on from a checkpoint must be told again, in words of JSON.
        options: others of `Trainer`, `optimizers` among them.

    Attributes:
        average: the model with the EMA of the weights, or None.
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
        mixing: Callable | None = None,
        ema_momentum: float = 0.0,
        settings: Mapping[str, Any] | None = None,
        **options,
    ):
        self.test_images, self.test_transform = test_images, test_transform
        self.settings = dict(settings or {})
        self.test_options, self.frozen, self.mixing = dict(test_options or {}), frozen, mixing
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
        self.add_callback(_MetricsFile(Path(args.output_dir) / METRICS_NAME))
        self.average = None
        if ema_momentum > 0:
            # `Trainer` has moved the model to its device by now.
            averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(1.0 - ema_momentum))
            averaged.update_parameters(self.model)  # the first call only copies
            self.average = averaged.module.requires_grad_(False).eval()
            self.add_callback(_Average(self.model, averaged))
        self._part_of_step = (0, 0)

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if not self.args.dataloader_drop_last:
            return sampler
        # `Trainer` drops what is left of a batch of one pass; a step may have several.
        args, num_images = self.args, len(self.train_dataset)
        batch = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
        return RandomSampler(self.train_dataset, num_samples=num_images - num_images % batch)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        if self.frozen is not None:
            self.frozen.eval()
        step, part = self._part_of_step
        part = part + 1 if step == self.state.global_step else 0
        self._part_of_step = (self.state.global_step, part)
        seed_step(self.args.seed, self.state.global_step, part, self.args.process_index)
        pixel_values, labels = inputs["pixel_values"], inputs["labels"]
        if self.mixing is not None:
            pixel_values, labels = self.mixing(pixel_values, labels)
        outputs = model(pixel_values=pixel_values, **size_options(base_encoder(self.model), pixel_values))
        smoothing = self.args.label_smoothing_factor
        loss = F.cross_entropy(outputs.logits.float(), labels, label_smoothing=smoothing)
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Metrics of `evaluate_classifier`, but for those of every class; logged. With averaged weights theirs too.

        Args:
            eval_dataset: a `LabelledImages`; None for the test images.

        Raises:
            ValueError: the weights are not numbers any more, and as `evaluate_classifier`.
        """
        check_finite(self.model)
        images = self.test_images if eval_dataset is None else eval_dataset
        metrics = {}
        for model, suffix in ((self.model, ""), (self.average, "_ema")):
            if model is not None:
                found = evaluate_classifier(model, images, self.test_transform, **self.test_options)
                found.pop("per_class")
                metrics |= {f"{metric_key_prefix}_{name}{suffix}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_settings(self.settings, output_dir)
            if self.average is not None:
                save_average(self.average, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_settings(self.settings, resume_from_checkpoint)
        reload_strictly(self.model, resume_from_checkpoint)
        if self.average is not None:
            load_average(self.average, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def seed_step(seed: int, step: int, part: int, process_index: int) -> None:
    """Make what one forward pass draws a function of these numbers."""
    place = step * _STEP_STRIDE + part * _PART_STRIDE + process_index
    torch.manual_seed((seed * _SEED_STRIDE + place) % 2**63)


class _Epochs(TrainerCallback):
    def __init__(self, dataset: TrainingImages):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Workers are started, with their copies of the data set, after this.
        self.dataset.epoch = int((state.epoch or 0) + 1e-6)


class _Average(TrainerCallback):
    """Updates the EMA of the weights after every step."""

    def __init__(self, model: nn.Module, averaged: AveragedModel):
        self.model, self.averaged = model, averaged

    def on_step_end(self, args, state, control, **kwargs):
        self.averaged.update_parameters(self.model)


class _MetricsFile(TrainerCallback):
    """`metrics.jsonl`: a line for every log of the run, as `Trainer` keeps it in its state.

    A resumed run begins with the lines of its checkpoint: what came after it is measured again.
    """

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(map(metrics_line, state.log_history)), encoding="utf-8")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.path.parent.is_dir():
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(metrics_line({**(logs or {}), "step": state.global_step}))


def metrics_line(logs: Mapping[str, float]) -> str:
    """One line of `metrics.jsonl`: `step` and `epoch` first, then by name; none for the summary of a run."""
    if any(name in logs for name in _NO_STEP):
        return ""
    first = {name: logs[name] for name in ("step", "epoch") if name in logs}
    return json.dumps({**first, **{name: logs[name] for name in sorted(logs) if name not in first}}) + "\n"


def share_of_batch(
    train_batch_size: int, per_device: int | None, num_processes: int, num_images: int, num_parts: int = 1
) -> int:
    """Images per process and forward pass.

    Args:
        train_batch_size: of all processes together.
        per_device: of one process and pass, which then wins; None for its share.
        num_processes: of this run.
        num_images: of the training split.
        num_parts: passes of one step, whose gradients are added.

    Raises:
        ValueError: a batch that cannot be shared equally, is empty, or exceeds the split.
    """
    shares = num_processes * num_parts
    if per_device is None and train_batch_size % shares != 0:
        parts = f" in {num_parts} parts each" if num_parts > 1 else ""
        raise ValueError(
            f"{num_processes} processes{parts} cannot share a batch of {train_batch_size} images equally: pass a"
            " --train_batch_size that is a multiple of them, or --per_device_train_batch_size"
        )
    share = train_batch_size // shares if per_device is None else per_device
    if not 1 <= share * shares <= num_images:
        raise ValueError(
            f"the batch must hold between 1 image and the {num_images} of the training split, got"
            f" {share * shares}: pass another --train_batch_size"
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
        batch_size: images per forward pass and process.
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
            "restore_callback_states_from_checkpoint": True,
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
