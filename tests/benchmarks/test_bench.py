"""bench.py: its plan, merging of results, and failing parts."""

import pytest

from benchmarks.bench import Part, drift, machine_name, merge, plan_parts, run_part
from tests.benchmarks.results import small_results


PARTS = ["limits_before", "data_path", "step", "updates", "memory", "inference", "scaling", "scaling_check"]
WRITES = "import json, sys\nprint('measuring')\nopen(sys.argv[-1], 'w').write(json.dumps({'number': 1}))\n"


def test_plans():
    assert [part.name for part in plan_parts("cpu", False, "photos", 3, "step.json")] == [*PARTS, "limits_after"]
    assert "memory" not in [part.name for part in plan_parts("cuda", False, "photos", 3, "step.json")]
    for quick in (True, False):
        for part in plan_parts("cuda", quick, "photos", 3, "step.json"):
            takes_a_device = part.name not in ("data_path", "step", "inference", "scaling")
            assert (part.arguments[:2] == ("--device", "cuda")) == takes_a_device
            assert part.name != "step" or part.script == "step_gpu"
    full = sum(part.seconds for part in plan_parts("cpu", False, "photos", 3, "step.json"))
    assert full < 20 * 60


@pytest.mark.parametrize(
    ("device", "cores", "expected"),
    [
        ("AMD EPYC", 2, "amd-epyc-2-cores"),
        ("AMD EPYC 9654 96-Core Processor", 192, "amd-epyc-9654-192-cores"),
        ("Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz", 28, "intel-xeon-e5-2680-v4-28-cores"),
        ("NVIDIA H100 80GB HBM3", None, "nvidia-h100-80gb-hbm3"),
    ],
)
def test_machine_names(device, cores, expected):
    assert machine_name(device, cores) == expected


def script(folder, code):
    (folder / "measure.py").write_text(code)
    return Part("measured", str(folder / "measure"), (), 1)


def test_a_part_that_works(tmp_path, capfd):
    result, record = run_part(script(tmp_path, WRITES), tmp_path, "[1/1]")
    assert result == {"number": 1}
    assert record["seconds"] > 0
    assert "    measuring" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("code", "exit_code", "last"),
    [
        ("print('half way')\nraise SystemExit('error: no images')\n", 1, "error: no images"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n", -9, None),
        ("print('forgot')\n", 0, "exited without writing its --output"),
    ],
)
def test_a_part_that_fails(tmp_path, code, exit_code, last):
    result, record = run_part(script(tmp_path, code), tmp_path, "[1/1]")
    assert result is None
    assert record["exit_code"] == exit_code
    assert (record["last_lines"][-1] if record["last_lines"] else None) == last


def test_new_results_replace_only_those_of_the_same_part():
    before = small_results()
    new = {"run": {}, "result": {"points": []}}
    merged = merge(before, {"machine": "small"}, {"step": new}, {"memory": {"exit_code": 1}})
    assert merged["parts"]["step"] == new
    assert merged["parts"]["updates"] == before["parts"]["updates"]
    assert "memory" not in merged["parts"]
    assert merged["failed"] == {"memory": {"exit_code": 1}}


def test_drift_of_the_limits():
    parts = small_results()["parts"]
    assert drift(parts) == {"gemm_no": pytest.approx(0.8)}
    assert drift({"limits_before": parts["limits_before"]}) == {}
