"""What makes a step fast: chosen for device, precision and backbone where the recipe leaves it open.

The step itself (step.py) knows nothing of it. Every choice but `tf32` gives the numbers of the plain step up to the
order in which they are summed; benchmarks/step.py measures what each is worth.
"""

import ctypes
import os
import platform
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from ..data.photometric import PhotometricStage
from ..model.configuration_mocov3 import MoCoV3ViTConfig
from ..model.modeling_mocov3_pretraining import MoCoV3ForPreTraining, has_batch_norm
from ..recipe import AccelerationRecipe, Recipe, RecipeError


# Its ReLUs follow normalisations and sums, neither of which needs its own output for its gradient.
RESNET = "resnet"

# Options of glibc's mallopt (its malloc.h): nothing is mapped anew for each allocation, nothing is given back, and the
# heap grows in large pieces.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
KEEP_FREED_MEMORY = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28))


@dataclass(frozen=True)
class Acceleration:
    """A resolved choice; the fields are those of the recipe's group, without an open one."""

    tf32: bool
    channels_last: bool
    in_place_relu: bool
    attn_implementation: str | None  # None for a backbone without attention, or whose own default stays
    views_in_one_pass: bool
    pooled_query_only: bool
    keep_freed_memory: bool
    deterministic: bool
    torch_compile: bool
    gradient_checkpointing: bool
    fsdp: bool

    def describe(self) -> str:
        """One line: `sdpa attention, pooled_query_only`, or `nothing`."""
        attention = [f"{self.attn_implementation} attention"] if self.attn_implementation is not None else []
        switches = [name for name, value in asdict(self).items() if value is True]
        return ", ".join(attention + switches) or "nothing"


def choose_acceleration(
    recipe: Recipe, model: MoCoV3ForPreTraining, device: torch.device, num_processes: int = 1
) -> Acceleration:
    """
    What the recipe asks for, and for what it leaves open what is fastest; the same on the same kind of device.

    Raises:
        RecipeError: an option that the device or the backbone does not have.
    """
    # A single process has nobody to share its weights with.
    asked = replace(recipe.acceleration, fsdp=recipe.acceleration.fsdp and num_processes > 1)
    mixed_precision = recipe.run.mixed_precision
    check_acceleration(asked, model, device)
    if (asked.attn_implementation or "").startswith("flash") and mixed_precision == "no":
        raise RecipeError(
            f"--attn_implementation {asked.attn_implementation} computes in half precision only: pass"
            " --mixed_precision bf16, or --attn_implementation sdpa"
        )
    if asked.fsdp and mixed_precision == "fp16":
        raise RecipeError("--fsdp true has no gradient scaler, which --mixed_precision fp16 needs: pass bf16")
    is_own_vit = model.config.backbone_config.model_type == MoCoV3ViTConfig.model_type
    return Acceleration(
        # Under autocast only the loss is left in float32, where TF32 costs digits and gives no time.
        tf32=given(asked.tf32, has_tf32(device) and mixed_precision == "no"),
        # FSDP2 gathers weights in the order in which they are written down.
        channels_last=given(asked.channels_last, has_spatial_convolutions(model.mocov3) and not asked.fsdp),
        in_place_relu=given(asked.in_place_relu, model.config.backbone_config.model_type == RESNET),
        attn_implementation=given(
            asked.attn_implementation, fastest_attention(device, mixed_precision) if is_own_vit else None
        ),
        # Measured on a CPU 2 to 4 % slower than two passes, in float32 and in bf16; on a GPU faster.
        views_in_one_pass=given(
            asked.views_in_one_pass, device.type == "cuda" and is_own_vit and not has_batch_norm(model.mocov3)
        ),
        pooled_query_only=given(asked.pooled_query_only, is_own_vit),
        keep_freed_memory=given(asked.keep_freed_memory, device.type == "cpu" and has_glibc()),
        # CPUs have no algorithms of the other kind.
        deterministic=given(asked.deterministic, device.type == "cuda"),
        torch_compile=asked.torch_compile,
        gradient_checkpointing=asked.gradient_checkpointing,
        fsdp=asked.fsdp,
    )


