"""The one way to load a model with its image processor, for every command and class of the package.

One policy: a model is a folder, a Hub id, or the name of a published model. Its weights must be complete, with one
exception: a ViT that was saved without its pooling layer is loaded without it, and its feature is the CLS token.
Without a saved image processor, the default of MoCo v3's evaluation at the model's image size is used, with a warning.
"""

import copy
import inspect
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from .hints import describe_missing, joined, nearest
from .model.backbone_mocov3 import Pooling, masking_options
from .model.configuration_mocov3_vit import to_pair
from .problem_types import STANDARDIZED
from .processing import adapted, build_image_processor
from .reporting import UsageError, quiet_hub
from .run_folder import CONFIG
from .storage import is_local
from .zoo import fetch, load_zoo


logger = logging.get_logger(__name__)

# Legend of dimensions: B batch, C H W image, D width of the pooled features, L tokens.

DEFAULT_IMAGE_SIZE = 224
WHAT_LOADS = "a folder written by save_pretrained, a Hub id, or a name that mocov3 zoo lists"


# Options are text: while a call runs, its model in memory has this name there, and is saved in a temporary folder.
MODEL_IN_MEMORY = "model in memory"
folder_of_model: ContextVar[str | None] = ContextVar("folder_of_model", default=None)


def resolve_model(model: str | os.PathLike) -> str:
    """
    What `from_pretrained` takes for a model: a local folder, a Hub id, or the folder of a published model, which is
    downloaded and converted the first time.

    Raises:
        ValueError: A path that does not exist or holds no model.
    """
    name = os.path.expanduser(os.fspath(model))
    if name == MODEL_IN_MEMORY and (folder := folder_of_model.get()) is not None:
        return folder
    if not os.path.exists(name) and name in load_zoo():
        return fetch(name)
    if "://" in name:
        raise UsageError(
            f"model {name!r} is a URL: convert its checkpoint with mocov3 convert, and pass the new folder"
        )
    if is_local(name):
        if not os.path.exists(name):
            raise UsageError(describe_missing(name, "model folder", f"pass {WHAT_LOADS}"))
        if not os.path.isdir(name):
            raise UsageError(
                f"model folder {name!r} is a file: pass {WHAT_LOADS}. mocov3 convert makes a folder of a checkpoint"
            )
        if not (Path(name) / CONFIG).is_file():
            raise ValueError(
                f"folder {name!r} holds no model (no {CONFIG}): pass a folder written by save_pretrained, such as the"
                " output folder of mocov3 pretrain after its first checkpoint"
            )
    elif "/" not in name:
        meant = nearest(name, load_zoo(), cutoff=0.8)
        if meant:
            raise UsageError(f"there is no folder and no published model {name!r}{meant}")
    return name


def load_config(model: str | os.PathLike, **options: Any) -> PreTrainedConfig:
    """The configuration of a model; ValueError as `load_encoder`. `options` go to `from_pretrained`."""
    return from_pretrained(AutoConfig, resolve_model(model), **options)


