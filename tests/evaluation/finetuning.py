"""What the tests of fine-tuning share: commands, and states to compare."""

from pathlib import Path

from safetensors.torch import load_file


SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "finetune.py"
NAMES = ["ant", "bee", "cow"]
# Everything that draws: crops, RandAugment, erasing, mixing, stochastic depth; and everything that has a state.
ALL = (
    *("--mixup_alpha", 0.8, "--cutmix_alpha", 1.0, "--rand_augment_num_ops", 2, "--random_erasing_probability", 0.25),
    *("--drop_path_rate", 0.5, "--label_smoothing_factor", 0.1, "--ema_decay", 0.8, "--layer_decay", 0.75),
)


def command(model, images, output_dir, *more):
    """45 images in batches of 16 are two steps an epoch."""
    paths = ["--model", str(model), "--dataset_name", str(images), "--output_dir", str(output_dir)]
    values = ["--num_train_epochs", 2, "--train_batch_size", 16, "--warmup_epochs", 1, "--base_learning_rate", 0.016]
    return [*paths, *map(str, values), "--logging_steps", "1", "--mixed_precision", "no", *map(str, more)]


def same(first, second):
    """Whether two files or dictionaries of tensors hold the same, bit for bit."""
    first, second = (load_file(side) if isinstance(side, Path) else side for side in (first, second))
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
