"""Models as feature extractors: loading any vision model with its own preprocessing, and telling two models apart."""

import hashlib
import inspect
import json
import os
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import AutoImageProcessor, AutoModel, BaseImageProcessor, PreTrainedModel
from transformers.utils import logging

from ..processing import RESAMPLING, build_image_processor
from ..storage import is_local


# Legend of dimensions: B batch, H W image, D width of the pooled vector, L tokens.

# What a linear classifier may stand on, see `select_features`.
FEATURES = ("pooled", "pooled_mean", "last4")
CLS_LAYERS = 4

# Keys of a configuration that change no feature.
_NAMES_AND_DATES = (
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
    "use_cache",  # written by `Trainer` into every configuration
)


def load_encoder(model: str | os.PathLike) -> PreTrainedModel:
    """The encoder in a folder or Hub repository, in eval mode, on the CPU.

    Args:
        model: whatever `AutoModel` loads: a folder of pre-training, of the bare encoder, of a classifier (its head is
            left out), or of another vision model. The weights must be complete: nothing is evaluated on weights drawn
            at random because the file lacks them. One exception: a pooling layer that a checkpoint of a ViT does not
            have is left out, and the feature is then the CLS token.

    Raises:
        ValueError: no such folder or repository, a folder that is no model, weights missing.
    """
    name = check_model_path(model)
    with quiet_transformers():
        encoder, info = load_any(name)
        missing = sorted(info["missing_keys"])
        if missing and all(key.startswith("pooler.") for key in missing):
            encoder, info = load_any(name, add_pooling_layer=False)
            missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{name!r} lacks {len(missing)} weights of {type(encoder).__name__} ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}): it was saved from another model than its config.json says"
        )
    return encoder.eval()


def check_model_path(model: str | os.PathLike) -> str:
    """The name to load from: a Hub id, or a folder that is a model. ValueError otherwise."""
    name = os.path.expanduser(os.fspath(model))
    if is_local(name):
        if not os.path.isdir(name):
            what = "is a file" if os.path.exists(name) else "does not exist"
            raise ValueError(f"model folder {name!r} {what}: give a folder written by save_pretrained, or a Hub id")
        if not (Path(name) / "config.json").is_file():
            raise ValueError(
                f"folder {name!r} is no model, it has no config.json: give a folder written by save_pretrained, such"
                " as the output folder of a pre-training run"
            )
    return name


def load_any(name: str, auto_class: type = AutoModel, **options) -> tuple[PreTrainedModel, dict]:
    """A model by one of the Auto classes and what `from_pretrained` says of its keys; ValueError when it fails."""
    try:
        return auto_class.from_pretrained(name, output_loading_info=True, **options)
    # A configuration of no model, a file that is not there, damaged weights: transformers, safetensors and the Hub
    # have an exception each.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"model {name!r} cannot be loaded: {reason}") from error


@contextmanager
def quiet_transformers():
    """No report of the keys that loading passes over: heads are meant to be left out here."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def image_size_of(model: PreTrainedModel) -> int | None:
    """Image size a model was built for in pixels (the shorter side), None where its architecture fixes none."""
    config = model.config
    size = getattr(config, "image_size", None) or getattr(getattr(config, "backbone_config", None), "image_size", None)
    return min(size) if isinstance(size, (list, tuple)) else size


class ProcessorTransform:
    """One image through an image processor of transformers: uint8 (3, H, W) to float32 (3, size, size).

    Args:
        processor: as `AutoImageProcessor` loads it. Its own size, crop, resampling, mean and deviation hold.
    """

    def __init__(self, processor: BaseImageProcessor):
        self.processor = processor

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return self.processor(image, return_tensors="pt", input_data_format="channels_first")["pixel_values"][0]

    def __repr__(self) -> str:
        """All settings, in one order: what the cache of features compares."""
        return json.dumps(self.processor.to_dict(), sort_keys=True, default=str)


def load_transform(
    model: str | os.PathLike | None,
    encoder: PreTrainedModel,
    image_size: int | None = None,
    interpolation: str | None = None,
) -> ProcessorTransform:
    """The preprocessing saved with a model; without any, MoCo v3's own at the model's image size.

    Args:
        model: folder or Hub id that may hold `preprocessor_config.json`; None when there is only the encoder.
        encoder: the loaded model.
        image_size: side of the images the encoder shall see, in pixels; None for what the checkpoint says. The
            proportion of resize and crop is kept.
        interpolation: "bilinear" or "bicubic" in place of the saved one.

    Raises:
        ValueError: `image_size` not positive, the processor has no size that could be changed, or an unknown
            interpolation.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if interpolation is not None and interpolation not in RESAMPLING:
        raise ValueError(f"interpolation must be one of {', '.join(RESAMPLING)}, got {interpolation!r}")
    processor = None if model is None else _saved_processor(os.path.expanduser(os.fspath(model)))
    if processor is None:
        processor = build_image_processor(image_size or image_size_of(encoder) or 224)
    elif image_size is not None:
        processor = _resized(processor, image_size)
    if interpolation is not None:
        processor = type(processor).from_dict({**processor.to_dict(), "resample": RESAMPLING[interpolation]})
    return ProcessorTransform(processor)