def load_encoder(model: str | os.PathLike, **options: Any) -> PreTrainedModel:
    """
    The encoder of any vision model, without heads, in evaluation mode, on the CPU.

    Args:
        model: As `resolve_model`; whatever `AutoModel` loads: a pre-training model, a bare encoder, a classifier.
        options: Of `from_pretrained`: `dtype`, `attn_implementation`, `revision`, ...

    Raises:
        ValueError: No such model, or weights that are damaged or missing.
    """
    name = resolve_model(model)
    encoder, info = from_pretrained(AutoModel, name, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    if missing and all(key.startswith("pooler.") for key in missing):
        encoder, info = from_pretrained(AutoModel, name, output_loading_info=True, add_pooling_layer=False, **options)
        missing = sorted(info["missing_keys"])
    refuse_missing(name, encoder, missing)
    if encoder.config.model_type == "vit_mae":
        encoder.config.mask_ratio = 0.0  # features of the whole image
    return encoder.eval()


def load_classifier(model: str | os.PathLike, **options: Any) -> PreTrainedModel:
    """
    A classifier, complete, in evaluation mode, on the CPU.

    Args:
        model: As `resolve_model`; whatever `AutoModelForImageClassification` loads.
        options: Of `from_pretrained`.

    Raises:
        ValueError: As `load_encoder`; a model without a classifier or a trained head; a checkpoint of a regression.
    """
    name = resolve_model(model)
    config = load_config(name, **{key: value for key, value in options.items() if key == "revision"})
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ValueError(f"{name!r} is a {config.model_type!r} model, which has no image classifier")
    if getattr(config, STANDARDIZED, False):
        raise ValueError(
            f"{name!r} is a checkpoint within a regression, not in the units of its targets yet: resume the training"
        )
    classifier, info = from_pretrained(
        AutoModelForImageClassification, name, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    missing = sorted(info["missing_keys"])
    backbone = f"{classifier.base_model_prefix}."
    if missing and not any(key.startswith(backbone) for key in missing):
        raise ValueError(
            f"{name!r} is an encoder without a classification head ({', '.join(missing[:2])} missing): train one with"
            " mocov3 linear-probe or mocov3 finetune, or evaluate the encoder with mocov3 knn"
        )
    refuse_missing(name, classifier, missing)
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        key, found, expected = mismatched[0]
        raise ValueError(
            f"{name!r} holds {key} of shape {tuple(found)}, but its config.json ({classifier.config.num_labels}"
            f" classes) expects {tuple(expected)}: restore the config.json it was saved with"
        )
    return classifier.eval()


def load_processor(
    model: str | os.PathLike | None,
    config: PreTrainedConfig,
    *,
    image_size: int | None = None,
    interpolation: str | None = None,
    **options: Any,
) -> BaseImageProcessor:
    """
    The image processor saved with a model; without one, `build_image_processor` at the model's image size.

    Args:
        model: As `resolve_model`; None if there is only the configuration.
        config: Of the loaded model.
        image_size, interpolation: As `adapted`, instead of the saved ones.
        options: Of `from_pretrained`.

    Raises:
        ValueError: A saved processor that is damaged, and as `adapted`.
    """
    name = None if model is None else resolve_model(model)
    patch_size = max(to_pair(getattr(config, "patch_size", None) or 1))
    if image_size is not None and 0 < image_size < patch_size:
        raise UsageError(f"--image_size {image_size} is smaller than a patch of the model: pass {patch_size} or more")
    if name is not None and has_processor(name):
        try:
            saved = AutoImageProcessor.from_pretrained(name, **options)
        except OSError as error:
            if os.path.isdir(name):
                raise ValueError(f"the image processor of {name!r} cannot be loaded: {first_line(error)}") from error
        except Exception as error:
            raise ValueError(f"the image processor of {name!r} cannot be loaded: {first_line(error)}") from error
        else:
            return adapted(saved, image_size, interpolation)
    if image_size is None:
        image_size = image_size_of(config) or DEFAULT_IMAGE_SIZE
    default = build_image_processor(image_size, interpolation or "bilinear", num_channels_of(config))
    if name is not None:
        logger.warning(
            f"{name!r} has no image processor: resizing to {default.size['shortest_edge']}, cropping to {image_size},"
            f" normalizing with mean {_rounded(default.image_mean)} and standard deviation"
            f" {_rounded(default.image_std)}"
        )
    return default


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(value, 3) for value in values]


def has_processor(name: str) -> bool:
    """Whether a local folder holds an image processor; True for a Hub id, which is not asked here."""
    files = ("preprocessor_config.json", "processor_config.json")
    return not os.path.isdir(name) or any((Path(name) / file).is_file() for file in files)


def from_pretrained(auto_class: Any, name: str, **options: Any) -> Any:
    """
    `auto_class.from_pretrained` without its report of unused keys: heads are left out on purpose.

    Raises:
        ValueError: Whatever went wrong, in one line.
    """
    with quiet_transformers():
        try:
            return auto_class.from_pretrained(name, **options)
        # transformers, safetensors and the Hub client each have exceptions of their own for damaged or missing files.
        except Exception as error:
            if os.path.isdir(name):
                raise ValueError(f"model {name!r} cannot be loaded: {first_line(error)}") from error
            on_hub = f"as a Hub id it cannot be loaded: {first_line(error)}"
            raise ValueError(joined(describe_missing(name), on_hub)) from error


def refuse_missing(name: str, model: PreTrainedModel, missing: list[str]) -> None:
    """ValueError where a file lacks weights of its model: nothing is evaluated on random weights."""
    if missing:
        listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"{name!r} lacks {len(missing)} weights of {type(model).__name__} ({listed}): its weights and its"
            " config.json belong to different models"
        )


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Whether transformers and the Hub client show progress bars."""
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        yield
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


@contextmanager
def quiet_transformers(progress: bool = True) -> Iterator[None]:
    """Only errors from the loggers of transformers and of the Hub client; without `progress` also no progress bars."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with quiet_hub(), progress_bars(progress and logging.is_progress_bar_enabled()):
            yield
    finally:
        logging.set_verbosity(verbosity)


