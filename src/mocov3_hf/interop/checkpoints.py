"""Exact conversion of state dicts of other codebases to this package's models and back, checked key by key."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel, ResNetConfig

from ..hints import either
from ..model.configuration_mocov3 import MoCoV3Config
from ..model.configuration_mocov3_vit import MoCoV3ViTConfig, to_pair
from ..model.modeling_mocov3 import MoCoV3ForImageClassification, MoCoV3Model
from ..model.modeling_mocov3_pretraining import MoCoV3ForPreTraining
from ..reporting import one_line
from .architecture import infer_heads, infer_resnet, infer_vit, is_sincos_table, shape_of, split_overrides
from .layouts import (
    LAYOUTS,
    ConversionError,
    Layout,
    brief,
    enumerate_keys,
    foreign_keys,
    head_module_names,
    recognize_layout,
    resnet_module_names,
    vit_module_names,
)


STAGES = ("pretrained", "linear", "finetuned")
MAX_NAME, MAX_CLASSES = 500, 100_000
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Wrappers around a whole model: DDP and EMA, PyTorch Lightning; the counters are those of EMA wrappers.
WRAPPED, EMA_COUNTERS = ("module.", "model.", "ema_model."), ("n_averaged", "steps")


@dataclass(frozen=True)
class Converted:
    """
    A state dict with this package's names, and the model it belongs to.

    Attributes:
        config: Of the model.
        model_class: Of the model.
        state_dict: Native tensors; they share memory with the source.
        layout: Name of the source's layout.
        stage: `"pretrained"`, `"linear"` or `"finetuned"`; None if it cannot be inferred.
        image_size: Side of the images in pixels, for the image processor.
        sources: The foreign key of every native key.
        ignored: Foreign keys that no model needs.
    """

    config: MoCoV3Config
    model_class: type[PreTrainedModel]
    state_dict: dict[str, torch.Tensor]
    layout: str
    stage: str | None
    image_size: int
    sources: dict[str, str] = field(repr=False)
    ignored: tuple[str, ...] = ()

    def build_model(self) -> PreTrainedModel:
        """The model with the converted weights, whose memory it shares, in evaluation mode."""
        with torch.device("meta"):
            model = self.model_class(self.config)
        model.load_state_dict(self.state_dict, strict=True, assign=True)  # frozen parameters stay frozen
        return model.eval()


def convert_state_dict(
    state_dict: Mapping[str, torch.Tensor], *, layout: str | None = None, stage: str | None = None, **overrides: Any
) -> Converted:
    """
    Convert a state dict of another codebase exactly: no value changes, no tensor is left over.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            Tensors by name, with or without the prefixes of DDP, EMA, `torch.compile` and PyTorch Lightning.
        layout (`str`, *optional*):
            A name of `LAYOUTS`; recognized from the keys by default.
        stage (`str`, *optional*):
            `"pretrained"`, `"linear"` or `"finetuned"`; inferred by default: a ViT classifier with trained position
            embeddings is fine-tuned, one with the fixed embeddings is a linear probe.
        overrides:
            Arguments of `MoCoV3ViTConfig`, `ResNetConfig` or `MoCoV3Config` that replace what is inferred:
            `num_attention_heads`, `image_size`, `temperature`, `id2label`, ...

    Raises:
        ConversionError: An unknown layout or override; keys that are missing, unexpected or have a wrong shape;
            tensors that are not ordinary ones, or have values that are not finite.
    """
    if stage is not None and stage not in STAGES:
        raise ConversionError(f"stage must be one of {STAGES}, got {stage!r}")
    state_dict = strip_wrappers(check_tensors(state_dict))
    layout, backbone = find_layout(state_dict, layout)
    add_batch_counters(state_dict)
    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}

    overrides = dict(overrides)
    processor_size = overrides.pop("image_size", 224) if backbone == "resnet" else None
    of_backbone, of_model = split_overrides(overrides, backbone)
    classifier = next((name for name in layout.classifiers(backbone) if f"{name}.weight" in shapes), None)
    model_class = MoCoV3ForPreTraining if layout.heads else MoCoV3ForImageClassification if classifier else MoCoV3Model

    if classifier is not None and shape_of(shapes, f"{classifier}.weight", 2)[0] > MAX_CLASSES:
        raise ConversionError(f"{classifier}.weight has more than {MAX_CLASSES:,} classes")
    if backbone == "vit":
        values = infer_vit(shapes, layout, of_backbone) | of_backbone
        grid = [a // b for a, b in zip(to_pair(values["image_size"]), to_pair(values["patch_size"]), strict=True)]
        fixed = is_sincos_table(state_dict.get(f"{layout.base}pos_embed", torch.empty(0)), tuple(grid))
        stage = stage or inferred_stage(layout, classifier, fixed)
        values.setdefault("position_embedding", "sincos2d" if fixed and stage != "finetuned" else "learned")
        values.setdefault("freeze_patch_projection", values["position_embedding"] == "sincos2d")
        backbone_config = build_config(MoCoV3ViTConfig, values)
        processor_size = max(to_pair(backbone_config.image_size))
    else:
        stage = stage or inferred_stage(layout, classifier, None)
        backbone_config = build_config(ResNetConfig, infer_resnet(shapes, layout) | of_backbone)

    values = infer_heads(shapes, layout, backbone) | of_model
    if classifier is not None and "id2label" not in values:
        values.setdefault("num_labels", shapes[f"{classifier}.weight"][0])
    config = build_config(MoCoV3Config, values | {"backbone_config": backbone_config})
    native, sources = rename(state_dict, config, model_class, layout, classifier)
    return Converted(
        config=config,
        model_class=model_class,
        state_dict=native,
        layout=layout.name,
        stage=stage,
        image_size=processor_size,
        sources=sources,
        ignored=tuple(key for key in state_dict if layout.ignores(key)),
    )


def build_config(config_class: type[PreTrainedConfig], values: dict[str, Any]) -> PreTrainedConfig:
    """
    Raises:
        ConversionError: Values that no model has.
    """
    try:
        return config_class(**values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConversionError(f"no model has these shapes: {brief(one_line(error), 300)}") from error


def revert_state_dict(
    state_dict: Mapping[str, torch.Tensor], config: MoCoV3Config, *, layout: str
) -> dict[str, torch.Tensor]:
    """
    The state dict of one of this package's models with another codebase's names: the inverse of the conversion.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            Of a `MoCoV3ForPreTraining`, `MoCoV3ForImageClassification` or `MoCoV3Model` on a MoCo v3 ViT or a ResNet.
        layout (`str`):
            A name of `LAYOUTS` for such a model.

    Raises:
        ConversionError: An unknown layout, or a model that it cannot hold.
    """
    target = named_layout(layout)
    backbone = backbone_of(config)
    if any(key.startswith("predictor.") for key in state_dict) != (target.heads is not None):
        expected = "a pre-training model" if target.heads else "an encoder or a classifier"
        raise ConversionError(f"the layout {layout!r} is for {expected}, which this state dict is not")
    classifier = target.classifiers(backbone)[0] if "classifier.weight" in state_dict else None
    base = next((prefix for prefix in ("mocov3.backbone.", "backbone.") if any_starts(state_dict, prefix)), None)
    if base is None:
        raise ConversionError("the state dict has no encoder: no key begins with 'mocov3.backbone.' or 'backbone.'")
    names = module_names(config, target, backbone, base, classifier)
    return {
        foreign: state_dict[natives[0]] if len(natives) == 1 else torch.cat([state_dict[key] for key in natives])
        for foreign, natives in foreign_keys(state_dict, names).items()
    }


def check_tensors(state_dict: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """
    The tensors of a state dict, each with its own memory.

    Raises:
        ConversionError: Anything else.
    """
    extents = []
    for key, value in state_dict.items():
        if not isinstance(key, str) or len(key) > MAX_NAME:
            kind = f"{len(key):,} characters" if isinstance(key, str) else type(key).__name__
            raise ConversionError(f"the state dict has the key {brief(str(key))} ({kind}), expected names of tensors")
        name = brief(key)
        if not isinstance(value, torch.Tensor):
            raise ConversionError(
                f"the entry {name!r} is a {type(value).__name__}, expected a tensor: pass the state dict itself"
            )
        if value.layout != torch.strided or value.is_quantized or value.is_nested:
            raise ConversionError(f"{name} is sparse, quantized or nested, expected an ordinary tensor")
        if not value.numel():
            raise ConversionError(f"{name} is empty: its shape is {list(value.shape)}")
        if value.is_meta:
            continue
        steps = sorted((step, count) for step, count in zip(value.stride(), value.shape, strict=True) if count > 1)
        span = 1
        for step, count in steps:
            if step < span:
                raise ConversionError(f"{name} repeats its values in memory: save a .clone() of it")
            span += step * (count - 1)
        begin = value.data_ptr()
        extents.append((begin, begin + span * value.itemsize, name))
    extents.sort()
    for (_, end, name), (begin, _, other) in itertools.pairwise(extents):
        if begin < end:
            raise ConversionError(f"{other} shares its memory with {name}: save a .clone() of each tensor")
    return dict(state_dict)


def strip_wrappers(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    The tensors under the names that they have in the model itself.

    Raises:
        ConversionError: Two tensors of one name.
    """
    named = {key: key.replace("_orig_mod.", "") for key in state_dict}  # of torch.compile, at any depth
    counted = {key: name for key, name in named.items() if name not in EMA_COUNTERS}
    while prefix := next((p for p in WRAPPED if counted and all(name.startswith(p) for name in counted.values())), ""):
        named = counted = {key: name.removeprefix(prefix) for key, name in counted.items()}
    stripped = {name: state_dict[key] for key, name in named.items()}
    if len(stripped) < len(named):
        twice = next(name for name, count in Counter(named.values()).items() if count > 1)
        raise ConversionError(f"{brief(twice)} appears twice, with and without a prefix: keep one of the two models")
    return stripped


