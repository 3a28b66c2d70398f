"""Fine-tuning: the whole network trained on labels, from pre-trained or, for comparison, from fresh weights."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from ..model.batchnorm_mocov3 import use_global_statistics
from ..processing import RESAMPLING
from .arguments import run_command
from .augmentation import RandAugmentOptions, batch_mixing
from .classifier import load_with_new_head, unfrozen, with_fresh_body
from .encoder import load_transform, weights_hash
from .optimization import OPTIMIZERS, build_optimizer, fine_tuning_groups
from .supervised import Splits, Training, build_trainer, common_options, run_training
from .supervised_arguments import SupervisedArguments
from .trainer import ClassifierTrainer
from .training_images import TrainingImages, training_transform


@dataclass(frozen=True)
class FinetuneArguments(SupervisedArguments):
    """Arguments of `scripts/finetune.py`."""

    from_scratch: bool = field(
        default=False, metadata={"help": "Train the same network from fresh weights: what is pre-training worth?"}
    )
    optimizer: str = field(default="adamw", metadata={"help": "Of all weights.", "choices": list(OPTIMIZERS)})
    base_learning_rate: float = field(
        default=2.5e-4, metadata={"help": "Learning rate at a batch of 256, scaled with the batch."}
    )
    weight_decay: float = field(
        default=0.05, metadata={"help": "Of the optimizer: none on norms, biases, CLS token and position table."}
    )
    layer_decay: float = field(
        default=1.0, metadata={"help": "Factor of the learning rate from one layer to the one before it."}
    )
    warmup_epochs: float = field(default=5.0, metadata={"help": "Epochs until the full learning rate."})
    warmup_start_factor: float = field(
        default=1e-3, metadata={"help": "Part of the learning rate that the warm-up begins with."}
    )
    min_learning_rate: float = field(default=1e-5, metadata={"help": "Where the cosine ends."})
    max_grad_norm: float = field(default=5.0, metadata={"help": "Norm that gradients are clipped to; 0 for none."})
    num_train_epochs: int = field(default=100, metadata={"help": "Epochs over the training split."})
    train_batch_size: int = field(default=512, metadata={"help": "Images per step, of all processes together."})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Parts in which each process passes over its share of a batch."}
    )
    drop_path_rate: float | None = field(
        default=None, metadata={"help": "Stochastic depth of the last block; as in the model's configuration."}
    )
    label_smoothing_factor: float = field(default=0.0, metadata={"help": "Share of a label given to all classes."})
    mixup_alpha: float = field(default=0.0, metadata={"help": "Of Mixup; 0 for none."})
    cutmix_alpha: float = field(
        default=0.0, metadata={"help": "Of CutMix; 0 for none. With both, one per batch at random."}
    )
    rand_augment_num_ops: int = field(default=0, metadata={"help": "Operations of RandAugment; 0 for none."})
    rand_augment_magnitude: float = field(default=9.0, metadata={"help": "Their mean magnitude, 0 to 10."})
    rand_augment_std: float = field(default=0.5, metadata={"help": "Standard deviation of the magnitude."})
    rand_augment_probability: float = field(default=1.0, metadata={"help": "Of each operation to be applied."})
    random_erasing_probability: float = field(default=0.0, metadata={"help": "Of a rectangle to be erased."})
    interpolation: str | None = field(
        default=None,
        metadata={"help": "Of all resizing; as saved with the model by default.", "choices": list(RESAMPLING)},
    )
    ema_momentum: float = field(
        default=0.0, metadata={"help": "Part of the new weights in the average over all steps; 0 for no average."}
    )
    save_weights: str = field(
        default="ema",
        metadata={"help": "Which weights are saved where there is an average.", "choices": ["ema", "raw"]},
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Compute activations again in the backward pass, to save memory."}
    )
    torch_compile: bool = field(default=False, metadata={"help": "Compile the model."})


def check_finetune(arguments: FinetuneArguments) -> None:
    """ValueError for values out of range that nothing later would name."""
    for name in ("label_smoothing_factor", "random_erasing_probability", "ema_momentum", "warmup_start_factor"):
        value = getattr(arguments, name)
        if not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {value}")
    for name in ("mixup_alpha", "cutmix_alpha", "max_grad_norm", "min_learning_rate", "warmup_epochs"):
        value = getattr(arguments, name)
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must not be negative, got {value}")
    if arguments.gradient_accumulation_steps < 1:
        raise ValueError(
            f"gradient_accumulation_steps must be at least 1, got {arguments.gradient_accumulation_steps}"
        )
    if arguments.warmup_epochs >= arguments.num_train_epochs:
        raise ValueError(
            f"the warm-up of {arguments.warmup_epochs:g} epochs leaves nothing of {arguments.num_train_epochs}: pass a"
            " smaller --warmup_epochs"
        )


def schedule_options(arguments: FinetuneArguments, learning_rate: float, total_steps: int) -> dict:
    """The schedule as options of `TrainingArguments`: linear from `warmup_start_factor` times the learning rate, then
    half a cosine to `min_learning_rate` (with `layer_decay` the same part of every group's rate), at every step.

    Raises:
        ValueError: a floor above the learning rate.
    """
    if arguments.min_learning_rate > learning_rate:
        raise ValueError(
            f"min_learning_rate {arguments.min_learning_rate:g} exceeds the learning rate {learning_rate:g} of this"
            " batch: pass a smaller one"
        )
    return {
        "lr_scheduler_type": "cosine_warmup_with_min_lr",
        "warmup_steps": round(total_steps * arguments.warmup_epochs / arguments.num_train_epochs),
        "lr_scheduler_kwargs": {
            "min_lr_rate": arguments.min_learning_rate / learning_rate,
            "warmup_lr_rate": arguments.warmup_start_factor,
        },
    }


def build_finetune_trainer(
    classifier, splits: Splits, transform, arguments: FinetuneArguments, output_dir: str, num_processes: int = 1
) -> ClassifierTrainer:
    """The trainer of fine-tuning, of everything in `classifier` that has a gradient.

    Every step has a full batch: the images that remain at the end of an epoch are left out of it. BatchNorm has the
    statistics of all processes.

    Raises:
        ValueError: a batch that the processes cannot share or that exceeds the split, an odd number of images to mix,
            no layers for `layer_decay`.
    """
    parts = arguments.gradient_accumulation_steps
    options = common_options(arguments, len(splits.train), num_processes, parts)
    if options["batch_size"] % 2 == 1 and (arguments.mixup_alpha > 0 or arguments.cutmix_alpha > 0):
        raise ValueError(
            "Mixup and CutMix pair the images of a forward pass: expected an even number, got"
            f" {options['batch_size']}: pass another --train_batch_size"
        )
    learning_rate = options["learning_rate"]
    steps_per_epoch = len(splits.train) // (options["batch_size"] * num_processes * parts)
    total_steps = arguments.max_steps or arguments.num_train_epochs * steps_per_epoch
    warn_of_young_average(arguments.ema_momentum, total_steps)
    options |= schedule_options(arguments, learning_rate, total_steps) | {
        "max_grad_norm": arguments.max_grad_norm,
        "label_smoothing_factor": arguments.label_smoothing_factor,
        "torch_compile": arguments.torch_compile,
        "dataloader_drop_last": True,
    }
    groups = fine_tuning_groups(classifier, learning_rate, arguments.weight_decay, arguments.layer_decay)
    names = splits.class_names()
    return build_trainer(
        use_global_statistics(classifier),
        splits,
        transform,
        arguments,
        output_dir,
        TrainingImages(splits.train, _train_transform(transform, arguments), arguments.seed),
        options,
        mixing=batch_mixing(arguments.mixup_alpha, arguments.cutmix_alpha, len(names)),
        ema_momentum=arguments.ema_momentum,
        optimizers=(build_optimizer(groups, arguments.optimizer, arguments.momentum), None),
    )


def warn_of_young_average(momentum: float, num_steps: int) -> None:
    """A warning where the averaged weights will still be mostly those of the start."""
    share = (1 - momentum) ** num_steps
    if momentum > 0 and share > 0.5:
        warnings.warn(
            f"after {num_steps} steps with ema_momentum {momentum:g} the averaged weights will still be"
            f" {100 * share:.0f} % those of the start: take a larger one, such as {min(0.5, 10 / num_steps):.1g}, or"
            " --save_weights raw",
            stacklevel=2,
        )


def _train_transform(transform, arguments: FinetuneArguments):
    if not arguments.augment:
        return transform
    rand_augment = None
    if arguments.rand_augment_num_ops != 0:
        rand_augment = RandAugmentOptions(
            arguments.rand_augment_num_ops,
            arguments.rand_augment_magnitude,
            arguments.rand_augment_std,
            arguments.rand_augment_probability,
        )
    return training_transform(transform, arguments.crop_scale, rand_augment, arguments.random_erasing_probability)


def build(arguments: FinetuneArguments, splits: Splits, folder: str, num_processes: int) -> Training:
    """Load the model with a new head, all of it trainable. Raises ValueError as what it calls."""
    classifier = load_with_new_head(arguments.model, splits.class_names(), seed=arguments.seed)
    start = None if arguments.from_scratch else weights_hash(classifier.base_model)
    if arguments.from_scratch:
        classifier = with_fresh_body(classifier, arguments.seed)
    classifier = unfrozen(classifier, arguments.drop_path_rate)
    if arguments.gradient_checkpointing:
        if not classifier.supports_gradient_checkpointing:
            raise ValueError(
                f"{arguments.model!r} cannot compute its activations again: leave --gradient_checkpointing out"
            )
        # The name before transformers 5.24.
        enable = getattr(classifier, "activation_checkpointing_enable", None)
        (enable or classifier.gradient_checkpointing_enable)({"use_reentrant": False})
    transform = load_transform(arguments.model, classifier, arguments.image_size, arguments.interpolation)
    trainer = build_finetune_trainer(classifier, splits, transform, arguments, folder, num_processes)
    return Training(trainer, transform, start)


def run(arguments: FinetuneArguments, push: Callable[..., str] | None = None) -> dict[str, float]:
    """Load, train, evaluate, save, record, push. Raises ValueError as what it calls."""
    check_finetune(arguments)
    return run_training(arguments, "finetune", build, push)


def main(argv: Sequence[str] | None = None, push: Callable[..., str] | None = None) -> dict[str, float]:
    """Command line of fine-tuning. Bad input ends the process with one line and status 1.

    Args:
        argv: None for those of the process.
        push: as `run_training`.
    """
    return run_command(FinetuneArguments, argv, "Fine-tuning of any vision model.", partial(run, push=push))
