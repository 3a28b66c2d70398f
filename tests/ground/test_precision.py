"""The precision of `--mixed_precision auto`, by device."""

import pytest
import torch

from mocov3_hf.precision import best_precision, resolve_precision
from mocov3_hf.reporting import UsageError


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a CPU with the given capabilities, or a GPU of the given compute capability."""

    def pretend(*capabilities, gpu=(8, 0)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(capabilities, True))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")

    return pretend


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        (("avx2", "fma3"), "no"),
        (("avx2", "avx512_f", "avx512_bw", "avx512_vnni"), "no"),  # Skylake, Cascade Lake
        (("avx512_f", "avx512_bf16"), "bf16"),  # Cooper Lake, Zen 4
        (("avx512_f", "amx_tile", "amx_bf16"), "bf16"),  # Sapphire Rapids
        (("neon", "fp16_arith"), "no"),  # arm64: Graviton 2, Apple M1
        (("neon", "bf16"), "bf16"),  # Graviton 3, Apple M2
        ((), "no"),
    ],
)
def test_cpus(machine, capabilities, expected):
    machine(*capabilities)
    value, reason = best_precision(CPU)
    assert value == expected
    assert reason == (
        "this CPU has no instructions for bfloat16" if value == "no" else f"this CPU has {capabilities[-1]}"
    )


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((6, 1), "no"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((8, 9), "bf16"), ((12, 0), "bf16")],
)
def test_gpus(machine, capability, expected):
    machine(gpu=capability)
    value, reason = best_precision(GPU)
    assert value == expected
    assert reason.startswith(f"Card, compute capability {capability[0]}.{capability[1]}, has ")


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_other_devices(device):
    assert best_precision(torch.device(device)) == ("no", f"half precision has not been measured on {device}")


def test_this_machine():
    """With the true capabilities of a CPU: names of instructions that torch does not have would never be found."""
    assert torch.cpu.get_capabilities()["architecture"]
    assert best_precision(CPU)[0] in ("no", "bf16")


def test_a_resume_keeps_the_precision_of_its_run(machine, capsys):
    machine("avx512_bf16")
    assert resolve_precision("auto", CPU) == ("bf16", "this CPU has avx512_bf16")
    assert resolve_precision("auto", CPU, saved="no") == ("no", "as in the checkpoint")
    assert resolve_precision("no", CPU, saved="bf16") == ("no", "")
    assert resolve_precision("bf16", CPU) == ("bf16", "")
    assert capsys.readouterr().err == ""
    machine("avx2")
    assert resolve_precision("auto", CPU) == ("no", "this CPU has no instructions for bfloat16")
    assert capsys.readouterr().err == ""
    assert resolve_precision("auto", CPU, saved="bf16") == ("bf16", "as in the checkpoint")
    assert capsys.readouterr().err == (
        "warning: mixed_precision bf16, as in the checkpoint, is slow: this CPU has no instructions for bfloat16, and"
        " emulates it; no is faster\n"
    )


def test_a_precision_that_is_emulated_is_warned_of(machine, capsys):
    machine("avx2", gpu=(7, 5))
    assert resolve_precision("bf16", CPU) == ("bf16", "")
    assert resolve_precision("bf16", GPU) == ("bf16", "")
    first, second = capsys.readouterr().err.splitlines()
    assert first == (
        "warning: --mixed_precision bf16 is slow: this CPU has no instructions for bfloat16, and emulates it;"
        " no is faster"
    )
    assert second.endswith("has float16 tensor cores and no native bfloat16, and emulates it; fp16 is faster")
    assert resolve_precision("fp16", GPU) == ("fp16", "")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("asked", "saved", "label"),
    [("fp16", None, "--mixed_precision fp16"), ("auto", "fp16", "mixed_precision fp16, as in the checkpoint,")],
)
def test_fp16_needs_a_gpu(asked, saved, label):
    with pytest.raises(UsageError) as error:
        resolve_precision(asked, CPU, saved)
    assert str(error.value) == f"{label} needs a GPU: use auto, bf16 or no on this machine"
