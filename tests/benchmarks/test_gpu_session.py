"""gpu_session.py: its plan, its goals, and a rehearsal of every part on a CPU."""

import importlib
import json
import math
import sys
from dataclasses import fields
from itertools import takewhile
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_session
from benchmarks.bench import FOLDER
from benchmarks.gpu_session import CALLS, CLIPPED, compare, plan
from benchmarks.gpu_tests import Outcomes
from mocov3_hf.pretraining.hardware import HardwareSettings
from mocov3_hf.pretraining.recipe import load_recipe
from mocov3_hf.reporting import UsageError
from tests.fork_server import Forked


MODULE = "import runpy, sys; sys.argv[0] = {name!r}; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"


def variants_of_parts():
    """The variants of the step that each part measures."""
    found = {}
    for item in plan("photos", False, None):
        if item.part.script == "step_gpu":
            arguments = iter(item.part.arguments)
            next(argument for argument in arguments if argument == "--variants")
            found[item.part.name] = list(takewhile(lambda name: not name.startswith("--"), arguments))
    return found


def test_calls_end_in_time():
    for call, seconds in CALLS.items():
        assert sum(item.limit for item in plan("photos", False, None) if item.call == call) <= seconds


def test_the_second_recipe_differs_in_what_it_names():
    ours, other = load_recipe("cifar10_resnet14").to_dict(), load_recipe(str(CLIPPED)).to_dict()
    changed = {name for name in ours if ours[name] != other[name]}
    steps = {"base_learning_rate", "trust_coefficient", "trust_clip", "train_batch_size"}
    assert changed == steps | {"crop_scale", "head_hidden_size"}


def test_goals(tmp_path):
    assert {row["reached"] for row in compare(tmp_path)} == {None}
    variants = {
        "plain": {"mfu": 0.2},
        "ours": {"mfu": 0.44, "speedup": {"median": 3.0}},
        "compiled": {"mfu": 0.46, "speedup": {"median": 3.9}},
    }
    found = {"points": [{"variants": variants, "data": {"slower_than_ready": 0.04}}]}
    for part in ("step_vit_base", "step_vit_small", "data"):
        (tmp_path / f"{part}.json").write_text(json.dumps({"result": found}))
    (tmp_path / "learning.json").write_text(json.dumps({"result": {"metrics": []}}))
    assert [row["reached"] for row in compare(tmp_path)] == [True, False, True, None]
    assert [row["measured"] for row in compare(tmp_path)] == [0.46, 3.9, 0.04, None]
    variants["compiled,cuda_graphs=true"] = {"mfu": 0.4, "speedup": {"median": 4.1}}
    # Ended by its time limit after some variants.
    (tmp_path / "candidates_vit_small.failed.json").write_text(json.dumps({"result": found}))
    assert [row["measured"] for row in compare(tmp_path)] == [0.46, 4.1, 0.04, None]


def test_every_candidate_is_measured_alone_and_with_the_others():
    """Each on top of what it changes, in the same process; those that only help at the start or with data apart."""
    off = {field.name for field in fields(HardwareSettings) if field.default is False}
    alone = {"prefetch_views": {"data"}}
    for part, names in variants_of_parts().items():
        variants = [frozenset(name.split(",")) for name in names]
        for variant in variants:
            for change in variant:
                if variant - {change} in variants:
                    alone.setdefault(change.partition("=")[0], set()).add(part)
        if part.startswith("tuned"):
            together = off - {"prefetch_views", "compile_regions"}
            assert together <= {change.partition("=")[0] for change in variants[-1]}, part
    assert off <= alone.keys()
    assert alone["attn_implementation"] == {"candidates_vit_small", "candidates_vit_base"}
    assert alone["max_autotune"] == {"tuned_vit_small", "tuned_vit_base", "tuned_resnet50"}
    assert alone["cuda_graphs"] == {"candidates_vit_small", "candidates_vit_base", "candidates_resnet50"}