def is_finite(tensor: torch.Tensor | None) -> bool:
    """Whether no value is NaN or infinite; True without values."""
    if tensor is None or tensor.is_meta or tensor.dtype not in FLOATS:
        return True
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def add_batch_counters(state_dict: dict[str, torch.Tensor]) -> None:
    """
    Add the batch norm counters that files from before torch 0.4.1 lack, at zero as torch itself does.

    No output depends on them. A file that has only some of them is incomplete and left as it is.
    """
    if not any(key.endswith(".num_batches_tracked") for key in state_dict):
        for key in [key for key in state_dict if key.endswith(".running_mean")]:
            counter = key.removesuffix("running_mean") + "num_batches_tracked"
            state_dict[counter] = torch.zeros((), dtype=torch.int64)


def named_layout(name: str) -> Layout:
    if name not in LAYOUTS:
        raise ConversionError(f"unknown layout {name!r}, expected one of {sorted(LAYOUTS)}")
    return LAYOUTS[name]


def find_layout(state_dict: dict[str, torch.Tensor], name: str | None) -> tuple[Layout, str]:
    recognized = recognize_layout(state_dict)
    if recognized is None:
        sample = ", ".join(map(brief, list(state_dict)[:4])) or "no tensors"
        own = ": this package's own names, which from_pretrained loads" if is_native(state_dict) else ""
        raise ConversionError(f"not one of the known layouts ({', '.join(LAYOUTS)}); the first keys: {sample}{own}")
    layout, backbone = recognized
    if name is not None and named_layout(name) is not layout:
        raise ConversionError(f"the keys are those of the layout {layout.name!r}, not {name!r}: do not pass layout")
    return layout, backbone


