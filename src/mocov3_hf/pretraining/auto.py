"""
The automatic plan: rules from facts about data and hardware to the options of a recipe, each with its reason.

Every rule is a pure function. facts.py looks at data and hardware, probe.py tries a step. docs/choosing.md has the
measurements and the literature behind the numbers.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..reporting import UsageError


# Width, layers, heads of the ViTs: those of the small recipes of this package, and of the paper (ViT-S has 12 heads).
VITS = {
    "nano": (128, 4, 4),
    "tiny": (192, 12, 3),
    "small": (384, 12, 12),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
# The ResNet of the recipe cifar10_resnet14.
RESNET = {
    "model_type": "resnet",
    "layer_type": "basic",
    "embedding_size": 64,
    "hidden_sizes": [128, 256, 512],
    "depths": [2, 2, 2],
}
# Views have one of these sizes: divisible by 4, and by 8 or 16 from 32 and 128 on.
VIEW_SIZES = (16, 32, 64, 96, 128, 160, 192, 224)
SMALL_VIEWS = 64  # up to here images are treated as in the literature on CIFAR
LARGE_DATA = 500_000  # images; from here on the values of the paper, which are for 1,281,167
FEWEST_IMAGES = 16
# Images seen in training, an epoch of N images being N.
SAMPLES_CPU, SAMPLES_GPU, SAMPLES_LARGE = 200_000, 40_000_000, 128_000_000
MOST_EPOCHS = 1000  # the longest schedule in the literature
USABLE_MEMORY = 0.7  # the estimate leaves out temporary buffers and what the allocator wastes
GIB = 2**30


@dataclass(frozen=True)
class Facts:
    """
    What the rules know.

    Attributes:
        num_images: Of the training split.
        side: Median of the shorter sides of a sample, in pixels.
        has_one_size: Whether all images of the sample have the same size.
        num_channels: With which they are loaded: 3 also for grayscale ones.
        is_grayscale: Whether all images of the sample have a single channel.
        num_classes: 0 without labels.
        knn_splits: Splits of the labeled neighbors and queries; the same for a split of which a part is held out.
        num_labeled: Images of these splits.
        device: "cpu", "cuda", "mps", ...
        memory_bytes: Of the device, for each process that shares it.
        num_cores: CPU cores for each process.
        num_processes: Of all machines.
        precision, precision_reason: See `best_precision`.
        num_workers: Data-loading workers per process.
        steps_in_budget: Steps that a time budget allows; None without one.
    """

    num_images: int
    side: int
    has_one_size: bool = True
    num_channels: int = 3
    is_grayscale: bool = False
    num_classes: int = 0
    knn_splits: tuple[str, str] | None = None
    num_labeled: int = 0
    device: str = "cpu"
    memory_bytes: int = 8 * GIB
    num_cores: int = 1
    num_processes: int = 1
    precision: str = "no"
    precision_reason: str = ""
    num_workers: int = 0
    steps_in_budget: int | None = None


@dataclass(frozen=True)
class MemoryModel:
    """Bytes of a step: of weights and optimizer, per image of the batch, and per image that the backbone keeps."""

    fixed: int
    per_image: int
    per_image_in_backbone: int
    can_chunk: bool = True  # gradient caching is exact: the backbone has no batch normalization

    def needed(self, batch_size: int, chunk_size: int | None) -> int:
        return self.fixed + batch_size * self.per_image + (chunk_size or batch_size) * self.per_image_in_backbone


class Choice(NamedTuple):
    """A row of the plan."""

    option: str
    value: Any
    reason: str


Values = dict[str, Any]
Rule = Callable[[Facts, Values], Iterator[Choice]]
MemoryOf = Callable[[Values], MemoryModel]


def choose(
    facts: Facts, given: Mapping[str, Any], memory_of: MemoryOf, size: str | None = None, why: Mapping[str, str] = {}
) -> list[Choice]:
    """
    The options of a recipe.

    Args:
        facts: Data and hardware.
        given: Options that are decided; rules see them, and their reason is "given".
        memory_of: Memory of the model with these options.
        size: Key of `VITS`, None to choose.
        why: Reasons for options of `given` that have another one.

    Returns:
        A choice for every option that depends on data or hardware, in the order of the rules.

    Raises:
        UsageError: too few images, or a model that does not fit into memory.
    """
    if facts.num_images < max(FEWEST_IMAGES, 2 * facts.num_processes):
        images = "1 image" if facts.num_images == 1 else f"{facts.num_images} images"
        raise UsageError(
            f"{images} are too few to learn from: MoCo v3 contrasts the images of a batch. Pass a folder with at least"
            f" {max(FEWEST_IMAGES, 2 * facts.num_processes)}, better thousands"
        )
    rules: Iterable[Rule] = (
        choose_precision,
        choose_image_size,
        lambda facts, values: choose_backbone(facts, values, size),
        choose_heads,
        choose_views,
        choose_optimizer,
        choose_batch,
        lambda facts, values: choose_memory(facts, values, memory_of(values)),
        choose_length,
        choose_ema,
        choose_loading,
        choose_knn,
    )
    values, choices = dict(given), {}
    for rule in rules:
        for option, value, reason in rule(facts, values):
            if option in given:
                value, reason = given[option], why.get(option, "given")
            values[option] = value
            choices[option] = Choice(option, value, reason)
    return list(choices.values())


# The rules, in their order. `values` holds what is given and what earlier rules have chosen.


def choose_precision(facts: Facts, values: Values) -> Iterator[Choice]:
    yield Choice("mixed_precision", facts.precision, facts.precision_reason)


def choose_image_size(facts: Facts, values: Values) -> Iterator[Choice]:
    nearest = min(VIEW_SIZES, key=lambda size: abs(math.log(size / max(facts.side, 1))))
    largest = SMALL_VIEWS if facts.device == "cpu" else VIEW_SIZES[-1]
    if nearest > largest:
        reason = f"the largest for a CPU, where 224 pixels cost 12 times as much; the images have {facts.side}"
        yield Choice("image_size", largest, reason)
    else:
        yield Choice("image_size", nearest, f"the shorter side of the images is {facts.side} pixels (median)")


def choose_backbone(facts: Facts, values: Values, size: str | None = None) -> Iterator[Choice]:
    image_size = values["image_size"]
    if size is not None:
        yield Choice("backbone_config", vit(size, image_size, facts.device == "cpu"), f"--size {size}: a ViT-{size}")
    elif facts.device == "cpu":
        reason = "a ViT with 4 blocks of width 128, which a CPU trains in minutes"
        yield Choice("backbone_config", vit("nano", image_size, True), reason)
    elif facts.side <= SMALL_VIEWS and image_size <= SMALL_VIEWS and facts.num_images < LARGE_DATA:
        yield Choice("image_size", SMALL_VIEWS, "a ResNet divides by 4 in its first layers: small images are enlarged")
        yield Choice("backbone_config", RESNET, "a ResNet-14: small images, and too few for a ViT")
    elif facts.num_images < 20_000:
        yield Choice("backbone_config", vit("tiny", image_size), f"a ViT-tiny for {facts.num_images:,} images")
    elif facts.num_images < LARGE_DATA:
        yield Choice("backbone_config", vit("small", image_size), f"a ViT-small for {facts.num_images:,} images")
    else:
        reason = f"a ViT-base, as in the paper, for {facts.num_images:,} images"
        yield Choice("backbone_config", vit("base", image_size), reason)


def vit(size: str, image_size: int, is_cpu: bool = False) -> dict[str, Any]:
    """A ViT with 16 patches for the smallest views of a CPU, 64 for others up to 64 pixels, else more."""
    width, layers, heads = VITS[size]
    wanted = image_size // 4 if is_cpu and image_size <= 32 else image_size // 8 if image_size <= 96 else 16
    patch_size = next(patch for patch in (16, 8, 4, 2, 1) if patch <= max(wanted, 1) and image_size % patch == 0)
    return {
        "model_type": "mocov3_vit",
        "patch_size": patch_size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }


def is_resnet(values: Values) -> bool:
    return values["backbone_config"].get("model_type") == "resnet"


def width_of(values: Values) -> int:  # that of ViT-S where a configuration leaves it open
    return int(values["backbone_config"].get("hidden_size", 384))


def choose_heads(facts: Facts, values: Values) -> Iterator[Choice]:
    if is_resnet(values):
        yield Choice("head_hidden_size", 2048, "as in the recipe cifar10_resnet14")
        yield Choice("num_projector_layers", 2, "ResNet (paper)")
        yield Choice("predictor_final_norm", False, "ResNet (paper)")
        return
    hidden, out = {128: (512, 128), 192: (1024, 256)}.get(width_of(values), (4096, 256))
    reason = "paper" if hidden == 4096 else f"as in the small recipes, for a width of {width_of(values)}"
    yield Choice("head_hidden_size", hidden, reason)
    yield Choice("projection_dim", out, reason)


def choose_views(facts: Facts, values: Values) -> Iterator[Choice]:
    image_size = values["image_size"]
    # What is drawn in one channel, such as characters and scans, is told apart by its position and orientation.
    is_drawn = facts.side <= SMALL_VIEWS and facts.is_grayscale
    if is_drawn:
        yield Choice("crop_scale", [0.4, 1.0], "small grayscale images, such as characters, must stay recognizable")
        yield Choice("flip_probability", 0.0, "small grayscale images, such as characters, change by a flip")
    elif facts.side <= SMALL_VIEWS:
        smallest = max(0.2, round((10 / max(facts.side, 10)) ** 2, 2))
        reason = "small images: 0.08 was worse" if smallest == 0.2 else "a crop keeps 10 pixels per side"
        yield Choice("crop_scale", [smallest, 1.0], reason)
    else:
        smallest = 0.2 if is_resnet(values) else 0.08
        yield Choice("crop_scale", [smallest, 1.0], f"{'ResNet' if is_resnet(values) else 'ViT'} (paper)")
    if facts.side <= SMALL_VIEWS and facts.num_channels == 3 and not is_drawn:
        for number in (1, 2):
            yield Choice(f"blur_probability_{number}", 0.0, "small color images (solo-learn on CIFAR-10)")
    elif facts.side <= SMALL_VIEWS:
        sigma = round(max(0.2, 2.0 * min(image_size, 32) / 32), 2)
        yield Choice("blur_sigma", [0.1, sigma], f"scaled to {image_size} pixels")
    if facts.num_channels not in (1, 3):
        yield Choice("grayscale_probability", 0.0, f"the mean of {facts.num_channels} channels shows little")


def choose_optimizer(facts: Facts, values: Values) -> Iterator[Choice]:
    if is_resnet(values):
        yield Choice("optimizer", "lars", "ResNet (paper)")
        yield Choice("base_learning_rate", 0.8, "as in the recipe cifar10_resnet14")
        yield Choice("trust_coefficient", 0.005, "as in the recipe cifar10_resnet14")
        yield Choice("weight_decay", 1e-6, "LARS (paper)")
    else:
        yield Choice("optimizer", "adamw", "ViT (paper)")
        width = width_of(values)
        if width <= 128:
            yield Choice("base_learning_rate", 4e-3, "per 256 images; the best of those measured for this width")
        elif facts.num_images >= LARGE_DATA:
            yield Choice("base_learning_rate", 1.5e-4, "per 256 images (paper)")
        else:
            yield Choice("base_learning_rate", 3e-4, "per 256 images (solo-learn on ImageNet-100)")
        yield Choice("weight_decay", 0.1, "AdamW (paper)")
    yield Choice("temperature", 0.2, "measured for a small ResNet" if is_resnet(values) else "ViT (paper)")


def choose_batch(facts: Facts, values: Values) -> Iterator[Choice]:
    processes = facts.num_processes
    if values.get("per_device_train_batch_size") is not None:
        own = values["per_device_train_batch_size"]
        yield Choice("train_batch_size", own * processes, f"{own} per process (given), {processes} processes")
        return
    if is_resnet(values):
        wanted, reason = 1024, "as in the recipe cifar10_resnet14"
    elif width_of(values) <= 128:
        wanted, reason = 64, "short schedules gain from more steps: better than 256 by 2 points of kNN"
    elif facts.num_images >= LARGE_DATA:
        wanted, reason = 4096, "paper"
    elif width_of(values) <= 192:
        wanted, reason = 256, "small data (solo-learn: 256 to 512)"
    else:
        wanted, reason = 512, "ViT-S on ImageNet-100 (solo-learn)"
    most = 2 ** int(math.log2(facts.num_images // 4))
    if most < wanted:
        wanted, reason = most, f"at least 4 steps in an epoch of {facts.num_images:,} images"
    shared = max(wanted // processes, 2) * processes
    if shared != wanted:
        reason = f"{shared // processes} for each of {processes} processes; {reason}"
    yield Choice("train_batch_size", shared, reason)


def choose_memory(facts: Facts, values: Values, memory: MemoryModel) -> Iterator[Choice]:
    """Halve what a process keeps at once until it fits: chunks of the same batch, or with batch norm a smaller one."""
    own, usable = values["train_batch_size"] // facts.num_processes, USABLE_MEMORY * facts.memory_bytes
    chunk, has = values.get("gradient_cache_chunk_size"), f"{facts.memory_bytes / GIB:.3g} GiB"
    batch, needed = own, memory.needed(own, chunk)
    can_halve = "gradient_cache_chunk_size" not in values
    while memory.needed(batch, chunk) > usable and can_halve and (chunk or batch) > 2:
        if not memory.can_chunk:
            batch = batch // 2
        else:
            chunk = (chunk or batch) // 2
    if memory.needed(batch, chunk) > usable and can_halve:
        raise UsageError(
            f"a batch of 2 images needs {memory.needed(2, None) / GIB:.1f} GiB, and {facts.device} has {has}: pass a"
            " smaller --size, or a smaller --image_size"
        )
    estimated = f"{memory.needed(batch, chunk) / GIB:.2g} of {has} (estimate)"
    if batch != own:
        reason = f"{own} per process need {needed / GIB:.3g} GiB, {batch} need {estimated}"
        yield Choice("train_batch_size", batch * facts.num_processes, reason)
    reason = f"{batch} per process need {estimated}"
    if chunk is not None:
        reason = (
            f"{own} per process need {needed / GIB:.3g} GiB; in chunks of {chunk} exactly the same step, {estimated}"
        )
    yield Choice("gradient_cache_chunk_size", chunk, reason)


def steps_per_epoch(facts: Facts, values: Values) -> int:
    return values.get("steps_per_epoch") or facts.num_images // values["train_batch_size"]


def total_steps(facts: Facts, values: Values) -> int:
    return values.get("max_steps") or values["num_train_epochs"] * steps_per_epoch(facts, values)


def choose_length(facts: Facts, values: Values) -> Iterator[Choice]:
    per_epoch, batch = steps_per_epoch(facts, values), values["train_batch_size"]
    if facts.num_images >= LARGE_DATA and facts.device != "cpu":
        target, why = SAMPLES_LARGE, "100 epochs of ImageNet"
    else:
        target, why = (SAMPLES_CPU, "for a CPU") if facts.device == "cpu" else (SAMPLES_GPU, "for a GPU")
    epochs = min(max(round(target / (per_epoch * batch)), 1), MOST_EPOCHS)
    reason = f"{epochs * per_epoch * batch:,} images seen; the target {why} is {target:,}"
    if epochs == MOST_EPOCHS:
        reason = "the longest schedule in the literature"
    if values.get("max_steps") is not None:
        yield Choice("max_steps", values["max_steps"], "given")
        epochs, reason = math.ceil(values["max_steps"] / per_epoch), "from max_steps"
    elif facts.steps_in_budget is not None:
        steps = min(facts.steps_in_budget, MOST_EPOCHS * per_epoch)
        epochs, reason = math.ceil(steps / per_epoch), "from max_steps"
        limit = f"{MOST_EPOCHS:,} epochs, less than the budget allows"
        measured = "measured: the steps that end within --time_budget"
        yield Choice("max_steps", steps, limit if steps < facts.steps_in_budget else measured)
    yield Choice("num_train_epochs", epochs, reason)
    epochs = values["num_train_epochs"]
    yield Choice(
        "warmup_epochs", round(epochs / 10, 6), "a tenth of the schedule (paper, ResNet-50: 10 of 100 epochs)"
    )


def choose_ema(facts: Facts, values: Values) -> Iterator[Choice]:
    steps = total_steps(facts, values)
    if steps < 10_000:
        yield Choice("ema_decay", 0.9, f"{steps:,} steps are few: better than 0.99 in short runs")
    else:
        yield Choice("ema_decay", 0.99, f"{steps:,} steps (paper)")


def choose_loading(facts: Facts, values: Values) -> Iterator[Choice]:
    stored = facts.num_images * facts.num_channels * facts.side**2
    if facts.device == "cuda" and facts.has_one_size and facts.side <= SMALL_VIEWS and stored <= GIB:
        yield Choice("cache_images_on_device", True, f"all images take {stored / 2**20:.0f} MiB of the GPU")
        yield Choice("dataloader_num_workers", 0, "the images are on the GPU")
        return
    threads = max(1, facts.num_cores - facts.num_workers)
    cores = f"{facts.num_cores} core{'s' if facts.num_cores > 1 else ''} per process"
    reason = f"{cores}: {facts.num_workers} for loading, {threads} for threads of torch"
    yield Choice("dataloader_num_workers", facts.num_workers, reason)


def choose_knn(facts: Facts, values: Values) -> Iterator[Choice]:
    if values.get("knn_dataset_name") is not None:
        yield Choice("knn_steps", max(1, total_steps(facts, values) // 10), "ten times in the run")
        return
    if facts.knn_splits is None:
        why = "the images have a single class" if facts.num_classes == 1 else "the images have no labels"
        yield Choice("knn_steps", None, why)
        return
    # An image costs 8 forward passes in training, of two views and with the backward pass, and one in kNN.
    steps, seen = total_steps(facts, values), total_steps(facts, values) * values["train_batch_size"]
    times = max(1, min(10, int(0.1 * seen * 8 / max(facts.num_labeled, 1))))
    train, test = facts.knn_splits
    held_out = ", a fifth of it held out" if train == test else ""
    often = "once" if times == 1 else f"{times} times"
    reason = f"labels of {facts.num_classes} classes: kNN {often}, at most a tenth of the time"
    yield Choice("knn_steps", max(1, steps // times), reason)
    yield Choice("knn_train_split", train, f"labeled{held_out}")
    yield Choice("knn_test_split", test, f"labeled{held_out}")
    yield Choice("knn_k", min(20, max(1, facts.num_labeled // 4)), "the default, at most a quarter of the images")
