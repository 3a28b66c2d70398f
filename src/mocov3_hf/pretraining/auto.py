"""A recipe for the images and the hardware at hand: what `mocov3 pretrain path/to/images` does without `--recipe`.

`choose` is the table of rules: facts in, options with their reasons out. docs/choosing.md has the measurements and the
literature behind it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from ..reporting import UsageError
from ..zoo import VIT_SIZES


GIB = 2**30
FEWEST_IMAGES = 32
SIZES = ("small", "base", "large")
# Widths, depths and heads by name. The three last are the paper's; the others are narrower, as in the CIFAR-10 study.
VITS: dict[str, dict[str, Any]] = {
    "ViT-nano": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512},
    "ViT-tiny": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "ViT-S": VIT_SIZES["vit-small"],
    "ViT-B": VIT_SIZES["vit-base"],
    "ViT-L": VIT_SIZES["vit-large"],
}
# Base learning rates for AdamW, per 256 images: the paper's from ViT-S on, those of the study below.
BASE_LEARNING_RATES = {"ViT-nano": 4e-3, "ViT-tiny": 1e-3}
# Of the memory of a device; the estimate leaves out the allocator's overhead and temporary buffers.
USABLE_MEMORY = 0.7


@dataclass(frozen=True)
class Facts:
    """
    What a recipe depends on.

    Attributes:
        num_images: In the training split.
        short_side: Median of the shorter sides of a sample of images, in pixels.
        num_channels: Of the images.
        labeled_splits: The splits to learn from and to test on; None without labels.
        no_labels: Why there are none, as a clause.
        device: "cpu", "cuda", "mps", ...
        memory: Bytes of the device, for each process.
        num_processes: All processes of the run.
        precision, precision_reason: What the device computes fast.
    """

    num_images: int
    short_side: int
    num_channels: int = 3
    labeled_splits: tuple[str, str] | None = None
    no_labels: str = "the images have no labels"
    device: str = "cpu"
    memory: int = 16 * GIB
    num_processes: int = 1
    precision: str = "no"
    precision_reason: str = ""


@dataclass(frozen=True)
class Choice:
    """The value of one option of a recipe, and why."""

    option: str
    value: Any
    reason: str


@dataclass
class Choices:
    """Choices in the order in which they are made; what the user gave comes first."""

    given: Mapping[str, Any]
    rows: list[Choice] = field(default_factory=list)

    def add(self, option: str, value: Any, reason: str) -> Any:
        """Choose a value unless one is given, and return what holds."""
        if option in self.given:
            value, reason = self.given[option], "given"
        self.rows.append(Choice(option, value, reason))
        return value

    def values(self) -> dict[str, Any]:
        return {row.option: row.value for row in self.rows}


def choose(facts: Facts, given: Mapping[str, Any] | None = None, size: str | None = None) -> Choices:
    """
    A recipe for the images and the hardware.

    Args:
        facts: About both.
        given: Options that the user has set. The others are chosen to fit them.
        size: "small", "base" or "large"; None for "small".

    Raises:
        UsageError: too few images.
    """
    if facts.num_images < FEWEST_IMAGES:
        raise UsageError(
            f"the data set has {facts.num_images} images, too few to learn from: pass at least {FEWEST_IMAGES}, or use"
            " published weights (mocov3 zoo)"
        )
    choices = Choices(given or {})
    on_gpu = facts.device != "cpu"
    image_size = choose_image_size(choices, facts)
    backbone = choose_backbone(choices, facts, image_size, size or SIZES[0])
    choose_views(choices, image_size, facts.short_side)
    num_epochs, num_steps, batch = choose_length(choices, facts)
    choose_optimization(choices, backbone, num_epochs, num_steps, batch)
    choices.add("mixed_precision", facts.precision, facts.precision_reason)
    if image_size <= 64 and facts.num_images * 3 * image_size**2 <= facts.memory // 8 and facts.num_channels == 3:
        choices.add("cache_images_on_device", True, "all decoded images fit into memory: no image is decoded twice")
        choices.add("dataloader_num_workers", 0, "cropping cached images needs no worker")
    if facts.labeled_splits is not None:
        every = max(1, num_steps // 10)
        train, test = facts.labeled_splits
        choices.add("knn_steps", every, "ten times: the images have labels, and kNN accuracy shows what is learned")
        choices.add("knn_train_split", train, "neighbors")
        choices.add("knn_test_split", test, "images to classify")
    else:
        choices.add("knn_steps", None, f"{facts.no_labels}: no kNN accuracy during training")
    choices.add("save_steps", max(1, min(500 if on_gpu else 100, num_steps)), "at most a few minutes are lost")
    return choices


def choose_image_size(choices: Choices, facts: Facts) -> int:
    side = facts.short_side
    fitting = next((pixels for pixels in (32, 64, 96, 128, 160) if side <= 1.25 * pixels), 224)
    largest = 224 if facts.device != "cpu" else 64
    if fitting <= largest:
        reason = (
            f"the images are about {side} pixels; the method was published for 224"
            if fitting == 224
            else (f"the images are about {side} pixels: larger views would show nothing more")
        )
    else:
        reason = f"the images are about {side} pixels, but views of {fitting} take too long on a CPU"
    return choices.add("image_size", min(fitting, largest), reason)


def choose_backbone(choices: Choices, facts: Facts, image_size: int, size: str) -> str:
    """Returns the name in `VITS`, or another backbone's."""
    if choices.given.get("model") is not None:
        choices.add("model", None, "given")
        return "ViT-S"
    first = "ViT-S" if facts.device != "cpu" else "ViT-nano"
    names = list(VITS)
    name = names[names.index(first) + SIZES.index(size)]
    patch = 16 if image_size >= 128 else max(4, image_size // 4)
    asked = choices.given.get("backbone_config", {})
    config = {"model_type": "mocov3_vit", "patch_size": patch, **VITS[name]}
    where = "a CPU trains no larger one in reasonable time" if facts.device == "cpu" else "the paper's smallest"
    reason = where if size == SIZES[0] else f"--size {size}"
    tokens = (image_size // patch) ** 2
    if asked and asked.get("model_type", "mocov3_vit") != "mocov3_vit":
        choices.add("backbone_config", asked, "given")
        return str(asked["model_type"])
    rows = Choices({})
    rows.add("backbone_config", {**config, **asked}, f"{name}, {reason}; {tokens} patches of {patch} pixels")
    choices.rows += rows.rows
    small = name in BASE_LEARNING_RATES
    choices.add("head_hidden_size", 512 if small else 4096, f"{'four times the width' if small else 'as published'}")
    choices.add("projection_dim", 128 if small else 256, "the width" if small else "as published")
    return name


def choose_views(choices: Choices, image_size: int, short_side: int) -> None:
    smallest = 0.4 if short_side < 24 else 0.2 if image_size <= 64 else 0.08
    few = f"images of {short_side} pixels: smaller crops would have too few"
    choices.add("crop_scale", [smallest, 1.0], "as published" if smallest == 0.08 else few)
    if image_size <= 64:
        for name in ("blur_probability_1", "blur_probability_2"):
            choices.add(name, 0.0, "views of 64 pixels or less are not blurred, as usual for CIFAR-10")


def choose_length(choices: Choices, facts: Facts) -> tuple[float, int, int]:
    """Epochs, steps and global batch."""
    number, on_gpu = facts.num_images, facts.device != "cpu"
    target = 50_000_000 if on_gpu else 500_000
    fewest, most = (100, 1000) if on_gpu else (1, 200)
    wanted = round(target / number)
    epochs = min(max(wanted, fewest), most)
    if epochs == wanted:
        reason = f"{target:,} samples seen" + ("" if on_gpu else ", which a CPU does in about an hour")
    elif epochs == fewest:
        reason = "the shortest schedule of the paper" if on_gpu else "every image once"
    else:
        reason = f"at most {most:,}: more repetitions add little"
    epochs = choices.add("num_train_epochs", epochs, reason)
    # The smallest power of two with at most 20,000 steps of it, within what the method and the data allow.
    least, limit = (256, 4096) if on_gpu else (64, 256)
    batch = least
    while batch < limit and number * epochs / batch > 20_000 * (batch // least):
        batch *= 2
    while batch > max(16, number // 4):
        batch //= 2
    share = facts.num_processes
    batch = max(batch // share, 1) * share
    if choices.given.get("per_device_train_batch_size") is not None:
        batch = choices.given["per_device_train_batch_size"] * share
        choices.add("per_device_train_batch_size", None, "given")
    else:
        why = "many updates on few samples" if batch < 256 else "more negatives, as the paper, while updates suffice"
        batch = choices.add("train_batch_size", batch, why)
    steps = choices.given.get("max_steps") or max(1, epochs * (number // batch))
    if choices.given.get("max_steps") is not None:
        choices.add("max_steps", None, "given")
    return epochs, int(steps), batch


def choose_optimization(choices: Choices, backbone: str, epochs: float, steps: int, batch: int) -> None:
    if backbone == "resnet":
        choices.add("optimizer", "lars", "the paper's for ResNets")
        choices.add("base_learning_rate", 0.3, "as published, per 256 images (linear scaling rule)")
        choices.add("weight_decay", 1.5e-6, "as published")
        choices.add("num_projector_layers", 2, "as published for ResNets")
        choices.add("predictor_final_norm", False, "as published for ResNets")
        choices.add("temperature", 1.0, "as published for ResNets")
    else:
        rate = BASE_LEARNING_RATES.get(backbone, 1.5e-4)
        source = "measured on CIFAR-10" if backbone in BASE_LEARNING_RATES else "as published"
        peak = rate * batch / 256
        choices.add("optimizer", "adamw", "the paper's for transformers")
        choices.add("base_learning_rate", rate, f"{source}; linear scaling rule: {peak:.2g} for {batch} images")
        choices.add("weight_decay", 0.1, "as published")
    choices.add("warmup_epochs", round(min(40.0, epochs / 10), 3), "a tenth of the schedule, at most the paper's 40")
    # An average over 1 / (1 - decay) steps, which should be a small part of the run.
    decay = round(min(0.99, max(0.9, 1 - 20 / steps)), 3)
    reason = "as published" if decay == 0.99 else f"averages over a twentieth of {steps:,} steps"
    choices.add("ema_decay", decay, f"{reason}; rises to 1 by a cosine")


def describe_choices(choices: Choices) -> str:
    """A table: option, value, reason."""
    rows = [(row.option, shown_value(row.value), row.reason) for row in choices.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {reason}" for name, value, reason in rows)


def shown_value(value: Any) -> str:
    """As YAML writes it; of a backbone the type and width."""
    if isinstance(value, dict):
        return " ".join(str(value[key]) for key in ("model_type", "hidden_size") if key in value)
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