def this_device() -> torch.device:
    """The kind of device that a run on this machine will use."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def given(asked, otherwise):
    return otherwise if asked is None else asked


def check_acceleration(asked: AccelerationRecipe, model: MoCoV3ForPreTraining, device: torch.device) -> None:
    """
    Raises:
        RecipeError: an option that the device or the backbone does not have.
    """
    model_type = model.config.backbone_config.model_type
    if asked.tf32 and not has_tf32(device):
        raise RecipeError("--tf32 needs a CUDA GPU of compute capability 8.0 (Ampere) or later: leave it out")
    if asked.keep_freed_memory and not has_glibc():
        raise RecipeError("--keep_freed_memory is an option of glibc, which this system does not have: leave it out")
    if asked.views_in_one_pass and has_batch_norm(model.mocov3):
        raise RecipeError(
            f"--views_in_one_pass: the backbone {model_type!r} has batch normalisation, which must see the statistics"
            " of one view: leave it out"
        )
    if asked.in_place_relu and model_type != RESNET:
        raise RecipeError(
            f"--in_place_relu is for the backbone {RESNET!r}, where it is known to be safe, not {model_type!r}:"
            " leave it out"
        )
    if asked.pooled_query_only and model_type != MoCoV3ViTConfig.model_type:
        raise RecipeError(f"--pooled_query_only is for the backbone 'mocov3_vit', not {model_type!r}: leave it out")
    if asked.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise RecipeError(
            f"--gradient_checkpointing: the backbone {model_type!r} cannot recompute its activations: leave it out, or"
            " use a smaller --per_device_train_batch_size"
        )
    if asked.fsdp and asked.channels_last:
        raise RecipeError(
            "--channels_last true: --fsdp true gathers weights in the order in which they are written down: leave one"
            " of them out"
        )
    if asked.fsdp and asked.torch_compile:
        raise RecipeError(
            "--torch_compile true: encoders are compiled as a whole, and --fsdp true takes them apart: leave one of"
            " them out"
        )
    if asked.attn_implementation is not None and not model.mocov3.backbone._supports_attention_backend:
        raise RecipeError(
            f"--attn_implementation: the attention of the backbone {model_type!r} cannot be chosen: leave it out"
        )


def has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def has_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def fastest_attention(device: torch.device, mixed_precision: str) -> str:
    """The fused kernel, except for bf16 on CPUs, where plain matrix products are faster (benchmarks/step.py)."""
    return "eager" if device.type == "cpu" and mixed_precision == "bf16" else "sdpa"


def has_spatial_convolutions(module: nn.Module) -> bool:
    """Whether convolutions are more than the projection of patches, which no convolution follows."""
    convolutions = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    return len(convolutions) > 1


def accelerate(model: MoCoV3ForPreTraining, choice: Acceleration) -> None:
    """
    Set up `model`, in place and before the optimizer is built, and what is a state of the whole process.

    Raises:
        RecipeError: an attention that is unknown or not installed; a C library that refuses.
    """
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high" if choice.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = choice.tf32
        choose_algorithms(choice.deterministic, model.config.backbone_config.model_type == MoCoV3ViTConfig.model_type)
    if choice.keep_freed_memory:
        keep_freed_memory()
    accelerate_model(model, choice)


def accelerate_model(model: MoCoV3ForPreTraining, choice: Acceleration) -> None:
    """
    Set up `model` alone, in place; weights keep their values and their names.

    Raises:
        RecipeError: an attention that is unknown or not installed.
    """
    if choice.channels_last:
        model.to(memory_format=torch.channels_last)
    if choice.in_place_relu:
        for encoder in (model.mocov3, model.momentum_encoder.encoder):
            for layer in encoder.modules():
                if isinstance(layer, nn.ReLU):
                    layer.inplace = True
    if choice.attn_implementation is not None:
        set_attention(model, choice.attn_implementation)
    model.set_views_in_one_pass(choice.views_in_one_pass)
    model.pooled_query_only = choice.pooled_query_only
    if choice.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if choice.torch_compile:
        for encoder in (model.mocov3, model.momentum_encoder.encoder):
            compile_in_place(encoder)


def choose_algorithms(deterministic: bool, strictly: bool) -> None:
    """
    Whether GPUs take only algorithms that sum in the same order every time.

    Where torch has none for an operation, it stops if `strictly`, and otherwise warns and takes what it has. That also
    keeps a faster backward pass of the fused attention, whose sums are in no order.
    """
    if deterministic:
        # cuBLAS reads it when it is first used: a workspace of fixed size, which its own documentation asks for.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=not strictly)
    torch.backends.cudnn.deterministic = deterministic
    torch.utils.deterministic.fill_uninitialized_memory = False  # a help for finding bugs that costs time


def keep_freed_memory() -> None:
    """
    Let this process keep the memory that it frees, until it ends.

    Otherwise glibc takes every large tensor from the system anew and gives it back at once, and the system clears each
    of its pages on first touch.

    Raises:
        RecipeError: the C library refuses.
    """
    library = ctypes.CDLL(None)
    for name, value in KEEP_FREED_MEMORY:
        if not library.mallopt(name, value):
            raise RecipeError(f"--keep_freed_memory: glibc refused mallopt({name}, {value}): pass false")


def set_attention(model: MoCoV3ForPreTraining, name: str) -> None:
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise RecipeError(f"--attn_implementation {name}: {' '.join(str(error).split())}") from error


def enable_gradient_checkpointing(model: MoCoV3ForPreTraining) -> None:
    """Of the trained encoder: the momentum encoder keeps no activations."""
    encoder = model.mocov3
    # transformers has renamed it; both names take no argument here.
    enable = getattr(encoder, "activation_checkpointing_enable", None) or encoder.gradient_checkpointing_enable
    enable()


def accelerate_augmentation(stage: PhotometricStage, choice: Acceleration, device: torch.device) -> None:
    """
    Set up the device half of the augmentation, in place. On a CPU nothing is compiled: there it takes image by image,
    and only what applies to each (docs/LOG.md).
    """
    if choice.torch_compile and device.type != "cpu":
        compile_in_place(stage)


def compile_in_place(module: nn.Module) -> None:
    """
    Compile a module and leave the names of its weights alone.

    Meant for the encoders and the augmentation; heads and loss stay as they are: they are little work, and exchange
    numbers between processes. Random numbers are those of the step that is not compiled, which also makes the second
    pass of the gradient cache repeat the first. Kernels are not chosen by the clock where a run asks for the same bits
    every time.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    # One size is compiled, as a run has it: kernels for any size are slower.
    module.compile(dynamic=False, options={"fallback_random": True, "deterministic": deterministic})
