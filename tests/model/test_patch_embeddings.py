"""The projection of patches as a matrix product, which GPUs get, is the convolution."""

import pytest
import torch
from accelerate import cpu_offload

from mocov3_hf import MoCoV3ViTConfig, MoCoV3ViTModel
from mocov3_hf.model.modeling_mocov3_vit_embeddings import MoCoV3ViTPatchEmbeddings, MoCoV3ViTPatchProjection


@pytest.mark.parametrize(
    ("patch_size", "image"),
    [(4, (3, 16, 24)), (7, (3, 21, 28)), ((4, 8), (3, 16, 32)), ((4, 8), (3, 18, 35)), (1, (1, 3, 2))],
)
def test_both_ways_give_the_same(patch_size, image):
    config = MoCoV3ViTConfig(
        patch_size=patch_size, num_channels=image[0], hidden_size=12, num_attention_heads=2, image_size=56
    )
    torch.manual_seed(0)
    embeddings = MoCoV3ViTPatchEmbeddings(config).double()
    pixel_values = torch.randn(2, *image, dtype=torch.float64, requires_grad=True)
    variables = [pixel_values, *embeddings.parameters()]
    convolved, multiplied = embeddings.projection(pixel_values), embeddings.projection.multiply(pixel_values)
    torch.testing.assert_close(multiplied, convolved, rtol=1e-12, atol=1e-13)
    weights = torch.randn_like(convolved)
    torch.testing.assert_close(
        torch.autograd.grad(multiplied, variables, weights),
        torch.autograd.grad(convolved, variables, weights),
        rtol=1e-12,
        atol=1e-12,
    )
    assert torch.equal(embeddings(pixel_values), convolved)  # on a CPU the convolution stays


def test_the_product_works_under_the_hooks_of_the_layer(monkeypatch):
    monkeypatch.setattr(MoCoV3ViTPatchProjection, "forward", MoCoV3ViTPatchProjection.multiply)
    config = MoCoV3ViTConfig(
        image_size=16, patch_size=4, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = MoCoV3ViTModel(config).eval()
    pixel_values = torch.randn(2, 3, 16, 16)
    expected = model(pixel_values).pooler_output
    cpu_offload(model, execution_device="cpu")  # weights come with a hook of the layer that owns them
    torch.testing.assert_close(model(pixel_values).pooler_output, expected)
