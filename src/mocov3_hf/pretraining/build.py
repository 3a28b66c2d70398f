"""From a recipe to the parts of a run: accelerator, data, model, optimizer. What cannot work is refused here."""

import inspect
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import ProjectConfiguration
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING

from ..data.loader import TwoViewLoader
from ..data.photometric import PhotometricStage
from ..data.sources import open_source
from ..data.views import ViewSettings, two_views
from ..model.batchnorm_mocov3 import GlobalBatchNorm
from ..model.configuration_mocov3 import MoCoV3Config, MoCoV3ViTConfig, to_pair
from ..model.modeling_mocov3_pretraining import MoCoV3ForPreTraining
from ..optim import LARS, parameter_groups
from ..plan import Plan
from ..recipe import NO_ACCUMULATION, Recipe, RecipeError
from .sharding import shard


# Base learning rates (per 256 images) between which each optimizer is known to work with MoCo v3: the paper has
# 1e-4 to 1.5e-4 for AdamW and 0.3 to 0.6 for LARS.
LARGEST_ADAMW_BASE_LEARNING_RATE = 0.01
SMALLEST_LARS_BASE_LEARNING_RATE = 0.03

# How accelerate asks a process for what would spread the weights over the processes in its own way.
SHARDED_LAUNCHES = {
    "FSDP": "ACCELERATE_USE_FSDP",
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
    "a parallelism configuration": "ACCELERATE_USE_PARALLELISM_CONFIG",
}


def build_accelerator(recipe: Recipe) -> Accelerator:
    """
    The processes, the precision and the trackers of a run.

    Raises:
        RecipeError: a launch that asked for several processes and got one, fp16 without a GPU, a tracker that is not
            installed.
    """
    check_launch(os.environ)
    trackers = check_trackers(recipe.run.report_to)
    if recipe.run.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise RecipeError("--mixed_precision fp16 needs a GPU: use bf16 or no on this machine")
    accelerator = Accelerator(
        # accelerate joins the processes of a machine without accelerators only when told that it has none.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=recipe.run.mixed_precision,
        log_with=trackers or None,
        project_config=ProjectConfiguration(project_dir=recipe.run.output_dir, logging_dir=recipe.run.output_dir),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.run.communication_timeout)),
        ],
    )
    accelerator.ddp_handler = ddp_options()
    started = int(os.environ.get("WORLD_SIZE", accelerator.num_processes))
    if accelerator.num_processes != started:
        raise RecipeError(f"{started} processes were started and {accelerator.num_processes} found each other")
    return accelerator


@dataclass
class DDPOptions(DistributedDataParallelKwargs):
    """accelerate's options of DDP, and the one that follows `broadcast_buffers` in torch 2.14."""

    forward_sync_buffers: bool | None = None


def ddp_options() -> DDPOptions:
    """Running statistics are already those of all processes: there is nothing to broadcast in a step."""
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DDPOptions(gradient_as_bucket_view=True, **{name: False})


