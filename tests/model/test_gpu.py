"""The same numbers on a GPU."""

import pytest
import torch

from mocov3_hf import MoCoV3Config, MoCoV3ForPreTraining
from tests.model.distributed_worker import BACKBONES, HEADS


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("backbone", ["vit", "vit_bn", "conv_stem", "resnet"])
def test_loss_and_gradients_are_those_of_the_cpu(backbone):
    torch.manual_seed(0)
    model = MoCoV3ForPreTraining(MoCoV3Config(backbone_config=dict(BACKBONES[backbone]), **HEADS)).double()
    size = BACKBONES[backbone].get("image_size", 32)
    views = torch.randn(2, 8, 3, size, size, dtype=torch.float64)
    results = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        model.update_momentum_encoder(1.0)
        loss = model(pixel_values=views[0].to(device), pixel_values_2=views[1].to(device)).loss
        loss.backward()
        results.append(
            [loss.detach().cpu(), *(p.grad.cpu().clone() for p in model.parameters() if p.grad is not None)]
        )
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_float32(dtype):
    torch.manual_seed(0)
    model = MoCoV3ForPreTraining(MoCoV3Config(backbone_config=dict(BACKBONES["vit"]), **HEADS)).cuda()
    views = torch.randn(2, 64, 3, 16, 16, device="cuda")
    expected = model(pixel_values=views[0], pixel_values_2=views[1]).loss
    with torch.autocast("cuda", dtype=dtype):
        loss = model(pixel_values=views[0], pixel_values_2=views[1]).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
