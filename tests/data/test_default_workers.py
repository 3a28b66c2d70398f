"""How many data-loading workers and threads a process has by default, in every command."""

import os

import pytest
import torch

from mocov3_hf.data.workers import cores_of_process, cores_shared_with, default_workers
from mocov3_hf.evaluation.common import ComputationOptions
from mocov3_hf.inference.files import PredictorOptions
from mocov3_hf.pretraining.recipe_options import HardwareOptions


@pytest.fixture
def machine(monkeypatch):
    """Pretend to have cores and a kind of device, with settings of threads and launchers only as given."""

    def pretend(cores, device="cpu", **environment):
        for name in ("LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(cores)), raising=False)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device(device))

    return pretend


@pytest.mark.parametrize(
    ("cores", "local", "expected"), [(16, None, 16), (16, "4", 4), (16, "5", 3), (2, "8", 1), (1, None, 1)]
)
def test_a_process_has_its_share_of_the_cores(machine, cores, local, expected):
    machine(cores, **({} if local is None else {"LOCAL_WORLD_SIZE": local}))
    assert cores_of_process() == expected


@pytest.mark.parametrize(
    ("cores", "device", "workers", "threads"),
    [
        (1, "cpu", 0, 1),
        (2, "cpu", 0, 2),
        (4, "cpu", 1, 3),
        (16, "cpu", 4, 12),
        (1, "cuda", 0, 1),
        (2, "cuda", 1, 1),
        (16, "cuda", 15, 1),
        (8, "mps", 7, 1),
    ],
)
def test_workers_and_threads_are_no_more_than_the_cores(machine, cores, device, workers, threads):
    machine(cores, device)
    before = torch.get_num_threads()
    assert default_workers() == workers
    assert ComputationOptions().num_workers == workers
    assert ComputationOptions(dataloader_num_workers=3).num_workers == 3
    with cores_shared_with(workers):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == before
    with cores_shared_with(cores + 5):
        assert torch.get_num_threads() == 1


def test_settings_of_the_user_decide(machine):
    before = torch.get_num_threads()
    machine(8, OMP_NUM_THREADS="7")
    with cores_shared_with(4):
        assert torch.get_num_threads() == before
    machine(8, OMP_NUM_THREADS="8", ACCELERATE_MIXED_PRECISION="no")  # the launcher's
    torch.set_num_threads(6)
    for workers, threads in ((4, 4), (1, 6)):
        with cores_shared_with(workers):
            assert torch.get_num_threads() == threads
    torch.set_num_threads(before)


def test_the_default_is_the_rule_in_every_command():
    for group in (HardwareOptions, ComputationOptions, PredictorOptions):
        assert group.__dataclass_fields__["dataloader_num_workers"].default is None
