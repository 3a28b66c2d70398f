"""FLOPs of a step, derived by hand."""

import pytest

from benchmarks.limits import step_flop_per_image
from mocov3_hf import MoCoV3Config


WIDTH, MLP, LAYERS, PATCHES, BATCH = 32, 64, 2, 4, 2
HEAD, PROJECTION = 48, 16


@pytest.mark.slow
@pytest.mark.parametrize("pooled_query_only", [False, True])
def test_operations_of_a_step(pooled_query_only):
    backbone = {
        "model_type": "mocov3_vit",
        "image_size": 32,
        "patch_size": 16,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": MLP,
    }
    config = MoCoV3Config(backbone_config=backbone, head_hidden_size=HEAD, projection_dim=PROJECTION)
    tokens = PATCHES + 1
    embedding = PATCHES * 3 * 16**2 * WIDTH
    block = 4 * tokens * WIDTH**2 + 2 * tokens**2 * WIDTH + 2 * tokens * WIDTH * MLP
    # Last block: keys and values of all tokens, everything else of the class token only.
    last = 2 * tokens * WIDTH**2 + 2 * WIDTH**2 + 2 * tokens * WIDTH + 2 * WIDTH * MLP
    blocks = LAYERS * block if not pooled_query_only else (LAYERS - 1) * block + last
    projector = WIDTH * HEAD + HEAD * HEAD + HEAD * PROJECTION
    predictor = PROJECTION * HEAD + HEAD * PROJECTION
    # Forward and backward of the trained branch count three, the momentum branch one; the patch embedding is frozen.
    view = 2 * embedding + 4 * blocks + 4 * projector + 3 * predictor
    similarities = 2 * BATCH * PROJECTION  # logits of a query with all keys, and the query's gradient
    assert step_flop_per_image(config, 32, pooled_query_only) == 2 * 2 * (view + similarities)