def is_native(state_dict: Mapping[str, torch.Tensor]) -> bool:
    return any_starts(state_dict, "mocov3.") or any_starts(state_dict, "backbone.embeddings.")


def any_starts(keys: Iterable[str], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in keys)


def inferred_stage(layout: Layout, classifier: str | None, fixed_positions: bool | None) -> str | None:
    if layout.heads is not None or (classifier is None and fixed_positions is not False):
        return "pretrained"
    if classifier is None or fixed_positions is None:
        return None
    return "linear" if fixed_positions else "finetuned"


def backbone_of(config: MoCoV3Config) -> str:
    """
    The backbone of a model as the layouts call it: `"vit"` or `"resnet"`.

    Raises:
        ConversionError: Another backbone, which no layout can hold.
    """
    known = {"mocov3_vit": "vit", "resnet": "resnet"}
    model_type = config.backbone_config.model_type
    if model_type not in known:
        raise ConversionError(
            f"the backbone is a {model_type!r}, which other codebases have no names for; expected {either(known)}"
        )
    return known[model_type]


def module_names(
    config: MoCoV3Config, layout: Layout, backbone: str, base: str, classifier: str | None
) -> dict[str, str]:
    """
    Foreign names by native ones of all modules of a model; `base` is the native prefix of its encoder.

    Raises:
        ConversionError: A ViT-BN, which no layout has names for.
    """
    if backbone == "vit":
        if config.backbone_config.mlp_norm == "batch_norm":
            raise ConversionError(
                f"the layout {layout.name!r} has no batch normalization in a ViT (mlp_norm 'batch_norm'): no other"
                " codebase has a ViT-BN; keep the folder of save_pretrained"
            )
        inner = vit_module_names(layout.dialect, config.backbone_config.num_hidden_layers, config.backbone_config.stem)
    else:
        inner = resnet_module_names(config.backbone_config.depths, config.backbone_config.layer_type)
    names = {f"{base}{native}": f"{layout.base}{foreign}" for native, foreign in inner.items()}
    if classifier is not None:
        names["classifier"] = classifier
    if layout.heads is not None:
        for native, foreign in inner.items():
            names[f"momentum_encoder.encoder.backbone.{native}"] = f"{layout.momentum}{foreign}"
        for native, foreign in layout.projectors(backbone).items():
            num_layers = config.num_predictor_layers if native == "predictor" else config.num_projector_layers
            names |= head_module_names(layout.heads, native, foreign, num_layers)
    return names


