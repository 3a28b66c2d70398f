"""Parameter groups with and without weight decay."""

from torch import nn


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter: not to norms, biases, CLS token and position embeddings."""
    return parameter.ndim > 1 and not name.endswith(("cls_token", "position_embeddings"))


def parameter_groups(model: nn.Module, weight_decay: float, exclude_norms_and_biases: bool = False) -> list[dict]:
    """
    Optimizer groups of the trainable parameters of `model`.

    Args:
        model: Parameters without `requires_grad` (momentum encoder, frozen patch projection) are excluded.
        weight_decay: Weight decay of the first group.
        exclude_norms_and_biases: Put norms, biases, CLS token and position embeddings in a second group without decay.
            MoCo v3 decays all trainable parameters in pre-training.

    Raises:
        ValueError: `model` has no trainable parameter.
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
