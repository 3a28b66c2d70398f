"""The command `mocov3 finetune`: the whole network trained on labels, from pre-trained or new weights."""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from ..loading import enable_gradient_checkpointing, with_input_channels
from ..model.batchnorm_mocov3 import use_global_statistics
from ..optim.param_groups import is_decayed
from ..options import Command, option, parse
from ..recipe_files import RECIPES
from ..reporting import UsageError, is_first_process, reporting
from ..weights import weights_hash
from .augmentation import RandAugmentOptions, batch_mixing
from .classifier import load_with_new_head, unfrozen, with_fresh_backbone
from .pixels import channels_of_images, open_transform
from .splits import Splits
from .supervised import Training, build_trainer, common_options, run_training
from .supervised_options import SupervisedOptions
from .trainer import ClassifierTrainer
from .trainer_checkpoints import decay_of_momentum
from .training_images import TrainingImages, training_transform


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Model"""

    from_scratch: bool = option(False, "Train the same network from new weights, for comparison.")
    drop_path_rate: float | None = option(
        None, "Stochastic depth of the last block. Defaults to that of the configuration.", at_least=0, below=1
    )
    adapt_input_channels: bool = option(
        False,
        "Adapt the first layer to the channels of the images: sum its weights for one channel, else repeat them.",
    )
    interpolation: Literal["bilinear", "bicubic"] | None = option(
        None, "Interpolation of resizing. Defaults to that of the saved image processor."
    )


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """Computation"""

    gradient_accumulation_steps: int = option(1, "Forward passes per step and process.", at_least=1)
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    torch_compile: bool = option(False, "Compile the model.")


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """Optimization"""

    optimizer: Literal["adamw", "sgd"] = option("adamw", "Optimizer.")
    layer_decay: float = option(
        1.0, "Factor of the learning rate from a layer to the one before it.", above=0, at_most=1
    )
    warmup_epochs: float = option(
        5.0,
        "Epochs of linear warmup; a tenth of the run if they exceed it. With --max_steps the same fraction.",
        at_least=0,
    )
    warmup_start_factor: float = option(1e-3, "First learning rate, as a fraction of the peak.", at_least=0, below=1)
    min_learning_rate: float = option(1e-5, "Final learning rate of the cosine schedule.", at_least=0)
    max_grad_norm: float = option(5.0, "Norm to clip gradients to. 0 disables clipping.", at_least=0)
    ema_decay: float = option(
        0.0,
        "Decay of the EMA of the weights, published: 0.99996. 0 disables it.",
        at_least=0,
        below=1,
        old={"ema_momentum": decay_of_momentum},
    )
    save_weights: Literal["ema", "raw"] = option("ema", "Weights to save if there is an EMA.")


@dataclass(frozen=True, kw_only=True)
class RegularizationOptions:
    """Augmentation"""

    label_smoothing_factor: float = option(
        0.0, "Fraction of a label that is spread over all classes.", at_least=0, below=1
    )
    mixup_alpha: float = option(0.0, "Alpha of Mixup. 0 disables it.", at_least=0)
    cutmix_alpha: float = option(
        0.0, "Alpha of CutMix. 0 disables it. With both, one is drawn for each batch.", at_least=0
    )
    rand_augment_num_ops: int = option(0, "Operations of RandAugment per image. 0 disables it.", at_least=0)
    rand_augment_magnitude: float = option(9.0, "Mean magnitude of RandAugment.", at_least=0, at_most=10)
    rand_augment_std: float = option(0.5, "Standard deviation of the magnitude.", at_least=0)
    rand_augment_probability: float = option(1.0, "Probability of each operation.", at_least=0, at_most=1)
    random_erasing_probability: float = option(0.0, "Probability of random erasing.", at_least=0, below=1)


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(RegularizationOptions, ScheduleOptions, SpeedOptions, NetworkOptions, SupervisedOptions):
    """Fine-tuning"""

    base_learning_rate: float = option(2.5e-4, "Peak learning rate per 256 images of a batch.", above=0)
    weight_decay: float = option(
        0.05, "Weight decay. None on norms, biases, CLS token and position embeddings.", at_least=0
    )
    num_train_epochs: int = option(100, "Epochs over the training split.", at_least=1)
    train_batch_size: int = option(512, "Images per step, over all processes.", at_least=1)


COMMAND = Command("finetune", "Fine-tune an encoder as a classifier.", (FinetuneOptions,), "model", RECIPES)


# Optimizer: weight decay, and learning rates that decrease from the head to the first layer


def parameter_depths(classifier: PreTrainedModel) -> dict[str, int]:
    """
    Depth of every parameter by name: 0 before the backbone's layers, 1..n for its n layers, n + 1 for what follows
    them and the head.

    The layers are the elements of the largest `ModuleList` that is in no other: blocks of a ViT, stages of a ResNet.

    Raises:
        ValueError: A model without such a list.
    """
    lists = {
        name: module
        for name, module in classifier.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    }
    outermost = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    }
    if not outermost:
        raise ValueError(f"{type(classifier).__name__} has no list of layers: leave out --layer_decay")
    layers = f"{max(outermost, key=outermost.get)}."
    names = [name for name, _ in classifier.named_parameters()]
    inside = [position for position, name in enumerate(names) if name.startswith(layers)]
    last = 1 + len(lists[layers[:-1]])
    depths = {}
    for position, name in enumerate(names):
        if name.startswith(layers):
            depths[name] = 1 + int(name.removeprefix(layers).split(".")[0])
        else:
            depths[name] = 0 if position < inside[0] else last
    return depths


def fine_tuning_groups(
    classifier: PreTrainedModel, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """
    Parameter groups of the trainable parameters, those with the largest learning rate first.

    A parameter of depth d has the learning rate `learning_rate · layer_decay^(n + 1 - d)` (Clark et al. 2020; see
    `parameter_depths`). Norms, biases, CLS token and position embeddings have no weight decay.

    Raises:
        ValueError: A `layer_decay` that is not in (0, 1], or a model without layers for it.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be above 0 and at most 1, got {layer_decay}")
    trainable = {name: value for name, value in classifier.named_parameters() if value.requires_grad}
    depths = dict.fromkeys(trainable, 0) if layer_decay == 1 else parameter_depths(classifier)
    last = max(depths.values())
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in trainable.items():
        key = (last - depths[name], not is_decayed(name, parameter))
        group = {
            "params": [],
            "lr": learning_rate * layer_decay ** key[0],
            "weight_decay": 0.0 if key[1] else weight_decay,
        }
        groups.setdefault(key, group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def build_optimizer(
    groups: list[dict[str, Any]], optimizer: Literal["adamw", "sgd"], momentum: float = 0.9
) -> torch.optim.Optimizer:
    """AdamW (betas 0.9 and 0.999, eps 1e-8), or SGD with `momentum`."""
    if optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=momentum)
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)


