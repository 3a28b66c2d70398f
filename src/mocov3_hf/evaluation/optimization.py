"""Optimizers of fine-tuning: what is decayed, and learning rates that fall from the head to the first layer."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..optim.param_groups import is_decayed


OPTIMIZERS = ("adamw", "sgd")


def parameter_depths(classifier: PreTrainedModel) -> dict[str, int]:
    """Depth of every parameter by name: 0 for what stands before the body's layers, 1..n for its n layers, n + 1 for
    what comes after them and for the head.

    The layers are the elements of the largest `ModuleList` that is in no other: blocks of a ViT, stages of a ResNet.

    Raises:
        ValueError: a model without such a list.
    """
    lists = {
        name: module
        for name, module in classifier.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    }
    outermost = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    }
    if not outermost:
        raise ValueError(f"{type(classifier).__name__} has no list of layers for --layer_decay: leave it at 1")
    layers = f"{max(outermost, key=outermost.get)}."
    names = [name for name, _ in classifier.named_parameters()]
    inside = [position for position, name in enumerate(names) if name.startswith(layers)]
    last = 1 + len(lists[layers[:-1]])
    depths = {}
    for position, name in enumerate(names):
        if name.startswith(layers):
            depths[name] = 1 + int(name.removeprefix(layers).split(".")[0])
        else:
            depths[name] = 0 if position < inside[0] else last
    return depths


def fine_tuning_groups(
    classifier: PreTrainedModel, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters for an optimizer, those with the largest learning rate first.

    A parameter of depth d has the learning rate `learning_rate · layer_decay^(n + 1 - d)` (Clark et al. 2020; see
    `parameter_depths`). Norms, biases, CLS token and position table have no weight decay.

    Raises:
        ValueError: a `layer_decay` that is not in (0, 1], or that the model has no layers for.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must lie in (0, 1], got {layer_decay}")
    trainable = {name: value for name, value in classifier.named_parameters() if value.requires_grad}
    depths = dict.fromkeys(trainable, 0) if layer_decay == 1 else parameter_depths(classifier)
    last = max(depths.values())
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in trainable.items():
        key = (last - depths[name], not is_decayed(name, parameter))
        group = {
            "params": [],
            "lr": learning_rate * layer_decay ** key[0],
            "weight_decay": 0.0 if key[1] else weight_decay,
        }
        groups.setdefault(key, group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def build_optimizer(groups: list[dict[str, Any]], optimizer: str, momentum: float = 0.9) -> torch.optim.Optimizer:
    """AdamW (betas 0.9 and 0.999, eps 1e-8) or SGD, which alone has a `momentum`."""
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    if optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=momentum)
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)
