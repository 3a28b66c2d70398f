"""Recipes: frozen dataclasses filled from a YAML file and the command line, and what follows from them.

A recipe is flat where it is written (`key: value`, `--key value`) and grouped where it is read
(`recipe.views.image_size`).
Every option is documented here, where it is declared; `--help` and the error messages are made from that.
"""

import argparse
import dataclasses
import difflib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser


RECIPES = Path(__file__).parent / "recipes"


# Why the option that users of `Trainer` look for does not exist.
NO_ACCUMULATION = (
    "there is no gradient_accumulation_steps: summing the gradients of small batches is another objective, with fewer"
    " negatives. For a batch larger than memory pass --gradient_cache_chunk_size, which gives the gradients of the"
    " whole batch"
)


class RecipeError(ValueError):
    """A recipe that cannot be used; the message says what was expected and how to repair it."""


class Mapping(dict):
    """A dictionary that can be read from JSON on the command line; given twice, the keys are merged."""

    def __init__(self, value: str | dict = ()):
        super().__init__(json.loads(value) if isinstance(value, str) else value)


def option(default: Any, help: str) -> Any:
    """A documented field; a list or mapping is copied for every recipe."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ModelRecipe:
    """What is trained."""

    backbone_config: Mapping = option(
        Mapping({"model_type": "mocov3_vit"}),
        "Configuration of the backbone as a mapping (JSON on the command line): model_type is mocov3_vit, resnet or"
        " any vision model that AutoModel builds. Keys given on the command line are merged into the recipe's.",
    )
    model_name_or_path: str | None = option(
        None, "Folder or Hub id of weights to start from; its configuration replaces the recipe's model options."
    )
    projection_dim: int = option(256, "Width of the vectors that the loss compares.")
    head_hidden_size: int = option(4096, "Width of the hidden layers of projector and predictor.")
    num_projector_layers: int = option(3, "Linear layers of the projector: 3 for ViT, 2 for ResNet.")
    num_predictor_layers: int = option(2, "Linear layers of the predictor; 0 for none.")
    predictor_final_norm: bool = option(True, "Whether the predictor ends in batch normalisation: not for ResNet.")
    temperature: float = option(0.2, "Temperature of the loss: 0.2 for ViT, 1.0 for ResNet.")
    zero_init_residual: bool = option(True, "Whether a ResNet's residual blocks start as the identity.")


@dataclass(frozen=True)
class DataRecipe:
    """Which images, in what order."""

    dataset_name: str | None = option(
        None, "Hub id, or folder of images, parquet files, webdataset tars, or an Arrow data set saved to disk."
    )
    dataset_config_name: str | None = option(None, "Configuration of the data set, where it has several.")
    train_split: str = option("train", "Split to train on; several are joined by '+'.")
    image_column: str | None = option(None, "Column of the images; found by itself where there is only one.")
    streaming: bool = option(False, "Read the data set in place, shard by shard, where it does not fit on the disk.")
    steps_per_epoch: int | None = option(
        None, "Steps of an epoch where they shall be fewer than the data give, or a stream does not tell its length."
    )
    num_train_images: int | None = option(
        None, "Number of images for planning with --dry_run; the data set's own length counts when it is there."
    )
    on_bad_image: Literal["skip", "error"] = option(
        "skip", "Whether an image that cannot be decoded is replaced by a neighbour and listed, or ends the run."
    )
    max_bad_fraction: float = option(0.01, "Share of bad images beyond which the run ends all the same.")
    cache_images_on_device: bool = option(
        False, "Keep all images decoded on the device and crop them there: for small data sets and models."
    )
    dataloader_num_workers: int | None = option(
        None, "Processes that decode and crop, per training process; by default its share of the machine's cores."
    )

    knn_steps: int | None = option(
        None, "Steps between two measurements of the nearest neighbour accuracy on labelled images."
    )
    knn_dataset_name: str | None = option(None, "Data set of those images; by default dataset_name.")
    knn_train_split: str = option("train", "Split whose labels vote.")
    knn_test_split: str = option("test", "Split that is classified.")
    knn_k: int = option(20, "Number of neighbours.")


@dataclass(frozen=True)
class ViewRecipe:
    """The augmentation (BYOL's, as MoCo v3 uses it). Fields ending in _1 and _2 differ between the two views."""

    image_size: int = option(224, "Height and width of a view in pixels.")
    crop_scale: list[float] = option([0.08, 1.0], "Smallest and largest area of the random crop: from 0.2 for ResNet.")
    crop_ratio: list[float] = option([3 / 4, 4 / 3], "Smallest and largest aspect ratio of the random crop.")
    jitter_probability: float = option(0.8, "Probability of the colour jitter.")
    brightness: float = option(0.4, "Strength of the jitter of brightness.")
    contrast: float = option(0.4, "Strength of the jitter of contrast.")
    saturation: float = option(0.2, "Strength of the jitter of saturation.")
    hue: float = option(0.1, "Strength of the jitter of hue, in turns.")
    grayscale_probability: float = option(0.2, "Probability of dropping the colours.")
    blur_sigma: list[float] = option([0.1, 2.0], "Smallest and largest sigma of the Gaussian blur in pixels.")
    blur_probability_1: float = option(1.0, "Probability of the blur in view 1.")
    blur_probability_2: float = option(0.1, "Probability of the blur in view 2.")
    solarize_probability_1: float = option(0.0, "Probability of solarization in view 1.")
    solarize_probability_2: float = option(0.2, "Probability of solarization in view 2.")
    flip_probability: float = option(0.5, "Probability of the horizontal flip.")


@dataclass(frozen=True)
class OptimizationRecipe:
    """How it is trained."""

    optimizer: Literal["adamw", "lars"] = option("adamw", "adamw for ViT, lars for ResNet.")
    base_learning_rate: float = option(1.5e-4, "Learning rate per 256 images of the global batch.")
    learning_rate: float | None = option(
        None, "Peak learning rate as it is, instead of the scaled base_learning_rate."
    )
    weight_decay: float = option(0.1, "Weight decay; with adamw on everything trainable, with lars on matrices.")
    exclude_norms_and_biases: bool = option(False, "Whether adamw leaves norms, biases, CLS and positions undecayed.")
    adam_beta1: float = option(0.9, "First beta of adamw.")
    adam_beta2: float = option(0.999, "Second beta of adamw.")
    adam_epsilon: float = option(1e-8, "Epsilon of adamw.")
    lars_momentum: float = option(0.9, "Momentum of lars.")
    trust_coefficient: float = option(0.001, "Trust coefficient of lars.")
    max_grad_norm: float | None = option(None, "Largest L2 norm of all gradients together; larger ones are scaled.")
    train_batch_size: int = option(4096, "Images per step over all processes together.")
    per_device_train_batch_size: int | None = option(
        None, "Images per step and process, instead of train_batch_size; the learning rate scales along."
    )
    gradient_cache_chunk_size: int | None = option(
        None,
        "Images per pass of the backbone, for batches larger than memory; exact, for backbones without batch norm.",
    )
    num_train_epochs: int = option(300, "Passes over the data.")
    warmup_epochs: float = option(40, "Epochs of linear warm-up.")
    max_steps: int | None = option(
        None, "Length of the run in steps, instead of num_train_epochs; warm-up keeps its share of the run."
    )
    momentum: float = option(0.99, "Momentum of the moving average at the start.")
    momentum_schedule: Literal["cosine", "constant"] = option("cosine", "Whether the momentum rises to 1 or stays.")


@dataclass(frozen=True)
class AccelerationRecipe:
    """What makes a step fast. What is left open is chosen for device, precision and backbone, as --dry_run shows."""

    tf32: bool | None = option(
        None, "Matrix products of float32 in TF32; by default where the GPU can and mixed_precision is no."
    )
    channels_last: bool | None = option(
        None, "Convolutions with the channels innermost in memory; by default for backbones made of them."
    )
    in_place_relu: bool | None = option(
        None, "ReLUs that overwrite their input, which nothing else reads in a resnet; by default there."
    )
    attn_implementation: str | None = option(
        None,
        "sdpa, eager, flash_attention_2 or another that transformers knows; by default, for mocov3_vit, sdpa, and"
        " eager with bf16 on CPUs.",
    )
    views_in_one_pass: bool | None = option(
        None, "Both views in one batch through an encoder; not for backbones with batch normalisation."
    )
    pooled_query_only: bool | None = option(
        None, "The last block of mocov3_vit for the CLS token alone, which is all that the loss reads; by default so."
    )
    torch_compile: bool = option(False, "Compile both encoders: faster after minutes, worth it on GPUs.")
    gradient_checkpointing: bool = option(
        False, "Recompute the encoder's activations in the backward pass: less memory, a quarter more work."
    )


@dataclass(frozen=True)
class RunRecipe:
    """Where it runs and what it leaves behind."""

    output_dir: str | None = option(None, "Folder for weights, metrics and the resolved recipe.")
    seed: int = option(0, "Seed of initial weights, order of images and augmentation.")
    mixed_precision: Literal["no", "bf16", "fp16"] = option("bf16", "Precision of the forward pass.")
    logging_steps: int = option(10, "Steps between two lines of metrics.jsonl.")
    save_steps: int = option(500, "Steps between two checkpoints; the last step is always saved.")
    save_total_limit: int | None = option(3, "Number of checkpoints to keep; older ones are deleted.")
    resume_from_checkpoint: str | None = option(
        None, "auto for the newest whole checkpoint in output_dir (a fresh start where there is none), or a folder."
    )
    allow_recipe_change: bool = option(False, "Resume although the recipe differs from the checkpoint's.")
    overwrite_output_dir: bool = option(False, "Start again in a folder that holds a run, deleting its checkpoints.")
    on_save_error: Literal["stop", "continue"] = option(
        "stop", "What a run does when a checkpoint cannot be written, as on a full disk."
    )
    communication_timeout: int = option(
        600,
        "Seconds that a process waits for the others before the run ends: longer than the slowest save or preparation"
        " of data.",
    )
    on_instability: Literal["warn", "skip", "rollback"] = option(
        "warn",
        "What a run does when the gradient norm spikes or the loss gives up what it had gained. warn tells and records"
        " it in events.jsonl; skip also leaves out the steps that spike; rollback returns to the last checkpoint and"
        " goes on with other images. A step whose gradient is not finite is left out in any case, and is followed by"
        " a rollback where that is chosen.",
    )
    spike_factor: float = option(
        2.0, "How many times the usual gradient norm a spike is at least; it must also stand out of the noise."
    )
    rollback_learning_rate_factor: float = option(
        1.0, "What the learning rate is multiplied by after every rollback, for the rest of the run."
    )
    max_rollbacks: int = option(10, "Number of rollbacks that are tried before the run ends.")
    report_to: list[str] = option(["none"], "Trackers: tensorboard, trackio, wandb or none.")
    push_to_hub: bool = option(False, "Push the output folder to the Hub after every save, in the background.")
    hub_model_id: str | None = option(None, "USER/NAME of the repository; by default the name of output_dir.")
    hub_private_repo: bool = option(False, "Whether the repository is made private.")
    hub_revision: str | None = option(None, "Branch to push to.")
    dry_run: bool = option(False, "Print the plan (parameters, FLOPs, steps, memory) and stop.")


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    model: ModelRecipe
    data: DataRecipe
    views: ViewRecipe
    optimization: OptimizationRecipe
    acceleration: AccelerationRecipe
    run: RunRecipe

    def to_dict(self) -> dict:
        """All options, flat, in the types of YAML."""
        flat = {}
        for group in dataclasses.fields(self):
            for name, value in vars(getattr(self, group.name)).items():
                flat[name] = dict(value) if isinstance(value, dict) else value
        return flat

    def save(self, path: str | Path) -> None:
        """Write the resolved recipe; `load_recipe(path)` gives it back."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")


GROUPS = tuple(group.type for group in dataclasses.fields(Recipe))


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """
    The file of a recipe given by name or path.

    Raises:
        RecipeError: no such recipe; the message offers the nearest name.
    """
    if Path(name).is_file():
        return Path(name)
    if (RECIPES / f"{name}.yaml").is_file():
        return RECIPES / f"{name}.yaml"
    if name.endswith((".yaml", ".yml")):
        raise RecipeError(f"there is no recipe file {name}")
    close = difflib.get_close_matches(name, recipe_names(), n=1, cutoff=0.3)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    raise RecipeError(f"there is no recipe {name!r}. {hint}Known are: {', '.join(recipe_names())}")


class _Parser(HfArgumentParser):
    """Parses only what is given, leaving defaults to the dataclasses, and raises instead of exiting."""

    def __init__(self, source: str):
        super().__init__(GROUPS, allow_abbrev=False, add_help=False)
        self.source = source
        for action in self._actions:
            action.default = argparse.SUPPRESS

    def error(self, message: str):
        raise RecipeError(f"{self.source}: {message}")

    def given(self, arguments: list[str]) -> dict:
        namespace, unknown = self.parse_known_args(arguments)
        unknown = [argument for argument in unknown if argument.startswith("--")] or unknown
        if unknown:
            refuse_unknown(unknown[0].lstrip("-").split("=")[0], self.source)
        return vars(namespace)


def recipe_help() -> str:
    """All options with their documentation and defaults, group by group."""
    parser = argparse.ArgumentParser(
        usage="pretrain.py --recipe NAME|FILE [--option value ...]",
        description=f"Recipes of the package: {', '.join(recipe_names())}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        add_help=False,
    )
    for group in GROUPS:
        section = parser.add_argument_group(group.__name__, group.__doc__)
        for action in HfArgumentParser(group, add_help=False)._actions:
            section._add_action(action)
    return parser.format_help()


def option_names() -> list[str]:
    return [field.name for group in GROUPS for field in dataclasses.fields(group)]


def refuse_unknown(name: str, source: str) -> None:
    """
    Raises:
        RecipeError: always, with the nearest option.
    """
    if name == "gradient_accumulation_steps":
        raise RecipeError(f"{source}: {NO_ACCUMULATION}")
    close = difflib.get_close_matches(name, option_names(), n=1, cutoff=0.5)
    hint = f". Did you mean {close[0]!r}?" if close else "; --help lists all options"
    raise RecipeError(f"{source}: there is no option {name!r}{hint}")


def as_arguments(values: dict, source: str) -> list[str]:
    """YAML values as command line arguments, so that both are converted and checked by one parser."""
    arguments = []
    for name, value in values.items():
        if name not in option_names():
            refuse_unknown(str(name), source)
        if value is None:
            continue
        if isinstance(value, dict):
            arguments += [f"--{name}", json.dumps(value)]
        elif isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        else:
            arguments += [f"--{name}={value}"]
    return arguments


def load_recipe(name: str, arguments: list[str] = ()) -> Recipe:
    """
    A recipe by name or path with command line arguments over it.

    Args:
        name: Name of a recipe of the package, or path of a YAML file.
        arguments: For example `["--seed", "1"]`. Precedence: arguments, then the file, then the defaults; mappings are
            merged by key.

    Raises:
        RecipeError: unknown recipe or option (the nearest is offered), or a value of the wrong type.
    """
    path = find_recipe(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must hold a mapping of options, got a {type(values).__name__}")
    from_file = _Parser(path.name).given(as_arguments(values, path.name))
    from_command = _Parser("command line").given(list(arguments))
    merged = from_file | from_command
    for key, value in from_command.items():
        if isinstance(value, Mapping) and isinstance(from_file.get(key), Mapping):
            merged[key] = Mapping(merge_backbone_config(from_file[key], value))
    return build_recipe(merged)


def merge_backbone_config(file: dict, command: dict) -> dict:
    """Keys of the command line over those of the file; another model type starts afresh."""
    if command.get("model_type", file.get("model_type")) != file.get("model_type"):
        return command
    return {**file, **command}


def build_recipe(values: dict) -> Recipe:
    """A recipe from flat values, checked."""
    groups = {
        group.name: group.type(
            **{field.name: values[field.name] for field in dataclasses.fields(group.type) if field.name in values}
        )
        for group in dataclasses.fields(Recipe)
    }
    recipe = Recipe(**groups)
    check_ranges(recipe)
    return recipe


def check_ranges(recipe: Recipe) -> None:
    """
    Raises:
        RecipeError: a value outside of its range.
    """
    values = recipe.to_dict()
    for name, value in values.items():
        if ("probability" in name or name == "max_bad_fraction") and not 0.0 <= value <= 1.0:
            raise RecipeError(f"{name} must lie between 0 and 1, got {value}")
        if name in ("crop_scale", "crop_ratio", "blur_sigma") and not (len(value) == 2 and 0 < value[0] <= value[1]):
            raise RecipeError(f"{name} must be two positive numbers, the smaller first, got {value}")
    at_least_one = [
        "image_size",
        "train_batch_size",
        "per_device_train_batch_size",
        "gradient_cache_chunk_size",
        "num_train_epochs",
        "max_steps",
        "steps_per_epoch",
        "knn_steps",
        "knn_k",
        "logging_steps",
        "save_steps",
        "save_total_limit",
        "communication_timeout",
        "max_rollbacks",
    ]
    for name in at_least_one:
        if values[name] is not None and values[name] < 1:
            raise RecipeError(f"{name} must be at least 1, got {values[name]}")
    not_negative = ["dataloader_num_workers", "weight_decay", "base_learning_rate", "learning_rate", "warmup_epochs"]
    for name in not_negative:
        if values[name] is not None and not 0 <= values[name] < math.inf:
            raise RecipeError(f"{name} must not be negative, got {values[name]}")
    if not 0.0 <= recipe.optimization.momentum <= 1.0:
        raise RecipeError(f"momentum must lie between 0 and 1, got {recipe.optimization.momentum}")
    if not 0.0 < recipe.run.rollback_learning_rate_factor <= 1.0:
        raise RecipeError(
            f"rollback_learning_rate_factor must lie above 0 and not above 1, got"
            f" {recipe.run.rollback_learning_rate_factor}"
        )
    if not recipe.run.spike_factor > 1.0:
        raise RecipeError(f"spike_factor must be above 1, got {recipe.run.spike_factor}")
    if recipe.run.on_instability == "skip" and recipe.run.mixed_precision == "fp16":
        raise RecipeError(
            "on_instability skip needs bf16 or no mixed_precision: with fp16 the gradient scaler decides which steps"
            " to leave out. Use bf16, or on_instability rollback"
        )
    if recipe.views.crop_scale[1] > 1.0:
        raise RecipeError(f"crop_scale must not exceed 1, got {recipe.views.crop_scale}")
