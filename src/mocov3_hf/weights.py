"""The hash by which results, features and checkpoints name the weights of a model."""

import hashlib
import json

import torch
from transformers import PreTrainedModel


# Keys of a configuration that change no output.
NAMES_AND_DATES = (
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
    "use_cache",  # written by `Trainer` into every configuration
    "add_fpn",  # these three: of `MoCoV3Backbone` alone
    "apply_layernorm",
    "reshape_hidden_states",
)
# Keys that came later, and the value that is as without them: recorded hashes keep naming the same model.
LATER_KEYS = {"pooling": "auto", "mlp_norm": "layer_norm"}


def weights_hash(model: PreTrainedModel) -> str:
    """32 hex digits that change with any weight, buffer, or setting of the architecture."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in NAMES_AND_DATES}
    for part in (config, config.get("backbone_config") or {}):
        for key in [key for key, value in LATER_KEYS.items() if part.get(key) == value]:
            del part[key]
    digest = hashlib.sha256(type(model).__name__.encode())
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()[:32]
