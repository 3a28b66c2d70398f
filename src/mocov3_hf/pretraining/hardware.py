"""What makes a step fast: chosen for the device, the precision and the backbone.

The step itself (step.py) does not depend on it. Every choice but TF32 computes the plain step up to the order of
sums; benchmarks/step.py measures them. Each is worth at least 5 % of a step somewhere (docs/LOG.md), except for the
candidates, which are off.
"""

import ctypes
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from accelerate.utils import compile_regions_deepspeed as compile_regions  # in place, unlike `compile_regions`
from torch import nn

from ..data.photometric import PhotometricStage
from ..loading import enable_gradient_checkpointing
from ..model.configuration_mocov3_vit import MoCoV3ViTConfig
from ..model.modeling_mocov3_pretraining import MoCoV3ForPreTraining
from ..precision import resolve_precision
from ..reporting import UsageError, one_line
from .candidates import CUDNN_ATTENTION, change_momentum_forward, copy_features, register_attention
from .recipe import Recipe, resumed_recipe


# Options of glibc's mallopt (malloc.h): map nothing per allocation, give nothing back, and grow in large pieces.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
KEEP_FREED_MEMORY = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28))


@dataclass(frozen=True)
class HardwareSettings:
    """The resolved choices."""

    attn_implementation: str | None  # None keeps the backbone's default
    tf32: bool  # float32 matrix products of GPUs in TF32
    channels_last: bool  # memory format of convolutions
    keep_freed_memory: bool  # of the process, on CPUs
    deterministic: bool
    torch_compile: bool
    gradient_checkpointing: bool
    # Candidates (candidates.py): off in every run, until a GPU has measured them.
    cuda_graphs: bool = False  # compiled encoders replay their kernels
    max_autotune: bool = False  # compiled encoders: matrix products with fused epilogues, chosen by timing
    compile_regions: bool = False  # each block on its own instead of a whole encoder: a faster start
    momentum_low_precision: bool = False  # copies of the momentum encoder's weights in the dtype of autocast
    momentum_inference_mode: bool = False
    prefetch_views: bool = False  # copy to the device and augmentation one batch ahead

    def describe(self) -> str:
        """One line: `sdpa attention, channels_last`, or `nothing`."""
        attention = [f"{self.attn_implementation} attention"] if self.attn_implementation is not None else []
        switches = [name for name, value in asdict(self).items() if value is True]
        return ", ".join(attention + switches) or "nothing"


def settle_precision(recipe: Recipe, device: torch.device) -> tuple[Recipe, str]:
    """
    The recipe with the precision that a run on a device uses, and the settings as text, with the reason for it.

    Raises:
        UsageError: as `resolve_precision`, or a precision that another option does not support.
    """
    resumed = resumed_recipe(recipe)
    saved = None if resumed is None else resumed.hardware.mixed_precision
    precision, reason = resolve_precision(recipe.hardware.mixed_precision, device, saved)
    recipe = replace(recipe, hardware=replace(recipe.hardware, mixed_precision=precision))
    return recipe, f"mixed_precision {precision}{reason and f' ({reason})'}"


def choose_settings(recipe: Recipe, model: MoCoV3ForPreTraining, device: torch.device) -> HardwareSettings:
    """
    The recipe's choices and, where it is open, the fastest; the same on the same kind of device.

    Raises:
        UsageError: an option that the backbone or the precision does not support.
    """
    options, backbone = recipe.hardware, model.config.backbone_config.model_type
    attention, precision = options.attn_implementation, options.mixed_precision
    if options.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise UsageError(
            f"--gradient_checkpointing is not supported by the backbone {backbone!r}: leave it out, or use a smaller"
            " --per_device_train_batch_size"
        )
    if attention is not None and not model.mocov3.backbone._supports_attention_backend:
        raise UsageError(f"--attn_implementation is not supported by the backbone {backbone!r}: leave it out")
    if (attention or "").startswith("flash") and precision == "no":
        raise UsageError(
            f"--attn_implementation {attention} needs half precision: pass --mixed_precision bf16, or"
            " --attn_implementation sdpa"
        )
    if attention is None and backbone == MoCoV3ViTConfig.model_type:
        attention = "sdpa"
    return HardwareSettings(
        attn_implementation=attention,
        # Under autocast only the loss is computed in float32, where TF32 costs accuracy and saves no time.
        tf32=has_tf32(device) and precision == "no",
        channels_last=has_spatial_convolutions(model.mocov3),
        keep_freed_memory=device.type == "cpu" and has_glibc(),
        # CPUs have no other algorithms.
        deterministic=device.type == "cuda" if options.deterministic is None else options.deterministic,
        torch_compile=options.torch_compile,
        gradient_checkpointing=options.gradient_checkpointing,
    )


