"""gpu_session.py: its plan, its goals, and a rehearsal of every part on a CPU."""

import json
import sys
from dataclasses import fields
from itertools import takewhile

import pytest

from benchmarks import gpu_session
from benchmarks.bench import FOLDER
from benchmarks.gpu_session import CALLS, compare, plan
from mocov3_hf.pretraining.hardware import HardwareSettings
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


@pytest.mark.slow
def test_a_variant_that_fails_does_not_lose_the_others(tmp_path):
    """Nor do those for which no time is left."""
    output = tmp_path / "steps.json"
    words = "--backbones vit_small --try_on_cpu --batch 4 --rounds 2 --steps 1 --variants plain"
    for more, measured, exit_code in (
        ("ours,attn_implementation=wrong compiled", ["plain", "compiled"], 0),
        ("--seconds 0", [], 1),
    ):
        arguments = [*words.split(), *more.split(), "--output", str(output)]
        step = Forked([str(FOLDER / "step_gpu.py"), *arguments], MOCOV3_REHEARSAL="1", CUDA_VISIBLE_DEVICES="")
        text, _ = step.communicate()
        assert step.returncode == exit_code, text
        (point,) = json.loads(output.read_text())["points"]
        assert list(point["variants"]) == measured
        assert all(len(variant["images_per_second"]) == 2 for variant in point["variants"].values())
        (reason,) = point["failed"].values()
        assert reason.startswith("not tried: " if exit_code else "UsageError: --attn_implementation wrong")


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
    same_code = ("step_vit_base", "step_resnet50", "tests_slow", "largest")
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
    assert (tmp_path / "step_vit_base.json").read_text() == "{}"
    steps = [name for name in found if name.endswith("vit_small")]
    assert len(steps) == 3
    for name in steps:
        (point,) = found[name]["result"]["points"]
        assert (point["failed"], len(point["variants"])) == ({}, len(variants_of_parts()[name]))
    assert len(found["data"]["result"]["points"][0]["data"]["images_per_second"]) == 3
    assert found["tests"]["result"]["counts"] == {"skipped": len(found["tests"]["result"]["tests"])}
    assert found["decode"]["result"]["pixel_difference"] == {"mean": 0, "largest": 0}
    assert found["learning"]["result"]["linear_top1"] > 0.3
    assert [row["measured"] is None for row in found["goals"]] == [True, False, False, False]
