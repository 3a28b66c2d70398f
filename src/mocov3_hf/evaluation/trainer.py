"""Supervised training of classifiers on transformers' `Trainer`, with exact validation and strict checkpoints."""

import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import RandomSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from ..data.labeled import LabeledImages
from ..data.workers import end_workers, ignore_stop_signals
from ..loading import base_encoder, size_options
from ..metrics import best_thresholds
from ..optim.seeding import step_seed
from ..problem_types import MULTI_LABEL, SINGLE_LABEL, STANDARDIZED
from ..process_group import StopRequest
from ..reporting import RunError, is_first_process, one_line
from ..run_folder import CHECKPOINT_PREFIX, METRICS
from ..storage import RecordFile, rewrite_lines, writing
from .evaluate import class_logits, evaluate_classifier
from .features import rows_of_split
from .problems import TargetScale, probabilities_of
from .trainer_checkpoints import (
    check_settings,
    load_average,
    reload_strictly,
    save_average,
    save_settings,
)
from .training_images import BalancedSampler, TrainingImages, collate


# Keys in the log that summarize the whole run.
_NO_STEP = ("train_runtime", "train_loss")
# Odd, and larger than any number of processes and of parts of a step: all seeds differ.
_STEP_STRIDE, _PART_STRIDE = 1 << 24, 1 << 16