def schedule_options(options: FinetuneOptions, learning_rate: float, total_steps: int) -> dict[str, Any]:
    """
    The schedule as arguments of `TrainingArguments`: linear warmup from `warmup_start_factor` times the learning rate,
    then half a cosine to `min_learning_rate` (with `layer_decay` scaled in every group), updated at every step.

    Raises:
        UsageError: A final learning rate above the peak.
    """
    if options.min_learning_rate > learning_rate:
        raise UsageError(
            f"--min_learning_rate {options.min_learning_rate:g} exceeds the peak learning rate {learning_rate:g} of"
            " this batch: pass a smaller one, such as 0"
        )
    return {
        "lr_scheduler_type": "cosine_warmup_with_min_lr",
        "warmup_steps": round(total_steps * options.warmup_epochs / options.num_train_epochs),
        "lr_scheduler_kwargs": {
            "min_lr_rate": options.min_learning_rate / learning_rate,
            "warmup_lr_rate": options.warmup_start_factor,
        },
    }


def warn_of_young_average(decay: float, num_steps: int) -> None:
    """A warning if the EMA will still consist mostly of the initial weights."""
    share = decay**num_steps
    if decay > 0 and share > 0.5:
        warnings.warn(
            f"after {num_steps} steps with --ema_decay {decay:g}, the EMA will still consist of {100 * share:.0f} %"
            f" initial weights: pass a smaller one, such as {1 - min(0.5, 10 / num_steps):.6g}, or --save_weights raw",
            stacklevel=2,
        )


# Load, build, run


