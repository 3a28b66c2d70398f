"""Which parameters are decayed."""

from torch import nn


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay is meant for a parameter: not for norms and biases, CLS token and position table."""
    return parameter.ndim > 1 and not name.endswith(("cls_token", "position_embeddings"))


def parameter_groups(model: nn.Module, weight_decay: float, exclude_norms_and_biases: bool = False) -> list[dict]:
    """
    Groups of the trainable parameters of `model` for an optimizer.

    Args:
        model: Parameters without `requires_grad` (momentum branch, frozen patch projection) are left out.
        weight_decay: Decay of the (first) group.
        exclude_norms_and_biases: Whether tensors of at most one dimension, and those named as CLS token or position
            table, get a second group without decay. MoCo v3 pre-trains with decay on everything trainable.

    Raises:
        ValueError: nothing in `model` is trainable.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError(f"{type(model).__name__} has no trainable parameter")
    if not exclude_norms_and_biases:
        return [{"params": list(trainable.values()), "weight_decay": weight_decay}]
    decayed = {name: parameter for name, parameter in trainable.items() if is_decayed(name, parameter)}
    kept = [parameter for name, parameter in trainable.items() if name not in decayed]
    groups = [
        {"params": list(decayed.values()), "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
