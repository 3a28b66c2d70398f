"""From a recipe to the parts of a run: accelerator, model, optimizer, data. What cannot work is refused here."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, gather_object
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..data.loader import TwoViewLoader
from ..data.sources import open_source
from ..data.splits import split_option
from ..data.views import view_settings
from ..data.workers import default_workers
from ..hints import nearest
from ..hub import check_repo_id
from ..loading import resolve_model, with_input_channels
from ..model.backbone_mocov3 import UnsupportedBackboneError
from ..model.batchnorm_mocov3 import GlobalBatchNorm
from ..model.configuration_mocov3 import MoCoV3Config
from ..model.configuration_mocov3_vit import MoCoV3ViTConfig, to_pair
from ..model.modeling_mocov3_pretraining import MoCoV3ForPreTraining
from ..optim import LARS, parameter_groups
from ..option_values import shown
from ..precision import this_device
from ..process_group import leave_at_exit
from ..reporting import UsageError, one_line, warn
from ..run_folder import BAD_IMAGES
from .launch import check_launch, check_trackers, ddp_options
from .pixels import load_own_config, pixel_format
from .plan import Plan
from .recipe import Recipe


# Bounds on the size of a model, so that a mistake fails at once. With DDP, 10^10 parameters do not fit any GPU.
LARGEST_SIZE, MOST_LAYERS, MOST_PARAMETERS = 10**6, 1000, 10**10
# Keys of a backbone's configuration that count layers, and those that must be positive.
LAYER_COUNTS = re.compile(r"(^|_)(depths?|layers|blocks)$")
POSITIVE_SIZES = re.compile(r"(^|_)(sizes?|heads|channels|dims?)$")

# Base learning rates (per 256 images) at which each optimizer is known to work with MoCo v3: the paper has 1e-4 to
# 1.5e-4 for AdamW and 0.3 to 0.6 for LARS.
LARGEST_ADAMW_BASE_LEARNING_RATE = 0.01
SMALLEST_LARS_BASE_LEARNING_RATE = 0.03


def build_accelerator(recipe: Recipe) -> Accelerator:
    """
    The processes, the precision and the trackers of a run whose precision is settled.

    Raises:
        UsageError: a launch that asked for several processes and got one, processes of different precision, a tracker
            that is not installed.
    """
    check_launch(os.environ)
    own, asked = recipe.hardware.mixed_precision, os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked not in ("no", own):  # "no" is the launcher's default
        advice = f"; for {asked}, pass --mixed_precision {asked} to pretrain" if asked in ("bf16", "fp16") else ""
        warn(f"accelerate launch asks for mixed_precision {asked}, the recipe for {own}: using {own}{advice}")
    trackers = check_trackers(recipe.monitoring.report_to)
    if recipe.hub.push_to_hub:
        check_repo_id(recipe.hub.hub_model_id or Path(recipe.run.output_dir).resolve().name)
    leave_at_exit()
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    accelerator = Accelerator(
        # Without cpu=True, accelerate does not connect the processes of a machine without accelerators.
        cpu=this_device().type == "cpu",
        mixed_precision=recipe.hardware.mixed_precision,
        log_with=trackers or None,
        project_config=ProjectConfiguration(project_dir=recipe.run.output_dir, logging_dir=recipe.run.output_dir),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.hardware.communication_timeout)),
        ],
    )
    accelerator.ddp_handler = ddp_options()
    started = int(os.environ.get("WORLD_SIZE", accelerator.num_processes))
    if accelerator.num_processes != started:
        raise UsageError(
            f"{started} processes were started, but {accelerator.num_processes} joined: start them with torchrun or"
            " accelerate launch"
        )
    precisions = gather_object([own])
    if len(set(precisions)) > 1:
        raise UsageError(
            f"process 0 would use mixed_precision {precisions[0]} and another process"
            f" {next(value for value in precisions if value != precisions[0])}, which its hardware has: pass"
            " --mixed_precision no, bf16 or fp16"
        )
    return accelerator


def build_config(recipe: Recipe) -> MoCoV3Config:
    """
    Configuration of the model; a backbone with an image size gets that of the views.

    Raises:
        UsageError: an unknown model type, or values that are not valid.
    """
    values, image_size = dict(recipe.model.backbone_config), recipe.views.image_size
    model_type = values.get("model_type")
    if model_type is not None and not isinstance(model_type, str):
        raise UsageError(f"model_type in backbone_config takes text, got {shown(model_type)}")
    check_sizes(values)
    # `get` finds nothing in this lazy mapping.
    config_class = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None  # noqa: SIM401
    if hasattr(config_class, "image_size") and values.setdefault("image_size", image_size) != image_size:
        raise UsageError(
            f"backbone_config has image_size {shown(values['image_size'])} and the views {image_size}: leave the"
            " former out"
        )
    channels = recipe.data.num_channels
    if model_type == "timm_wrapper":
        values["model_args"] = timm_arguments(values, image_size, channels)
    elif channels not in (None, 3) or (channels == 3 and "num_channels" in values):
        if not hasattr(config_class, "num_channels"):
            raise UsageError(f"a {model_type!r} backbone has no num_channels, and the images have {channels}")
        if values.setdefault("num_channels", channels) != channels:
            raise UsageError(
                f"backbone_config has num_channels {shown(values['num_channels'])} and the images {channels}: leave"
                " the former out"
            )
    options = recipe.model
    try:
        return MoCoV3Config(
            backbone_config=values,
            pooling=options.pooling,
            projection_dim=options.projection_dim,
            head_hidden_size=options.head_hidden_size,
            num_projector_layers=options.num_projector_layers,
            num_predictor_layers=options.num_predictor_layers,
            predictor_final_norm=options.predictor_final_norm,
            head_batch_norm=options.head_batch_norm,
            temperature=options.temperature,
            zero_init_residual=options.zero_init_residual,
        )
    except Exception as error:  # every configuration class of transformers raises its own kinds
        # huggingface_hub wraps a failed validation: the cause has the message.
        reason = one_line(error.__cause__ or error).removeprefix("backbone_config: ")
        raise UsageError(f"backbone_config is not valid: {reason}") from error


def timm_arguments(backbone_config: Mapping[str, Any], image_size: int, num_channels: int | None) -> dict[str, Any]:
    """
    `model_args` of a timm model with the size of the views, if its architecture has a fixed one, and the channels.

    Raises:
        UsageError: an unknown architecture, or other sizes or channels in `model_args`.
    """
    import timm

    name, arguments = backbone_config.get("architecture", "resnet50"), backbone_config.get("model_args") or {}
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise UsageError("backbone_config of a timm_wrapper takes text as architecture and a mapping as model_args")
    if not timm.is_model(name):
        raise UsageError(f"timm {timm.__version__} has no architecture {name!r}{nearest(name, timm.list_models())}")
    pretrained = timm.get_pretrained_cfg(name)
    needed = {"in_chans": num_channels or arguments.get("in_chans", 3)}
    if pretrained is not None and pretrained.fixed_input_size:
        needed["img_size"] = image_size
    defaults = {"in_chans": 3, "img_size": None if pretrained is None else pretrained.input_size[-1]}
    for key, value in needed.items():
        if arguments.get(key, value) != value:
            raise UsageError(f"model_args has {key} {shown(arguments[key])}, and the images {value}: leave it out")
    return arguments | {key: value for key, value in needed.items() if value != defaults[key]}


def check_sizes(backbone_config: Mapping[str, Any]) -> None:
    """
    Check the integers of a backbone's configuration before anything is built from them.

    Raises:
        UsageError: a number out of range, or too many layers.
    """
    num_layers = 0
    for name, value in integers(backbone_config):
        smallest = 1 if POSITIVE_SIZES.search(name) else -1 if name == "out_indices" else 0
        if not smallest <= value <= LARGEST_SIZE:
            raise UsageError(f"{name} in backbone_config must be {smallest} to {LARGEST_SIZE:,}, got {shown(value)}")
        if LAYER_COUNTS.search(name):
            num_layers += max(value, 1)
    if num_layers > MOST_LAYERS:
        raise UsageError(f"backbone_config has {num_layers:,} layers, more than {MOST_LAYERS:,}")


def integers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Every integer in a nested value, with the nearest key above it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from integers(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from integers(item, name)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value


def check_keys(keys: Iterable[str], config: PreTrainedConfig) -> None:
    """
    Check that a backbone reads the keys of its configuration. transformers stores all others as well.

    Raises:
        UsageError: a key that nothing reads, with a name close to one that exists. Others are warned of.
    """
    read = {item.name for item in fields(config)} | config.attribute_map.keys()
    for key in keys:
        if key in read or key not in vars(config) or hasattr(type(config), key):
            continue
        text = f"backbone_config: {type(config).__name__} has no key {key!r}"
        if hint := nearest(key, read, cutoff=0.6):
            raise UsageError(f"{text}{hint}")
        warn(f"{text}, it has no effect")


def check_model(recipe: Recipe) -> None:
    """
    Refuse a model that cannot be built, before images are read and weights drawn.

    Raises:
        UsageError, ValueError: options that are not valid together, too large a model, or no model at `--model`.
    """
    name, image_size = recipe.model.model, recipe.views.image_size
    if name is None:
        config = build_config(recipe)
        check_keys(recipe.model.backbone_config, config.backbone_config)
        check_images(check_buildable(config), image_size)
        return
    backbone = load_own_config(name).backbone_config
    if backbone.model_type == MoCoV3ViTConfig.model_type and to_pair(backbone.image_size) != (image_size, image_size):
        raise UsageError(
            f"--model {name} takes images of {backbone.image_size} pixels, the views have {image_size}: pass"
            f" --image_size {backbone.image_size}"
        )


def check_buildable(config: MoCoV3Config) -> MoCoV3ForPreTraining:
    """
    Build a model without data.

    Raises:
        UsageError: a configuration from which no model can be built, or only one that is too large.
    """
    kind = config.backbone_config.model_type
    try:
        with torch.device("meta"):
            model = MoCoV3ForPreTraining(config)
    except UnsupportedBackboneError as error:
        raise UsageError(str(error)) from error
    except Exception as error:  # from any model of transformers
        reason = f"unknown name {error}" if isinstance(error, KeyError) else one_line(error)
        raise UsageError(f"no {kind!r} backbone can be built from backbone_config: {reason}") from error
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if num_parameters > MOST_PARAMETERS:
        raise UsageError(f"the model has {num_parameters:,} parameters, more than {MOST_PARAMETERS:,}")
    return model


def check_images(model: MoCoV3ForPreTraining, image_size: int) -> None:
    """
    Check that a model without data takes images of the size of the views.

    Raises:
        UsageError: its forward pass fails for them.
    """
    if model.mocov3.pooling.reads_values:
        return
    kind, channels = model.config.backbone_config.model_type, model.config.num_channels or 3
    encoder, is_training = model.mocov3, model.mocov3.training
    try:
        with torch.device("meta"), torch.no_grad():
            encoder.eval()(torch.zeros(2, channels, image_size, image_size))
    except Exception as error:  # from any model of transformers
        raise UsageError(
            f"a {kind!r} backbone does not take images of {image_size}×{image_size} pixels: pass another --image_size,"
            f" or change backbone_config ({one_line(error)})"
        ) from error
    encoder.train(is_training)


def build_model(recipe: Recipe) -> MoCoV3ForPreTraining:
    """The model with initial weights that depend on the seed alone, or with those of `--model`."""
    torch.manual_seed(recipe.run.seed)
    if recipe.model.model is None:
        return MoCoV3ForPreTraining(build_config(recipe))
    model = MoCoV3ForPreTraining.from_pretrained(resolve_model(recipe.model.model))
    if recipe.model.adapt_input_channels:
        model = with_input_channels(model, recipe.data.num_channels or 3)
    return model


def build_optimizer(recipe: Recipe, model: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    """LARS or (fused) AdamW on everything trainable."""
    options = recipe.optimization
    groups = parameter_groups(model, options.weight_decay, options.exclude_norms_and_biases)
    if options.optimizer == "lars":
        trust: dict[str, Any] = {"trust_coefficient": options.trust_coefficient, "trust_clip": options.trust_clip}
        return LARS(groups, plan.learning_rate, momentum=options.lars_momentum, **trust)
    return torch.optim.AdamW(
        groups,
        plan.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        fused=True,
    )


def build_source(recipe: Recipe):
    """
    The images.

    Raises:
        UsageError: no data set.
        ValueError: a data set that does not exist, is empty, or has no image column.
    """
    data = recipe.data
    if data.dataset_name is None:
        raise UsageError("--dataset_name is missing: pass a folder of images or a Hub id")
    with split_option("--train_split"):
        return open_source(
            data.dataset_name,
            config_name=data.dataset_config_name,
            split=data.train_split,
            image_column=data.image_column,
            streaming=data.streaming,
        )


def build_loader(recipe: Recipe, source, plan: Plan, accelerator: Accelerator) -> TwoViewLoader:
    """The batches of this process."""
    return TwoViewLoader(
        source,
        view_settings(asdict(recipe.views)),
        global_batch_size=plan.global_batch_size,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        num_workers=num_workers(recipe, accelerator),
        seed=recipe.run.seed,
        steps_per_epoch=recipe.data.steps_per_epoch,
        on_bad_image="skip" if recipe.data.on_bad_image == "skip" else "error",
        max_bad_fraction=recipe.data.max_bad_fraction,
        bad_images_file=Path(recipe.run.output_dir) / BAD_IMAGES,
        cache_on_device=accelerator.device if recipe.data.cache_images_on_device else None,
        pin_memory=accelerator.device.type == "cuda",
        pixel_format=pixel_format(recipe),
    )


def num_workers(recipe: Recipe, accelerator: Accelerator) -> int:
    """Data-loading workers of this process: as in the recipe, else its share of the CPU cores."""
    if recipe.hardware.dataloader_num_workers is not None:
        return recipe.hardware.dataloader_num_workers
    return default_workers(accelerator.num_processes)


def doubtful_choices(recipe: Recipe, plan: Plan, model: MoCoV3ForPreTraining, num_processes: int) -> list[str]:
    """Choices that are known to fail or that differ from the method, one line each."""
    doubts = []
    options = recipe.optimization
    model_type = model.config.backbone_config.model_type
    base_learning_rate = plan.learning_rate * 256 / plan.global_batch_size
    if options.optimizer == "lars" and model_type != "resnet":
        doubts.append(
            f"LARS with a {model_type!r} backbone: MoCo v3 trains transformers with AdamW and ResNets with LARS; use"
            " --optimizer adamw --base_learning_rate 1.5e-4 --weight_decay 0.1"
        )
    if options.optimizer == "lars" and base_learning_rate < SMALLEST_LARS_BASE_LEARNING_RATE:
        doubts.append(
            f"a base learning rate of {base_learning_rate:g} is too small for LARS, the weights hardly change; use"
            " --base_learning_rate 0.3 (300 epochs) or 0.6 (100 epochs)"
        )
    if options.optimizer == "adamw" and base_learning_rate > LARGEST_ADAMW_BASE_LEARNING_RATE:
        doubts.append(
            f"a base learning rate of {base_learning_rate:g} is too large, AdamW diverges; use --base_learning_rate"
            " 1.5e-4"
        )
    if options.optimizer == "adamw" and model_type == "resnet":
        doubts.append(
            "AdamW with a ResNet: MoCo v3 trains ResNets with LARS; use --optimizer lars --base_learning_rate 0.3"
            " --weight_decay 1.5e-6"
        )
    if num_processes > 1:
        local = {
            type(layer).__name__
            for layer in model.modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not isinstance(layer, GlobalBatchNorm)
        }
        if local:
            doubts.append(
                f"{', '.join(sorted(local))} in the backbone keep statistics of their own process: the result depends"
                " on the number of processes"
            )
    return doubts
