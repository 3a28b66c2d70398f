"""Weights that FSDP2 spreads over two processes take the same step as whole ones on one."""

from pathlib import Path

import torch

from tests.launch import torchrun


WORKER = Path(__file__).parent / "sharding_worker.py"


def test_spread_weights_take_the_step_of_whole_ones(tmp_path):
    torchrun(2, WORKER, str(tmp_path / "results"))
    results = torch.load(tmp_path / "results", weights_only=True)
    actual, expected = results["actual"], results["expected"]
    scale = max(gradient.abs().max() for gradient in expected["gradients"].values()).item()
    for name, values in expected.items():
        atol = 1e-10 * scale if name == "gradients" else 1e-10
        torch.testing.assert_close(
            actual[name], values, rtol=1e-8, atol=atol, msg=lambda message, name=name: f"{name}: {message}"
        )
    for name in ("adamw", "lars"):
        moved, refused = actual[name], actual[f"{name}, step refused"]
        assert all(torch.equal(moved[key], refused[key]) for key in moved)
    # Each of these has moved something, so that there was something to compare.
    before = expected["momentum encoder before"]
    assert not all(torch.equal(value, expected["momentum encoder"][key]) for key, value in before.items())
    assert not all(torch.equal(value, expected["lars"][key]) for key, value in expected["adamw"].items())