def build_finetune_trainer(
    classifier, splits: Splits, transform, options: FinetuneOptions, output_dir: str, num_processes: int = 1
) -> ClassifierTrainer:
    """
    The trainer of fine-tuning, of all weights of `classifier` that require gradients.

    Every step has a full batch: the images that remain at the end of an epoch are skipped. BatchNorm statistics are
    those of all processes.

    Raises:
        ValueError: A batch that cannot be divided among the processes or exceeds the split, an odd number of images to
            mix, no layers for `layer_decay`.
    """
    parts = options.gradient_accumulation_steps
    training = common_options(options, len(splits.train), num_processes, parts)
    if training["batch_size"] % 2 == 1 and (options.mixup_alpha > 0 or options.cutmix_alpha > 0):
        raise UsageError(
            "Mixup and CutMix need an even number of images per forward pass, got"
            f" {training['batch_size']}: pass another --train_batch_size"
        )
    learning_rate = training["learning_rate"]
    steps_per_epoch = len(splits.train) // (training["batch_size"] * num_processes * parts)
    total_steps = options.max_steps or options.num_train_epochs * steps_per_epoch
    warn_of_young_average(options.ema_decay, total_steps)
    training |= schedule_options(options, learning_rate, total_steps) | {
        "max_grad_norm": options.max_grad_norm,
        "label_smoothing_factor": options.label_smoothing_factor,
        "torch_compile": options.torch_compile,
        "dataloader_drop_last": True,
    }
    groups = fine_tuning_groups(classifier, learning_rate, options.weight_decay, options.layer_decay)
    return build_trainer(
        use_global_statistics(classifier),
        splits,
        transform,
        options,
        output_dir,
        TrainingImages(splits.train, _train_transform(transform, options), options.seed, transform.pixel_format),
        training,
        mixing=batch_mixing(options.mixup_alpha, options.cutmix_alpha, len(splits.class_names())),
        ema_decay=options.ema_decay,
        optimizers=(build_optimizer(groups, options.optimizer, options.momentum), None),
    )


def _train_transform(transform, options: FinetuneOptions):
    if not options.augment:
        return transform
    rand_augment = None
    if options.rand_augment_num_ops != 0:
        rand_augment = RandAugmentOptions(
            options.rand_augment_num_ops,
            options.rand_augment_magnitude,
            options.rand_augment_std,
            options.rand_augment_probability,
        )
    return training_transform(transform, options.crop_scale, rand_augment, options.random_erasing_probability)


def build_training(options: FinetuneOptions, splits: Splits, folder: str, num_processes: int) -> Training:
    """Load the model with a new head, all weights trainable. Raises ValueError for a user's mistake."""
    classifier = load_with_new_head(
        options.model, splits.class_names(), seed=options.seed, problem_type=splits.problem_type
    )
    if options.adapt_input_channels:
        classifier = with_input_channels(classifier, channels_of_images(options, splits.whole_train))
    start = None if options.from_scratch else weights_hash(classifier.base_model)
    if options.from_scratch:
        classifier = with_fresh_backbone(classifier, options.seed)
    classifier = unfrozen(classifier, options.drop_path_rate)
    if options.gradient_checkpointing:
        if not classifier.supports_gradient_checkpointing:
            raise UsageError(f"{options.model!r} has no gradient checkpointing: leave out --gradient_checkpointing")
        enable_gradient_checkpointing(classifier)
    transform = open_transform(options, classifier.config, splits.whole_train, options.interpolation)
    trainer = build_finetune_trainer(classifier, splits, transform, options, folder, num_processes)
    return Training(trainer, transform, start)


def run(
    options: FinetuneOptions, callbacks: Sequence[TrainerCallback] = (), how_to_resume: str | None = None
) -> dict[str, float]:
    """Load, train, evaluate, save, record, push. Raises ValueError for a user's mistake, RunError for divergence."""
    if options.warmup_epochs >= options.num_train_epochs:
        shortened = options.num_train_epochs / 10
        if is_first_process():
            print(
                f"--warmup_epochs {options.warmup_epochs:g} does not fit into --num_train_epochs"
                f" {options.num_train_epochs}: shortened to a tenth, {shortened:g}",
                file=sys.stderr,
            )
        options = replace(options, warmup_epochs=shortened)
    return run_training(options, "finetune", build_training, callbacks, how_to_resume)


def main(arguments: list[str]) -> dict[str, float]:
    """The command `mocov3 finetune`."""
    with reporting():
        (options,) = parse(COMMAND, arguments)
        return run(options)