def check_launch(environment: dict[str, str]) -> None:
    """
    `accelerate launch` names a meeting point whenever several processes are asked for, but on CPUs without MPI it
    starts a single one and does not say so.

    Its configuration can also ask for what this method cannot do.

    Raises:
        RecipeError: such a launch, or one with gradient accumulation or with weights spread over the processes in
            accelerate's way, which knows no momentum encoder, and none at all on CPUs.
    """
    for name, switch in SHARDED_LAUNCHES.items():
        if environment.get(switch, "false").lower() in ("true", "1"):
            raise RecipeError(
                f"accelerate launch asks for {name}: leave it out of its configuration. To spread weights and"
                " optimizer over the processes pass --fsdp true instead; where activations are what fills the memory,"
                " --gradient_cache_chunk_size or --gradient_checkpointing true"
            )
    asked_for_several = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
    is_alone = not any(name in environment for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"))
    if asked_for_several and is_alone:
        raise RecipeError(
            "accelerate launch was asked for several processes and started one, as it does on CPUs: start them with"
            " 'torchrun --nproc_per_node N scripts/pretrain.py ...', or pass --num_processes 1"
        )
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps.strip() != "1":
        raise RecipeError(
            f"accelerate launch asks for {steps} gradient_accumulation_steps: {NO_ACCUMULATION}. Set them to 1 in its"
            " configuration"
        )


def check_trackers(names: list[str]) -> list[str]:
    """
    Names of the trackers, without "none".

    Raises:
        RecipeError: an unknown one, or one that is not installed.
    """
    names = [name for name in names if name != "none"]
    available = [str(tracker.value) for tracker in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise RecipeError(f"--report_to {name}: known are {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}, none")
        if name not in available:
            raise RecipeError(f"--report_to {name} needs a package that is not installed: pip install {name}")
    return names


def build_config(recipe: Recipe) -> MoCoV3Config:
    """
    Configuration of the model; the backbone gets the image size of the views where it knows one.

    Raises:
        RecipeError: an unknown model type, or values that do not fit together.
    """
    values = dict(recipe.model.backbone_config)
    image_size = recipe.views.image_size
    config_class = CONFIG_MAPPING[values["model_type"]] if values.get("model_type") in CONFIG_MAPPING else None
    if hasattr(config_class, "image_size") and values.setdefault("image_size", image_size) != image_size:
        raise RecipeError(
            f"backbone_config has image_size {values['image_size']} and the views {image_size}: leave the former out"
        )
    try:
        return MoCoV3Config(
            backbone_config=values,
            projection_dim=recipe.model.projection_dim,
            head_hidden_size=recipe.model.head_hidden_size,
            num_projector_layers=recipe.model.num_projector_layers,
            num_predictor_layers=recipe.model.num_predictor_layers,
            predictor_final_norm=recipe.model.predictor_final_norm,
            head_batch_norm=recipe.model.head_batch_norm,
            temperature=recipe.model.temperature,
            zero_init_residual=recipe.model.zero_init_residual,
        )
    except (ValueError, StrictDataclassError) as error:
        # huggingface_hub wraps a failed validation: its cause has the message.
        raise RecipeError(str(error.__cause__ or error)) from error


def check_model(recipe: Recipe) -> None:
    """
    Refuse a model that cannot be built before data are read and weights drawn.

    Raises:
        RecipeError: options that do not fit together, or no model at `model_name_or_path`.
    """
    name = recipe.model.model_name_or_path
    if name is None:
        build_config(recipe)
        return
    try:
        config = MoCoV3Config.from_pretrained(name)
    except OSError as error:
        raise RecipeError(f"--model_name_or_path {name}: {str(error).splitlines()[0]}") from error
    except StrictDataclassError as error:
        raise RecipeError(f"--model_name_or_path {name}: {error.__cause__}") from error
    backbone, image_size = config.backbone_config, recipe.views.image_size
    if backbone.model_type == MoCoV3ViTConfig.model_type and to_pair(backbone.image_size) != (image_size, image_size):
        raise RecipeError(
            f"--model_name_or_path {name} takes images of {backbone.image_size} pixels, the views have {image_size}:"
            f" pass --image_size {backbone.image_size}"
        )


def build_model(recipe: Recipe) -> MoCoV3ForPreTraining:
    """The model with initial weights that depend on the seed alone, or with those of `model_name_or_path`."""
    torch.manual_seed(recipe.run.seed)
    if recipe.model.model_name_or_path is None:
        return MoCoV3ForPreTraining(build_config(recipe))
    return MoCoV3ForPreTraining.from_pretrained(recipe.model.model_name_or_path)


def build_optimizer(recipe: Recipe, model: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    """LARS or (fused) AdamW on everything trainable."""
    options = recipe.optimization
    groups = parameter_groups(model, options.weight_decay, options.exclude_norms_and_biases)
    if options.optimizer == "lars":
        return LARS(
            groups, plan.learning_rate, momentum=options.lars_momentum, trust_coefficient=options.trust_coefficient
        )
    return torch.optim.AdamW(
        groups,
        plan.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        fused=True,
    )


def distribute(
    recipe: Recipe, model: MoCoV3ForPreTraining, plan: Plan, accelerator: Accelerator, fsdp: bool
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """The model and its optimizer on their devices: a copy on every process (DDP), or spread over them (FSDP2)."""
    if not fsdp:
        return accelerator.prepare(model, build_optimizer(recipe, model, plan))
    # To the device and under autocast; "evaluation" is accelerate's word for no DDP.
    model = accelerator.prepare_model(model, evaluation_mode=True)
    shard(model, accelerator.device, accelerator.num_processes)
    return model, accelerator.prepare(build_optimizer(recipe, model, plan))


def build_source(recipe: Recipe):
    """
    The images.

    Raises:
        RecipeError: no data set named.
        ValueError: a data set that is missing, empty, or without an image column.
    """
    data = recipe.data
    if data.dataset_name is None:
        raise RecipeError("there are no images to train on: pass --dataset_name with a Hub id or a local folder")
    return open_source(
        data.dataset_name,
        config_name=data.dataset_config_name,
        split=data.train_split,
        image_column=data.image_column,
        streaming=data.streaming,
    )


def build_view_settings(recipe: Recipe) -> tuple[ViewSettings, ViewSettings]:
    """The two asymmetric augmentations."""
    views = recipe.views
    first, second = two_views(
        image_size=views.image_size,
        crop_scale=tuple(views.crop_scale),
        crop_ratio=tuple(views.crop_ratio),
        jitter_probability=views.jitter_probability,
        brightness=views.brightness,
        contrast=views.contrast,
        saturation=views.saturation,
        hue=views.hue,
        grayscale_probability=views.grayscale_probability,
        blur_sigma=tuple(views.blur_sigma),
        flip_probability=views.flip_probability,
    )
    return (
        replace(first, blur_probability=views.blur_probability_1, solarize_probability=views.solarize_probability_1),
        replace(second, blur_probability=views.blur_probability_2, solarize_probability=views.solarize_probability_2),
    )


def build_photometric(recipe: Recipe, device: torch.device) -> PhotometricStage:
    """The device half of the augmentation."""
    views = recipe.views
    is_blurred = views.blur_probability_1 > 0 or views.blur_probability_2 > 0
    return PhotometricStage(max_blur_sigma=views.blur_sigma[1] if is_blurred else 0.0).to(device)


def build_loader(recipe: Recipe, source, plan: Plan, accelerator: Accelerator) -> TwoViewLoader:
    """This process's share of the batches."""
    return TwoViewLoader(
        source,
        build_view_settings(recipe),
        global_batch_size=plan.global_batch_size,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        num_workers=num_workers(recipe, accelerator),
        seed=recipe.run.seed,
        steps_per_epoch=recipe.data.steps_per_epoch,
        on_bad_image=recipe.data.on_bad_image,
        max_bad_fraction=recipe.data.max_bad_fraction,
        bad_images_file=Path(recipe.run.output_dir) / "bad_images.jsonl",
        cache_on_device=accelerator.device if recipe.data.cache_images_on_device else None,
        pin_memory=accelerator.device.type == "cuda",
    )


def num_workers(recipe: Recipe, accelerator: Accelerator) -> int:
    """Decoding processes for this training process: as the recipe says, else its share of the machine's cores."""
    if recipe.data.dataloader_num_workers is not None:
        return recipe.data.dataloader_num_workers
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    return max(1, (os.cpu_count() or 1) // local_processes)


def doubtful_choices(recipe: Recipe, plan: Plan, model: MoCoV3ForPreTraining, num_processes: int) -> list[str]:
    """What is known to fail or to differ from the method, a sentence each, for the user to judge."""
    doubts = []
    options = recipe.optimization
    model_type = model.config.backbone_config.model_type
    base_learning_rate = plan.learning_rate * 256 / plan.global_batch_size
    if options.optimizer == "lars" and model_type != "resnet":
        doubts.append(
            f"LARS on a {model_type!r} backbone: MoCo v3 trains transformers with AdamW, LARS is for ResNet; use"
            " --optimizer adamw --base_learning_rate 1.5e-4 --weight_decay 0.1"
        )
    if options.optimizer == "lars" and base_learning_rate < SMALLEST_LARS_BASE_LEARNING_RATE:
        doubts.append(
            f"a base learning rate of {base_learning_rate:g} is made for AdamW on ViT: with LARS the weights hardly"
            " move; use --base_learning_rate 0.3 (300 epochs) or 0.6 (100 epochs)"
        )
    if options.optimizer == "adamw" and base_learning_rate > LARGEST_ADAMW_BASE_LEARNING_RATE:
        doubts.append(
            f"a base learning rate of {base_learning_rate:g} is made for LARS: AdamW diverges; use"
            " --base_learning_rate 1.5e-4"
        )
    if options.optimizer == "adamw" and model_type == "resnet":
        doubts.append(
            "AdamW on a ResNet: MoCo v3 trains ResNets with LARS; use --optimizer lars --base_learning_rate 0.3"
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
                f"{', '.join(sorted(local))} in the backbone keep statistics of their own process: with several"
                " processes the result depends on their number"
            )
    return doubts