def has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def has_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def has_spatial_convolutions(module: nn.Module) -> bool:
    """Whether there are convolutions besides a patch projection."""
    return sum(isinstance(layer, nn.Conv2d) for layer in module.modules()) > 1


def set_up(model: MoCoV3ForPreTraining, settings: HardwareSettings) -> None:
    """
    Apply the choices to the process and to a model, in place, before its optimizer is built.

    Raises:
        UsageError: an attention that is unknown or not installed.
    """
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high" if settings.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = settings.tf32
        is_own_vit = model.config.backbone_config.model_type == MoCoV3ViTConfig.model_type
        choose_algorithms(settings.deterministic, strictly=is_own_vit)
    if settings.keep_freed_memory:
        keep_freed_memory()
    set_up_model(model, settings)


def set_up_model(model: MoCoV3ForPreTraining, settings: HardwareSettings) -> None:
    """
    Apply the choices to a model alone, in place; weights keep their values and names.

    Raises:
        UsageError: an attention that is unknown or not installed.
    """
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    if settings.attn_implementation is not None:
        if settings.attn_implementation == CUDNN_ATTENTION:
            register_attention()
        try:
            model.set_attn_implementation(settings.attn_implementation)
        except (ValueError, ImportError) as error:
            raise UsageError(f"--attn_implementation {settings.attn_implementation}: {one_line(error)}") from error
    if settings.gradient_checkpointing:
        enable_gradient_checkpointing(model.mocov3)  # the momentum encoder keeps no activations
    if settings.torch_compile:
        for encoder in (model.mocov3, model.momentum_encoder.encoder):
            compile_in_place(encoder, settings)
        if settings.cuda_graphs:
            copy_features(model)
    if settings.momentum_low_precision or settings.momentum_inference_mode:
        change_momentum_forward(model, settings.momentum_low_precision, settings.momentum_inference_mode)


def choose_algorithms(deterministic: bool, strictly: bool) -> None:
    """
    Whether GPUs use only algorithms that sum in a fixed order.

    Where torch has none for an operation, it raises if `strictly`, and otherwise warns and uses what it has. That also
    keeps a faster backward pass of the fused attention, whose sums have no fixed order.
    """
    if deterministic:
        # Read by cuBLAS when it is first used: a workspace of fixed size, as its documentation requires.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=not strictly)
    torch.backends.cudnn.deterministic = deterministic
    torch.utils.deterministic.fill_uninitialized_memory = False  # for finding bugs; costs time


def keep_freed_memory() -> None:
    """
    Let this process keep the memory that it frees, where glibc accepts that.

    Otherwise glibc requests every large tensor from the system and returns it at once, and the system clears each page
    again on first use: 8 to 12 % of a step.
    """
    library = ctypes.CDLL(None)
    for name, value in KEEP_FREED_MEMORY:
        library.mallopt(name, value)


def compile_augmentation(stage: PhotometricStage, settings: HardwareSettings, device: torch.device) -> None:
    """Compile the device half of the augmentation, in place; on CPUs it is faster uncompiled (docs/LOG.md)."""
    if settings.torch_compile and device.type != "cpu":
        compile_in_place(stage)


def compile_in_place(module: nn.Module, settings: HardwareSettings | None = None) -> None:
    """
    Compile a module without renaming its weights.

    For the encoders and the augmentation: heads and loss are little work and communicate. Random numbers are those of
    the uncompiled step, so that the second pass of the gradient cache repeats the first. With deterministic algorithms
    kernels are not chosen by timing.

    Args:
        module: An encoder or the augmentation.
        settings: Of an encoder: how it is compiled.
    """
    options = {"fallback_random": True, "deterministic": torch.are_deterministic_algorithms_enabled()}
    compiled: Callable[..., None] = nn.Module.compile
    if settings is not None:
        if settings.cuda_graphs:
            options["triton.cudagraphs"] = True
        if settings.max_autotune:
            options |= {"max_autotune": True, "coordinate_descent_tuning": True}
        if settings.compile_regions:
            compiled = compile_regions
    # A run has one input size; kernels for any size are slower.
    compiled(module, dynamic=False, options=options)
