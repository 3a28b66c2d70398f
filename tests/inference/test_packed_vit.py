"""The parts of the packed ViT against the plain ones."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mocov3_hf.inference.packed_vit import PackedLinear, can_pack, is_exact_gelu, one_pass_attention
from mocov3_hf.model.modeling_mocov3_vit import eager_attention_forward


@pytest.mark.parametrize("num_queries", [1, 17])
def test_one_pass_attention_is_attention(num_queries):
    torch.manual_seed(0)
    key, value = torch.randn(2, 2, 3, 17, 8, dtype=torch.float64)
    query = torch.randn(2, 3, num_queries, 8, dtype=torch.float64) * 4
    module = SimpleNamespace(training=False)
    expected, _ = eager_attention_forward(module, query, key, value, None, scaling=0.3)
    found, _ = one_pass_attention(module, query, key, value, None, scaling=0.3)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.skipif(not can_pack(), reason="this build of torch has no oneDNN")
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("rows", [5, 40])
def test_packed_linear_is_linear(gelu, rows):
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, dtype=torch.bfloat16).requires_grad_(False)
    images = torch.randn(2, rows, 24, dtype=torch.bfloat16)
    expected = linear.float()(images.float())
    expected = nn.functional.gelu(expected) if gelu else expected
    found = PackedLinear(linear.bfloat16(), 40, gelu)(images)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=2**-8, rtol=2**-7)


def test_gelu_is_told_from_its_approximation():
    assert is_exact_gelu(nn.GELU())
    assert not is_exact_gelu(nn.GELU(approximate="tanh"))
    assert not is_exact_gelu(nn.ReLU())
