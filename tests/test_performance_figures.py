"""Every figure of docs/performance.md and of README's section follows from the files of benchmarks/results."""

import copy
import json

import pytest

from benchmarks.performance import PAGE, README, RESULTS, between_markers, load_results, readme_table, rewritten
from benchmarks.performance_figures import Spread, ratio, spread, step_reached, update_reached
from benchmarks.performance_tables import report
from tests.benchmarks.results import gpu_results, small_results
from tests.launch import ROOT


MARKED = "before\n<!-- figures{of}: written by make bench, not by hand -->\nold\n<!-- end of figures -->\nafter\n"


@pytest.mark.parametrize("path", [PAGE, README], ids=str)
def test_text_is_that_of_the_results(path):
    expected = rewritten(ROOT, load_results(RESULTS))[path]
    assert (ROOT / path).read_text(encoding="utf-8") == expected, "run python -m benchmarks.performance"


def test_the_section_of_readme_is_short():
    section = (ROOT / README).read_text(encoding="utf-8").split("## Performance\n")[1].split("\n## ")[0]
    assert len([line for line in section.splitlines() if line.strip()]) <= 15  # two sentences, markers, nine rows


def test_spreads_and_ratios_are_of_neighbouring_rounds():
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread(2.0, 1.0, 3.0).text() == "2.00 (1.00–3.00)"
    assert Spread(0.5, 0.25, 0.75).percent() == "50 (25–75) %"
    assert Spread(2.0, 2.0, 2.0).text(1) == "2.0"


def test_fractions_reached():
    """Plain: at least 16 · 10 GFLOP / 40 GFLOP/s = 4 s, of 8, 12 and 8. Ours: 2 s, of 4. Updates: 2 s, of 10 and 4."""
    results = small_results()
    point = results["parts"]["step"]["result"]["points"][0]
    assert step_reached(point, "plain") == Spread(0.5, pytest.approx(1 / 3), 0.5)
    assert step_reached(point, "ours") == Spread(0.5, 0.5, 0.5)
    update = results["parts"]["updates"]["result"]["points"][0]
    assert update_reached(update, "plain").median == pytest.approx(0.2)
    assert update_reached(update, "ours").median == pytest.approx(0.5)


def test_tables_of_a_machine():
    text = report(small_results())
    for row in (
        "| matrix product, float32 | GFLOP/s | 100 | 80 | 0.80 |",
        "| classic: PIL and torchvision transforms | 450.00 (400.00–500.00) | 1.00 | 22 (20–25) % |",
        "| ours | 200.00 | 2.25 (2.00–2.50) | 50 % |",
        "| 2 workers | 25 | 100 | 4.00 | 3.00 |",
        "| ViT-S/16, bf16 | 6.00 | 4.00 | 1.50 | 40, matrix product | 67 % | 50 % |",
        "| AdamW, ViT-S/16 | 10000.0 | 4000.0 | 2.5 | 3.5 | 20 % | 50 % |",
        "| 64 | 6.94 | 4.50 | 2.01 | 1.50 |",
        "| 256 | – | – | 2.44 | 1.75 |",
        "| ViT-S/16, classification | pipeline | 80.0 | 1.00 | – | – | – |",
        "| ViT-S/16, classification | ours, bfloat16 | 20.0 (16.0–40.0) | 4.00 (2.00–5.00) | 10.0 | 50 % |"
        " 100 % same label, scores within 0.003 |",
        "| ViT-S | 8 | 512 | 1.0 | 100 | 50.0 % | 80.0 % | 10.0 % | 25.0 % |",
        "Not held against a measurement here: no hosts here.",
    ):
        assert row in text.splitlines()
    assert "| 8.00 (8.00–12.00) | 4.00 | 2.00 (2.00–3.00) | 40, matrix product | 50 (33–50) % | 50 % |" in text
    assert "1.10 times the plain step's CPU time" in text
    assert "All parts together took 9 minutes." in text


