"""W processes with N images each do what one process does with W·N: loss, gradients and running statistics."""

from pathlib import Path

import pytest
import torch

from tests.fork_server import ranks
from tests.launch import python


WORKER = Path(__file__).parent / "distributed_worker.py"
ONE = ["vit:12", "vit_bn:12", "conv_stem:12", "resnet:12"]
SEVERAL = {
    2: [
        *("vit:6,6", "vit:7,5", "vit_bn:6,6", "vit_bn:1,11", "vit_bn+checkpointing:7,5"),
        *("conv_stem:5,7", "resnet:6,6", "resnet:1,11"),
    ],
    3: [
        *("vit:4,4,4", "vit:7,2,3", "vit_bn:4,4,4", "vit_bn:7,1,4", "vit_bn+checkpointing:2,3,7"),
        *("conv_stem:4,4,4", "resnet:4,4,4", "resnet:2,9,1"),
    ],
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process gives on all 12 images, for each backbone."""
    output = tmp_path_factory.mktemp("alone") / "results"
    python(WORKER, str(output), *ONE)
    return {case.split(":")[0]: result for case, result in torch.load(output, weights_only=True).items()}


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_together_equal_one(alone, tmp_path, num_processes):
    ranks(num_processes, WORKER, str(tmp_path / "results"), *SEVERAL[num_processes])
    results = torch.load(tmp_path / "results", weights_only=True)
    assert list(results) == SEVERAL[num_processes]
    for case, result in results.items():
        expected = alone[case.split(":")[0].removesuffix("+checkpointing")]
        compare = {"msg": lambda message, case=case: f"{case}: {message}"}
        torch.testing.assert_close(result["loss"], expected["loss"], rtol=1e-10, atol=0, **compare)
        torch.testing.assert_close(result["top1"], expected["top1"], **compare)
        # Gradients of biases before a softmax are zero but for rounding: compare on the scale of the whole.
        scale = max(gradient.abs().max() for gradient in expected["gradients"].values()).item()
        torch.testing.assert_close(
            result["gradients"], expected["gradients"], rtol=1e-8, atol=1e-10 * scale, **compare
        )
        torch.testing.assert_close(result["buffers"], expected["buffers"], rtol=1e-10, atol=1e-12, **compare)
