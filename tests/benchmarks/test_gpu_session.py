"""gpu_session.py: its plan, its goals, and a rehearsal of every part on a CPU."""

import json
import sys

import pytest

from benchmarks import gpu_session
from benchmarks.gpu_session import CALLS, compare, plan
from tests.fork_server import Forked


MODULE = "import runpy, sys; sys.argv[0] = {name!r}; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"


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
    (tmp_path / "step_vit_base.json").write_text("{}")  # the same code as step_vit_small
    (tmp_path / "step_resnet50.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["gpu_session", "--rehearse", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        gpu_session.main()
    failed = {path.name: json.loads(path.read_text())["run"]["last_lines"] for path in tmp_path.glob("*.failed.json")}
    assert (stop.value.code, failed) == (0, {})
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert (tmp_path / "step_vit_base.json").read_text() == "{}"
    assert found["tests"]["result"]["counts"] == {"skipped": len(found["tests"]["result"]["tests"])}
    assert found["decode"]["result"]["pixel_difference"] == {"mean": 0, "largest": 0}
    assert found["learning"]["result"]["linear_top1"] > 0.3
    assert [row["measured"] is None for row in found["goals"]] == [True, False, False, False]