def test_lines_of_readme():
    two_precisions = "2.00, 1.50 times the plain step | 50 %, 50 % of the rate of a matrix product"
    assert readme_table([small_results()]).splitlines()[2:] == [
        "| files to views | 2.2 times the classic PIL pipeline | 50 % of the rate of decoding alone |",
        f"| ViT-S/16 step, float32, bf16 | {two_precisions} |",
        "| ResNet-50 step, float32 | 1.25 times the plain step | 50 % of the rate of a 3×3 convolution |",
        "| AdamW | 2.5 times a loop over parameters | 50 % of memory bandwidth |",
        "| memory, batch 256 in chunks of 32 | 2.4 GiB; the plain step 6.9 GiB at batch 64 | 1.8 GiB must be kept |",
        "| classification in bf16, ViT-S/16 | 4.0 times transformers' pipeline |"
        " 50 % of decoding and matrix products |",
    ]


def test_tables_of_a_gpu():
    text = report(gpu_results())
    for row in (
        "| ViT-S/16, bf16 | 256 | plain | 100 | 1.00 | 25 % | 20.0 % | 10.0 |",
        "| ViT-S/16, bf16 | 256 | ours | 175 (150–200) | 1.75 (1.50–2.00) | 44 (38–50) % | 35.0 % | 10.0 |",
        "| ViT-S/16, bf16 | 256 | compiled | 300 | 3.00 | 50 % | 45.0 % | 10.0 |",
        "| step | `python benchmarks/x.py` | 2026-01-02 | `abc` | – | – |",
    ):
        assert row in text.splitlines()
    for sentence in (
        "ViT-S/16, bf16: 650 (600–700), matrix product; ResNet-50, bf16: 600, 3×3 convolution.",
        "the GPU is busy 75 % of it, of which matrix products 60 %, attention 40 %.",
        "16 workers: 240 images/s against 300 on views that lie ready, 20 % slower. The loader alone gives 400",
    ):
        assert sentence in text
    assert "All parts together" not in text
    assert readme_table([small_results(), gpu_results()]).splitlines()[-1] == (
        "| A GPU: ViT-S/16, ResNet-50 step, bf16, compiled | 3.0, 3.0 times the plain step | 50 % of the rate of a"
        " matrix product, 50 % of the rate of a 3×3 convolution |"
    )


def test_a_failed_part_is_named_and_the_others_are_shown():
    results = small_results()
    del results["parts"]["step"]
    results["failed"] = {"step": {"exit_code": 1}}
    assert "### step\n\nFailed with exit code 1." in report(results)
    assert "### Memory" in report(results)
    assert "step, float32" not in readme_table([results])


def test_a_changed_figure_changes_the_text():
    results = small_results()
    changed = copy.deepcopy(results)
    changed["parts"]["step"]["result"]["points"][0]["cpu_seconds"]["ours"] = [3.0, 3.0, 3.0]
    assert report(changed) != report(results)
    assert readme_table([changed]) != readme_table([results])


def test_only_what_stands_between_the_markers_is_replaced():
    machines = {"small": small_results()}
    text = between_markers(MARKED.format(of=" of small"), machines, "README.md")
    assert text.startswith("before\n")
    assert text.endswith("<!-- end of figures -->\nafter\n")
    assert readme_table([machines["small"]]) in text
    assert "old" not in text
    assert between_markers(text, machines, "README.md") == text


def test_missing_markers_and_machines_are_named():
    with pytest.raises(ValueError, match=r"README.md lacks the markers"):
        between_markers("nothing", {}, "README.md")
    with pytest.raises(ValueError, match=r"the machine 'other', and there are results of small: name one"):
        between_markers(MARKED.format(of=" of small and other"), {"small": small_results()}, "README.md")


def test_quick_runs_and_other_files_are_passed_over(tmp_path):
    results = small_results()
    (tmp_path / "small.json").write_text(json.dumps(results))
    (tmp_path / "small-quick.json").write_text(json.dumps({**results, "quick": True}))
    (tmp_path / "step_cpu.json").write_text(json.dumps({"points": []}))
    assert load_results(tmp_path) == {"small": results}