# Properties and outputs of a loaded model


def image_size_of(config: PreTrainedConfig) -> int | None:
    """Image size a model was built for in pixels (the shorter side); None where its architecture does not fix one."""
    size = getattr(config, "image_size", None) or getattr(getattr(config, "backbone_config", None), "image_size", None)
    return min(size) if isinstance(size, list | tuple) else size


def num_channels_of(config: PreTrainedConfig) -> int:
    """Channels of the images that a model takes; 3 where its configuration does not say."""
    parts = (config, getattr(config, "backbone_config", None))
    found = (getattr(part, "num_channels", None) for part in parts)
    return next((channels for channels in found if isinstance(channels, int)), 3)


def with_input_channels(model: PreTrainedModel, num_channels: int) -> PreTrainedModel:
    """
    A model for images with another number of channels, with the weights of a given one.

    The weights of every layer that takes the image are summed over the channels for one channel; otherwise they are
    repeated, and scaled so that the sum over the channels stays the same (as timm's `adapt_input_conv`).

    Raises:
        ValueError: An architecture whose configuration has no `num_channels`, or whose layers do not follow it.
    """
    found = num_channels_of(model.config)
    if found == num_channels:
        return model
    config = copy.deepcopy(model.config)
    holder = getattr(config, "backbone_config", None) or config
    if not isinstance(getattr(holder, "num_channels", None), int):
        raise ValueError(f"the configuration of a {holder.model_type!r} model has no num_channels to change")
    holder.num_channels = num_channels
    adapted_model = type(model)(config)
    state = dict(model.state_dict())
    for name, expected in adapted_model.state_dict().items():
        weight = state[name]
        if weight.shape != expected.shape:
            if weight.shape[1] != found or expected.shape[1] != num_channels:
                raise ValueError(f"{name} has the shape {tuple(weight.shape)}, expected {tuple(expected.shape)}")
            state[name] = adapt_input_weight(weight, num_channels)
    adapted_model.load_state_dict(state)
    return adapted_model.to(model.dtype).train(model.training)


def adapt_input_weight(weight: torch.Tensor, num_channels: int) -> torch.Tensor:
    """The weights (D, C, h, w) of a first layer for another number of channels, see `with_input_channels`."""
    if num_channels == 1:
        return weight.float().sum(dim=1, keepdim=True).to(weight.dtype)
    found = weight.shape[1]
    repeated = weight.float().repeat(1, -(-num_channels // found), 1, 1)[:, :num_channels]
    return (repeated * (found / num_channels)).to(weight.dtype)


def base_encoder(model: nn.Module) -> PreTrainedModel:
    """The encoder inside a model: without wrappers (DDP, torch.compile) and heads."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    return getattr(model, "base_model", model)


def pooled_features(encoder: PreTrainedModel, pixel_values: torch.Tensor, **options: Any) -> torch.Tensor:
    """
    Features (B, D) float32 of images (B, C, H, W): the pooled output of the model, or of a model without any the CLS
    token or the mean over its patches, as `MoCoV3Config.pooling` describes.

    Position embeddings are interpolated if the images have another size than the model was built for. `options` go to
    the forward pass.

    Raises:
        ValueError: The model returns no features of the image.
    """
    outputs = encoder(pixel_values=pixel_values, **size_options(encoder, pixel_values), **options)
    return pooled_of(outputs, encoder)


def pooled_of(outputs: Any, encoder: nn.Module) -> torch.Tensor:
    """The features (B, D) float32 in the outputs of an encoder; ValueError as `pooled_features`."""
    pooled = outputs.get("pooler_output")
    if pooled is None:
        pooled = Pooling(encoder)(outputs)
    return pooled.flatten(1).float()


def size_options(encoder: PreTrainedModel, pixel_values: torch.Tensor) -> dict[str, Any]:
    """
    The forward arguments that let an encoder accept images of another size than it was built for, and with which it
    hides none of their patches.
    """
    size = image_size_of(encoder.config)
    inner = getattr(encoder, "backbone", encoder)
    can_interpolate = "interpolate_pos_encoding" in inspect.signature(inner.forward).parameters
    is_other = size is not None and size != min(pixel_values.shape[-2:])
    options = {"interpolate_pos_encoding": True} if is_other and can_interpolate else {}
    return options | masking_options(encoder, pixel_values)


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass of a model that supports it."""
    # Renamed in transformers 5.24.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