@pytest.fixture
def step_gpu(monkeypatch):
    """The script, without models and without measuring limits."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("step_gpu")
    for name in ("fresh_model", "limit_of", "random_views"):
        monkeypatch.setattr(module, name, lambda *_: SimpleNamespace(config=None, __len__=lambda: 4))
    flops = {"flop_per_image": {"plain": 1.0, "ours": 1.0}, "published_flop_per_image": 1.0}
    monkeypatch.setattr(module, "model_flops", lambda _: flops)
    monkeypatch.setattr(module, "limit_rate", lambda _: 1.0)
    yield module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


def test_a_variant_that_fails_does_not_lose_the_others(step_gpu, monkeypatch):
    """Nor does one that fails later, whose rounds until then are kept, nor those for which no time is left."""

    class Variant:
        def __init__(self, name, *_):
            if name == "wrong":
                raise UsageError("no such\nattention")
            self.name, self.turns, self.choice = name, 0, None
            self.first_loss = self.first_seconds = 1.0

        def rate(self, _):
            self.turns += 1
            if self.name == "tired" and self.turns == 2:
                raise torch.OutOfMemoryError("out of memory")
            return 100.0 if self.name == "plain" else 200.0

        def choose_algorithms(self):
            pass

    monkeypatch.setattr(step_gpu, "Variant", Variant)
    names = ["plain", "wrong", "tired", "compiled"]
    options = SimpleNamespace(batch=4, variants=names, rounds=3, steps=1, seconds=60, profile=False, data=None)
    recorded = []
    point = step_gpu.measure("vit_small", options, math.inf, recorded.append)
    assert {name: len(found["images_per_second"]) for name, found in point["variants"].items()} == {
        "plain": 3,
        "tired": 1,
        "compiled": 3,
    }
    assert point["failed"] == {"wrong": "UsageError: no such attention", "tired": "OutOfMemoryError: out of memory"}
    assert [found["speedup"]["median"] for found in list(point["variants"].values())[1:]] == [2.0, 2.0]
    assert [list(each["variants"]) for each in recorded[:3]] == [["plain"], ["plain"], ["plain", "tired"]]
    late = step_gpu.measure("vit_small", options, 0.0, recorded.append)
    assert (late["variants"], late["failed"]["compiled"]) == ({}, "not tried: 60 s were over")


@pytest.mark.slow
def test_rehearsal(tmp_path, monkeypatch):
    """Resumed where it was cut off; what fails leaves its last lines and does not stop the rest."""

    def run_part(part, folder, label, limit):
        output = folder / f"{part.name}.json"
        target = part.command()[1:]
        arguments = [*part.arguments, "--output", str(output)]
        file = ["-c", MODULE.format(name=target[1])] if part.as_module else [target[0]]
        process = Forked([*file, *arguments], MOCOV3_REHEARSAL="1", CUDA_VISIBLE_DEVICES="")
        text, _ = process.communicate()
        record = {"command": " ".join(part.command()), "exit_code": process.returncode, "last_lines": [text[-2000:]]}
        return (json.loads(output.read_text()) if process.returncode == 0 else None), record

    monkeypatch.setattr(gpu_session, "run_part", run_part)
    monkeypatch.setenv("MOCOV3_REHEARSAL", "0")
    same_code = (
        *("step_vit_small", "step_vit_base", "step_resnet50", "tuned_vit_small", "tests_slow", "largest"),
        "learning_clipped",
    )
    for name in (
        *same_code,
        *(f"{kind}_{backbone}" for kind in ("candidates", "tuned") for backbone in ("vit_base", "resnet50")),
    ):
        (tmp_path / f"{name}.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["gpu_session", "--rehearse", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        gpu_session.main()
    failed = {path.name: json.loads(path.read_text())["run"]["last_lines"] for path in tmp_path.glob("*.failed.json")}
    assert (stop.value.code, failed) == (0, {})
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert (tmp_path / "step_vit_base.json").read_text() == "{}"  # resumed
    (point,) = found["candidates_vit_small"]["result"]["points"]
    assert point["failed"] == {}
    assert list(point["variants"]) == variants_of_parts()["candidates_vit_small"]
    assert len(found["data"]["result"]["points"][0]["data"]["images_per_second"]) == 3
    assert found["tests"]["result"]["counts"] == {"skipped": len(found["tests"]["result"]["tests"])}
    assert found["decode"]["result"]["pixel_difference"] == {"mean": 0, "largest": 0}
    assert found["learning"]["result"]["linear_top1"] > 0.3
    assert [row["measured"] is None for row in found["goals"]] == [True, False, False, False]


def test_outcomes_are_kept_as_they_come(tmp_path):
    """The tests may be ended by their time limit."""
    outcomes = Outcomes(str(tmp_path / "tests.json"))
    outcomes.pytest_runtest_logreport(pytest.TestReport("one", ("", 0, ""), {}, "passed", None, "setup"))
    assert not (tmp_path / "tests.json").exists()
    outcomes.pytest_runtest_logreport(pytest.TestReport("one", ("", 0, ""), {}, "passed", None, "call", duration=0.25))
    outcomes.pytest_runtest_logreport(pytest.TestReport("two", ("", 0, ""), {}, "failed", "line\nwrong", "call"))
    assert json.loads((tmp_path / "tests.json").read_text()) == {
        "counts": {"passed": 1, "failed": 1},
        "tests": {
            "one": {"outcome": "passed", "seconds": 0.25, "why": []},
            "two": {"outcome": "failed", "seconds": 0, "why": ["wrong"]},
        },
    }
