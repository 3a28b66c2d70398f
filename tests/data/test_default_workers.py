"""How many data-loading workers a process has by default, in every command."""

import os

import pytest

from mocov3_hf.data.workers import default_workers
from mocov3_hf.evaluation.common import ComputationOptions
from mocov3_hf.inference.files import PredictorOptions
from mocov3_hf.pretraining.recipe_options import HardwareOptions


@pytest.mark.parametrize(
    ("cores", "local", "expected"), [(16, None, 16), (16, "4", 4), (16, "5", 3), (2, "8", 1), (1, None, 1)]
)
def test_a_process_has_its_share_of_the_cores(cores, local, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(cores)), raising=False)
    if local is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert default_workers() == expected
    assert ComputationOptions().of_pass()["num_workers"] == expected
    assert ComputationOptions(dataloader_num_workers=0).of_pass()["num_workers"] == 0


def test_the_default_is_the_rule_in_every_command():
    for group in (HardwareOptions, ComputationOptions, PredictorOptions):
        assert group.__dataclass_fields__["dataloader_num_workers"].default is None