class ClassifierTrainer(Trainer):
    """
    `Trainer` for image classifiers.

    The loss is the mean cross-entropy over the batch, or with multi-label and regression data that of
    `config.problem_type`, for standardized targets. A frozen part stays in evaluation mode (otherwise its BatchNorm
    statistics would drift). Validation is `evaluate_classifier`: every image once, for any number of processes.
    Checkpoints are loaded strictly: `Trainer` itself only warns about keys that do not match. The random numbers of a
    step (dropout, stochastic depth, Mixup and CutMix) are a function of seed, step and process, so that a resumed run
    is bit-identical.

    Args:
        model: A classifier of transformers.
        args: Of `Trainer`; the loss uses its `label_smoothing_factor`, and with `dataloader_drop_last` every step has
            a full batch.
        train_dataset: Training images.
        test_images, test_transform: Split for `evaluate`, labels numbered as the outputs of the model.
        test_options: Of `rows_of_split`.
        frozen: The part of the model that is not trained.
        mixing: As returned by `batch_mixing`.
        ema_decay: d of the EMA of the weights, `average ← d · average + (1 - d) · weights` after every step; 0
            disables it. It starts as a copy; BatchNorm statistics are those of the model. `evaluate` then evaluates
            both, the EMA with the suffix `_ema`.
        settings: What must not change when a run is resumed, as JSON holds it.
        free_settings: Names of those that may.
        target_scale: Of the targets of a regression.
        is_class_balanced: Whether images are drawn by `BalancedSampler`.
        superclasses: Superclass of each class, for `evaluate`.
        options: Other arguments of `Trainer`, such as `optimizers`.

    Attributes:
        average: The model with the EMA of the weights, or None.
        thresholds: Of a multi-label classifier by suffix, after `finish`.
        plots: Of the last evaluation by suffix, for reports.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        train_dataset: TrainingImages,
        test_images: LabeledImages,
        test_transform: Callable[[torch.Tensor], torch.Tensor],
        test_options: Mapping[str, Any] | None = None,
        frozen: nn.Module | None = None,
        mixing: Callable | None = None,
        ema_decay: float = 0.0,
        settings: Mapping[str, Any] | None = None,
        free_settings: Sequence[str] = (),
        target_scale: TargetScale | None = None,
        is_class_balanced: bool = False,
        superclasses: Sequence[str] | None = None,
        **options: Any,
    ):
        self.target_scale, self.is_class_balanced, self.superclasses = target_scale, is_class_balanced, superclasses
        self.thresholds: dict[str, list[float]] = {}
        self.plots: dict[str, dict[str, Any]] = {}
        self.test_images, self.test_transform = test_images, test_transform
        self.settings, self.free_settings = dict(settings or {}), tuple(free_settings)
        self.test_options, self.frozen, self.mixing = dict(test_options or {}), frozen, mixing
        super().__init__(
            model,
            args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=TrainingImages(test_images, test_transform),
            **options,
        )
        # Our loss is a mean over the batch and takes no number of items.
        self.model_accepts_loss_kwargs = False
        self.add_callback(_Epochs(train_dataset))
        self.add_callback(_MetricsFile(Path(args.output_dir) / METRICS))
        self.average = None
        if ema_decay > 0:
            # Here `Trainer` has moved the model to its device.
            averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
            averaged.update_parameters(self.model)  # the first call only copies
            self.average = averaged.module.requires_grad_(False).eval()
            self.add_callback(_Average(self.model, averaged))
        self._part_of_step = (0, 0)
        self._iterators: Iterable = ()

    def train(self, *args: Any, **options: Any):
        """As `Trainer`; errors end its progress bar, and are printed by every process but the first."""
        try:
            return super().train(*args, **options)
        # Of a worker that dies while it sends a batch, torch notices only the end of the connection.
        except (ValueError, RuntimeError, ConnectionError, EOFError) as error:
            if not isinstance(error, ValueError | RunError):
                if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                    raise
                error = RunError(f"a data-loading worker died, perhaps out of memory: {one_line(error)}")
            for callback in self.callback_handler.callbacks:
                bar = getattr(callback, "training_bar", None)
                if bar is not None:
                    bar.close()
            if not is_first_process() and not getattr(error, "from_any_process", False):
                print(f"error: {one_line(error)}", file=sys.stderr)
            raise error
        finally:
            end_workers(self._iterators)

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        # accelerate's wrapper has the actual one
        self._iterators = ignore_stop_signals(getattr(loader, "base_dataloader", loader))
        return loader

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if not self.args.dataloader_drop_last and not self.is_class_balanced:
            return sampler
        # `Trainer` drops the rest of a forward pass; a step may have several passes.
        args, num_images = self.args, len(self.train_dataset)
        batch = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
        used = num_images - num_images % batch if self.args.dataloader_drop_last else num_images
        if self.is_class_balanced:
            return BalancedSampler(self.train_dataset, used)
        return RandomSampler(self.train_dataset, num_samples=used)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        if self.frozen is not None:
            self.frozen.eval()
        step, part = self._part_of_step
        part = part + 1 if step == self.state.global_step else 0
        self._part_of_step = (self.state.global_step, part)
        seed_forward(self.args.seed, self.state.global_step, part, self.args.process_index)
        pixel_values, labels = inputs["pixel_values"], inputs["labels"]
        if self.mixing is not None:
            pixel_values, labels = self.mixing(pixel_values, labels)
        outputs = model(pixel_values=pixel_values, **size_options(base_encoder(self.model), pixel_values))
        if self.test_images.problem_type == SINGLE_LABEL:
            smoothing = self.args.label_smoothing_factor
            loss = F.cross_entropy(outputs.logits.float(), labels, label_smoothing=smoothing)
        else:
            target = labels if self.target_scale is None else self.target_scale.standardized(labels)
            loss = self.model.loss_function(target, outputs.logits.float(), self.model.config)
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Metrics of `evaluate_classifier` without those of single classes, of the model and its EMA; logged.

        Args:
            eval_dataset: A `LabeledImages`; None for the test images.

        Raises:
            RunError: The training has diverged.
            ValueError: As `evaluate_classifier`.
        """
        check_finite(self.model)
        images = self.test_images if eval_dataset is None else eval_dataset
        metrics = {}
        for suffix, model in self.models.items():
            found = evaluate_classifier(
                model,
                images,
                self.test_transform,
                None if images.problem_type == SINGLE_LABEL else list(model.config.id2label.values()),
                thresholds=self.thresholds.get(suffix),
                superclasses=self.superclasses,
                target_scale=self.target_scale,
                **self.test_options,
            )
            self.plots[suffix] = found.pop("plots")
            del found["per_class"]
            metrics |= {f"{metric_key_prefix}_{name}{suffix}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @property
    def models(self) -> dict[str, nn.Module]:
        """The model and its EMA, by the suffix of their metrics."""
        return {"": self.model} | ({} if self.average is None else {"_ema": self.average})

    def finish(self, validation: LabeledImages | None) -> None:
        """
        After training: choose the thresholds of a multi-label classifier on held-out images, if there are any, and
        give the outputs of a regression the units of its targets.
        """
        if self.target_scale is not None:  # autocast in the forward pass would round their last digits
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        for suffix, model in self.models.items():
            if self.target_scale is not None:
                self.target_scale.apply(model)
            if validation is not None and validation.problem_type == MULTI_LABEL:
                logits = rows_of_split(model, class_logits, validation, self.test_transform, **self.test_options)
                self.thresholds[suffix] = best_thresholds(probabilities_of(logits), validation.labels)
        self.target_scale = None

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        folder = Path(self.args.output_dir) / f"{CHECKPOINT_PREFIX}{self.state.global_step}"
        try:
            if self.target_scale is not None:
                setattr(self.model.config, STANDARDIZED, True)
            with writing(str(folder)):
                super()._save_checkpoint(*args, **options)
        except RunError:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)  # incomplete
            raise
        finally:
            self.model.config.__dict__.pop(STANDARDIZED, None)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            if self.average is not None:
                save_average(self.average, output_dir)
            save_settings(self.settings, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        compared = {name: value for name, value in self.settings.items() if name not in self.free_settings}
        check_settings(compared, resume_from_checkpoint)
        reload_strictly(self.model, resume_from_checkpoint)
        if self.average is not None:
            load_average(self.average, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def seed_forward(seed: int, step: int, part: int, process_index: int) -> None:
    """Make the random numbers of one forward pass a function of seed, step, part of the step and process."""
    torch.manual_seed(step_seed(seed, step * _STEP_STRIDE + part * _PART_STRIDE + process_index))


class StopOnSignal(TrainerCallback):
    """
    Save and stop after the step in which a signal reached one of the processes.

    Attributes:
        stopped: Whether the training ended in this way.
    """

    def __init__(self, trainer: Trainer, stop: StopRequest):
        self.trainer, self.stop, self.stopped = trainer, stop, False

    def on_step_end(self, args, state, control, **kwargs):
        if self.stop.agreed(self.trainer.accelerator):
            self.stopped = control.should_log = control.should_save = control.should_training_stop = True


class _Epochs(TrainerCallback):
    def __init__(self, dataset: TrainingImages):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Data-loading workers start after this, with a copy of the data set.
        self.dataset.epoch = int((state.epoch or 0) + 1e-6)


class _Average(TrainerCallback):
    """Updates the EMA of the weights after every step."""

    def __init__(self, model: nn.Module, averaged: AveragedModel):
        self.model, self.averaged = model, averaged

    def on_step_end(self, args, state, control, **kwargs):
        self.averaged.update_parameters(self.model)


class _MetricsFile(TrainerCallback):
    """
    `metrics.jsonl`: a line for every log of the run, as `Trainer` keeps it in its state.

    A resumed run starts with the lines of its checkpoint; later lines are replaced.
    """

    def __init__(self, path: Path):
        self.path, self.records = path, RecordFile(path)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            rewrite_lines(self.path, filter(None, map(metrics_of, state.log_history)))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.path.parent.is_dir():
            line = metrics_of({**(logs or {}), "step": state.global_step})
            if line:
                self.records.append(line)

    def on_train_end(self, args, state, control, **kwargs):
        self.records.close()


def metrics_of(logs: Mapping[str, float]) -> dict[str, float]:
    """A line of `metrics.jsonl`: `step` and `epoch` first, then by name; empty for the summary of a run."""
    if any(name in logs for name in _NO_STEP):
        return {}
    first = {name: logs[name] for name in ("step", "epoch") if name in logs}
    return {**first, **{name: logs[name] for name in sorted(logs) if name not in first}}


def training_arguments(
    output_dir: str | os.PathLike,
    *,
    batch_size: int,
    learning_rate: float,
    num_train_epochs: int,
    mixed_precision: str = "no",
    seed: int = 0,
    **options: Any,
) -> TrainingArguments:
    """
    Arguments of `Trainer` for the published protocols: cosine schedule to 0 at every step, no clipping.

    Args:
        output_dir: For checkpoints.
        batch_size: Images per forward pass and process.
        learning_rate: At the first step.
        num_train_epochs, mixed_precision, seed: Of the training.
        options: Other arguments of `TrainingArguments`, which override these.
    """
    on_cpu = not torch.accelerator.is_available()
    return TrainingArguments(
        **{
            "output_dir": os.fspath(output_dir),
            "per_device_train_batch_size": batch_size,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "cosine",
            "num_train_epochs": num_train_epochs,
            # The defaults would clip, and hide a loss that is not finite.
            "max_grad_norm": 0.0,
            "logging_nan_inf_filter": False,
            "bf16": mixed_precision == "bf16",
            "fp16": mixed_precision == "fp16",
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
    """RunError if a trained weight is not finite."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not math.isfinite(parameter.detach().abs().sum().item()):
            raise RunError(f"training has diverged, {name} is not finite: pass a smaller learning rate")
