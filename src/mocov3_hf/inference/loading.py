"""A saved model with its image processor, complete, and for one purpose."""

import os
from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
)
from transformers.utils import logging

from ..data.sources import is_local


def load_classifier(model: str | os.PathLike) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """
    A classifier in float32 and eval mode, on the CPU, and the processor saved with it.

    Args:
        model: a folder of `save_pretrained`, or a Hub id.

    Raises:
        ValueError: no such model, no classifier, weights or processor missing.
    """
    name = _checked(model)
    config = _load(AutoConfig, name)
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ValueError(f"{name!r} is a {config.model_type!r}, which has no form that classifies images")
    loaded = _load_complete(
        AutoModelForImageClassification,
        name,
        "is it an encoder without a head? Train one with scripts/linear_probe.py, or extract its features",
    )
    return loaded, _load_processor(name)


def load_encoder(model: str | os.PathLike) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """
    The encoder of any vision model, without heads; otherwise as `load_classifier`.

    Raises:
        ValueError: no such model, weights or processor missing.
    """
    name = _checked(model)
    loaded = _load_complete(
        AutoModel, name, "a model without weights for its pooled vector has no features of `pool=True`"
    )
    return loaded, _load_processor(name)


def _checked(model: str | os.PathLike) -> str:
    name = os.path.expanduser(os.fspath(model))
    if is_local(name) and not (Path(name) / "config.json").is_file():
        what = "has no config.json" if os.path.isdir(name) else "is no folder"
        raise ValueError(f"model {name!r} {what}: give a folder written by save_pretrained, or a Hub id")
    return name


def _load(auto_class: type, name: str, **options):
    try:
        return auto_class.from_pretrained(name, **options)
    # A configuration of no model, a file that is not there, damaged weights: transformers, safetensors and the Hub
    # have an exception each.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"model {name!r} cannot be loaded: {reason}") from error


def _load_complete(auto_class: type, name: str, advice: str) -> PreTrainedModel:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # heads are meant to be left out; what is missing is told below
    try:
        model, info = _load(auto_class, name, output_loading_info=True, dtype=torch.float32)
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{name!r} lacks {len(missing)} weights of {type(model).__name__} ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}): {advice}"
        )
    return model.eval()


def _load_processor(name: str) -> BaseImageProcessor:
    try:
        return AutoImageProcessor.from_pretrained(name)
    # transformers raises OSError for a missing file and ValueError for one of no processor.
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {name!r} comes without an image processor, which says how images become pixel_values: save one"
            " with it (mocov3_hf.processing.build_image_processor().save_pretrained)"
        ) from error