def _saved_processor(name: str) -> BaseImageProcessor | None:
    if os.path.isdir(name) and not any(
        (Path(name) / file).is_file() for file in ("preprocessor_config.json", "processor_config.json")
    ):
        return None
    try:
        return AutoImageProcessor.from_pretrained(name)
    except OSError:  # a repository without one
        return None


def _resized(processor: BaseImageProcessor, image_size: int) -> BaseImageProcessor:
    settings = processor.to_dict()
    size, crop = settings.get("size"), settings.get("crop_size")
    if not size:
        raise ValueError(
            f"{type(processor).__name__} has no size to set to {image_size}: leave the image size as it was saved"
        )
    if settings.get("do_center_crop") and crop:
        proportion = image_size / crop["height"]
        size = {side: round(pixels * proportion) for side, pixels in size.items() if pixels}
        settings["crop_size"] = {"height": image_size, "width": image_size}
    else:
        size = {side: image_size for side, pixels in size.items() if pixels}
    return type(processor).from_dict(settings | {"size": size})


def base_encoder(model: nn.Module) -> PreTrainedModel:
    """The encoder inside a model: out of its wrappers (DDP, compiled) and without its heads."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    return getattr(model, "base_model", model)


def pooled_features(encoder: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Features (B, D) float32 of images (B, 3, H, W): the pooled vector, or the first token of models without one.

    Position embeddings are interpolated where the images have another size than the model was built for.

    Raises:
        ValueError: the model gives neither a pooled vector nor tokens.
    """
    outputs = encoder(pixel_values=pixel_values, **size_options(encoder, pixel_values))
    pooled = outputs.get("pooler_output")
    if pooled is None:
        tokens = outputs.get("last_hidden_state")
        if tokens is None or tokens.dim() != 3:
            raise ValueError(
                f"{type(encoder).__name__} gives no pooled vector (pooler_output) and no tokens (B, L, D) to evaluate"
            )
        pooled = tokens[:, 0]
    return pooled.flatten(1).float()


def layer_features(encoder: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """(B, 5·D) float32 of images (B, 3, H, W): CLS tokens of the last four layers, each through the final norm, the
    earliest first, and the mean of the last layer's patch tokens. `select_features` takes choices out of it.

    Raises:
        ValueError: the model is no ViT with a CLS token and at least four layers.
    """
    inner = getattr(encoder, "backbone", encoder)
    norm = getattr(inner, "layernorm", None)
    outputs = encoder(pixel_values=pixel_values, output_hidden_states=True, **size_options(encoder, pixel_values))
    hidden_states = outputs.hidden_states[-CLS_LAYERS:]
    if norm is None or hasattr(inner.config, "depths") or hidden_states[-1].dim() != 3:
        raise ValueError(
            f"{type(inner).__name__} has no CLS token in every layer: its only feature is the pooled vector"
        )
    if len(outputs.hidden_states) <= CLS_LAYERS:
        found = len(outputs.hidden_states) - 1
        raise ValueError(f"{type(inner).__name__} has {found} layers, {CLS_LAYERS} are needed")
    tokens = outputs.last_hidden_state
    parts = [norm(states[:, 0]) for states in hidden_states[:-1]]
    parts += [tokens[:, 0], tokens[:, 1 + getattr(inner.config, "num_register_tokens", 0) :].mean(dim=1)]
    return torch.cat(parts, dim=1).float()


def select_features(features: torch.Tensor, choice: str) -> torch.Tensor:
    """One of `FEATURES` out of `layer_features` (n, 5·D): a view.

    "pooled": CLS of the last layer, (n, D). "pooled_mean": the same and the mean of the patches, (n, 2·D). "last4":
    CLS of the last four layers, (n, 4·D).
    """
    width = features.shape[1] // (CLS_LAYERS + 1)
    begin, end = {"pooled": (3, 4), "pooled_mean": (3, 5), "last4": (0, 4)}[choice]
    return features[:, begin * width : end * width]


def size_options(encoder: PreTrainedModel, pixel_values: torch.Tensor) -> dict[str, bool]:
    """What an encoder must be told to accept images of another size than it was built for."""
    size = image_size_of(encoder)
    other = size is not None and size != min(pixel_values.shape[-2:])
    return {"interpolate_pos_encoding": True} if other and _interpolates(encoder) else {}


def _interpolates(encoder: PreTrainedModel) -> bool:
    inner = getattr(encoder, "backbone", encoder)
    return "interpolate_pos_encoding" in inspect.signature(inner.forward).parameters


def weights_hash(encoder: PreTrainedModel) -> str:
    """32 hex digits that change with any weight, buffer, or setting of the architecture (equal weights with another
    number of heads give other features)."""
    config = {key: value for key, value in encoder.config.to_dict().items() if key not in _NAMES_AND_DATES}
    digest = hashlib.sha256(type(encoder).__name__.encode())
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()[:32]