def rename(
    state_dict: dict[str, torch.Tensor],
    config: MoCoV3Config,
    model_class: type[PreTrainedModel],
    layout: Layout,
    classifier: str | None,
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    Native tensors by native key, and the foreign key of each.

    Raises:
        ConversionError: The keys and shapes are not exactly those that the model needs.
    """
    with torch.device("meta"):
        wanted = model_class(config).state_dict()
    base = "backbone." if model_class is MoCoV3Model else "mocov3.backbone."
    names = module_names(config, layout, backbone_of(config), base, classifier)
    groups = foreign_keys(wanted, names)
    missing = [key for key in groups if key not in state_dict]
    unexpected = [key for key in state_dict if key not in groups and not layout.ignores(key)]
    misshaped, mistyped = [], []
    for foreign, natives in groups.items():
        if foreign not in state_dict:
            continue
        expected, actual = list(wanted[natives[0]].shape), list(state_dict[foreign].shape)
        if len(natives) > 1:
            expected[0] *= len(natives)
        if expected != actual:
            misshaped.append(f"{foreign} has {actual}, expected {expected}")
        elif state_dict[foreign].dtype not in (FLOATS if wanted[natives[0]].is_floating_point() else [torch.int64]):
            mistyped.append(f"{foreign} has {state_dict[foreign].dtype}, expected {wanted[natives[0]].dtype}")
    usual = Counter(tensor.dtype for tensor in state_dict.values() if tensor.dtype in FLOATS).most_common(1)
    for key in groups:
        dtype = state_dict[key].dtype if key in state_dict else None
        if dtype in FLOATS and dtype != usual[0][0]:
            mistyped.append(f"{key} has {dtype}, the others {usual[0][0]}: save them all in one")
    problems = {
        "missing keys": missing,
        "unexpected keys": unexpected,
        "misshaped keys": misshaped,
        "keys of a wrong type": mistyped,
        "keys with values that are NaN or infinite": [key for key in groups if not is_finite(state_dict.get(key))],
    }
    if any(problems.values()):
        found = "; ".join(f"{kind}: {enumerate_keys(keys)}" for kind, keys in problems.items() if keys)
        raise ConversionError(f"not a valid {layout.name} checkpoint of a {model_class.__name__}: {found}")

    native, sources = {}, {}
    for foreign, natives in groups.items():
        tensor = state_dict[foreign]
        parts = tensor.chunk(len(natives)) if len(natives) > 1 else (tensor,)
        for key, part in zip(natives, parts, strict=True):
            native[key] = part
            sources[key] = foreign
    return {key: native[key] for key in wanted}, sources
