"""Sizes of the published ViTs, as arguments of `MoCoV3ViTConfig` where they differ from its defaults."""

VIT_SIZES = {
    "vit-small": {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "vit-base": {},
    "vit-large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}
