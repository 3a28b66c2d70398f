"""Other libraries beside ours: the program, what it refuses to time, and its tables."""

import copy
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import peers
from benchmarks.performance import PEERS_BEGIN, PEERS_END, between_peers_markers
from benchmarks.performance_peers import faster_than_ours, peers_section, peers_table
from benchmarks.photos import make_photos


def about(package, **versions):
    return {
        "package": package,
        "decoder": "PIL",
        "resize": "PIL, antialiased",
        "differences": "no solarize" if package == "timm" else "",
        "versions": {"torch": "2.14.1", **versions},
    }


def small_results():
    """Ours takes 10 ms per image for complete views, lightly 20 and timm 5; of the steps, lightly has only float32."""
    tasks = {
        "views": {"ours": [0.01, 0.0125, 0.01], "plain": [0.02] * 3, "lightly": [0.02] * 3, "timm": [0.005] * 3},
        "crops": {"ours": [0.0025] * 3, "plain": [0.005] * 3, "lightly": [0.005] * 3},
        "loader": {"ours": [0.0125] * 3, "plain": [0.02] * 3, "lightly": [0.025] * 3, "timm": [0.01] * 3},
        "step_no": {"ours": [1.0] * 3, "plain": [1.25] * 3, "lightly": [1.5] * 3},
        "step_bf16": {"ours": [0.5] * 3, "plain": [0.4] * 3},
    }
    seconds = {task: {name: {"cpu": cpu, "wall": cpu} for name, cpu in by.items()} for task, by in tasks.items()}
    described = {
        "ours": about("mocov3_hf"),
        "plain": about("torchvision", timm="1.0"),
        "lightly": about("lightly", lightly="1.6.0"),
        "timm": about("timm", timm="1.0"),
    }
    when = {"views": {"date": "2026-01-02 03:04 UTC"}, "step_no": {"date": "2026-01-02 05:00 UTC"}}
    run = {
        "when": when,
        "peers": described,
        "isa": "all",
        "failed": [{"library": "timm", "task": "crops", "error": "ValueError: gray"}],
    }
    limited = {task: seconds[task] for task in ("views", "step_no")}
    return {
        "quick": False,
        "device": "A CPU",
        "instructions": {"avx2": True, "avx512f": True, "amx_bf16": False},
        "images": 300,
        "mean_file_bytes": 112_000,
        "step_batch": 8,
        "skipped": {"dali": "not installed"},
        "runs": [{**run, "seconds_per_image": seconds}, {**run, "seconds_per_image": limited}],
    }


def test_tables_of_the_page():
    text = peers_section(small_results())
    for row in (
        "| ours | PIL | PIL, antialiased | 100 (80–100) | 400 | 80 | 10.0 (10.0–12.5) |",
        "| lightly 1.6.0 | PIL | PIL, antialiased | 50 | 200 | 40 | 20.0 |",
        "| timm 1.0 | PIL | PIL, antialiased | 200 | – | 100 | 5.0 |",
        "| plain step | 0.80 | 1.25 | 2.50 | 0.80 |",
        "| lightly | 0.67 | 1.50 | – | – |",
        "| lightly | 50 → 50 | – | – | 0.67 → 0.67 |",
    ):
        assert row in text.splitlines()
    assert "peers_cpu.json), 2026-01-02; one core of A CPU with avx2, avx512f. 300 JPEG files of 112 KB" in text
    assert (
        "Faster than ours: in complete views, timm (2.00×); in both crops, none; in data loader, timm (1.25×)." in text
    )
    assert "Faster than ours: in float32 step, none; in bf16 step, plain (1.25×)." in text
    assert "Other than in the paper: timm, no solarize." in text
    assert "Not measured: NVIDIA DALI (not installed); timm, both crops (ValueError: gray)." in text


def test_rows_of_the_readme():
    assert peers_table(small_results()).splitlines()[2:6] == [
        "| ours | 100 | 400 | 80 | 1.00, 2.00 |",
        "| plain: torchvision transforms, plain step | 50 | 200 | 50 | 0.80, 2.50 |",
        "| lightly | 50 | 200 | 40 | 0.67, – |",
        "| timm | 200 | – | 100 | – |",
    ]


def test_a_changed_number_changes_both_texts():
    results = small_results()
    changed = copy.deepcopy(results)
    changed["runs"][0]["seconds_per_image"]["views"]["ours"]["cpu"] = [0.004] * 3
    assert peers_table(changed) != peers_table(results)
    assert "complete views, none" in faster_than_ours(changed["runs"][0], ("views",))


def test_quick_results_and_missing_markers_are_refused():
    with pytest.raises(ValueError, match=r"those of --quick: run python -m benchmarks\.peers without it"):
        peers_section({**small_results(), "quick": True})
    with pytest.raises(ValueError, match=r"README\.md has no markers: add"):
        between_peers_markers("nothing", "", "README.md")
    text = between_peers_markers(f"before\n{PEERS_BEGIN}old\n{PEERS_END}\nafter\n", "new", "README.md")
    assert text == f"before\n{PEERS_BEGIN}\nnew\n\n{PEERS_END}\nafter\n"


def test_tasks_that_are_not_measured_again_are_kept():
    earlier = small_results()
    for run, isa in zip(earlier["runs"], ("all", "avx2"), strict=True):
        run["isa"] = isa
    earlier |= {"photographs": "made by photos.py", "batch": 50}
    new = copy.deepcopy(earlier)
    new["runs"] = [{**new["runs"][0], "failed": [], "seconds_per_image": {"crops": {"ours": {"cpu": [7.0]}}}}]
    result = peers.merged(earlier, {**new, "images": 5, "step_batch": 1}, ["crops"])
    first, second = result["runs"]
    assert first["seconds_per_image"] == {
        **earlier["runs"][0]["seconds_per_image"],
        "crops": {"ours": {"cpu": [7.0]}},
    }
    assert (first["failed"], result["images"], result["step_batch"]) == ([], 5, 8)
    assert second == earlier["runs"][1]
    assert peers.merged(None, new, ["crops"]) == new
    assert peers.merged(earlier, new, list(peers.TASKS)) == new


class Told:
    """A library whose answers are known: CPU seconds of 2 images, one after another."""

    def __init__(self, name, seconds, asked):
        self.name, self.seconds, self.asked = name, list(seconds), asked

    def ask(self, task):
        self.asked.append((self.name, task))
        if task == "forget":
            return {}
        taken = self.seconds.pop(0)
        return {"error": "ValueError: no"} if taken is None else {"cpu_seconds": taken, "wall_seconds": 9, "images": 2}


def test_libraries_alternate_and_one_that_fails_is_left_out():
    asked, failed = [], []
    told = [Told("ours", (9, 2, 4), asked), Told("timm", (9, 6, 8), asked), Told("lightly", (9, None), asked)]
    seconds = peers.alternate(told, "views", 2, failed)
    assert seconds["ours"]["cpu"] == [1, 2]
    assert seconds["timm"]["cpu"] == [3, 4]
    assert seconds.keys() == {"ours", "timm"}
    assert failed == [{"library": "lightly", "task": "views", "error": "ValueError: no"}]
    order = [name for name, task in asked if task == "views"]
    assert order == ["lightly", "timm", "ours", "ours", "timm", "lightly", "timm", "ours"]
    assert [name for name, task in asked if task == "forget"] == ["ours", "timm", "lightly"]


def test_a_library_whose_process_ends_does_not_end_the_others(tmp_path, monkeypatch):
    (tmp_path / "peer_process.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    with peers.Peer("timm", sys.executable, [], {}) as peer:
        peer.process.wait()
        assert [peer.ask(task) for task in ("views", "forget")] == [
            {"error": "the process ended with exit code 3"}
        ] * 2


def test_a_library_that_is_not_installed_is_not_found(tmp_path):
    """An interpreter without packages: ours and the plain implementation need none of its own."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    bare.chmod(0o755)
    assert list(peers.find([str(bare)])) == ["ours", "plain"]


@pytest.mark.parametrize("task", ["views", "crops", "loader"])
def test_ours_and_plain_pass_the_check(task, tmp_path, monkeypatch):
    """As peer_process.py runs them: the first round, in which the outputs are checked, and another."""
    monkeypatch.syspath_prepend(peers.FOLDER)
    import peer_libraries
    import peer_process

    make_photos(tmp_path / "photographs", 4)
    for kind in (peer_libraries.Ours, peer_libraries.Plain):
        library = kind(str(tmp_path), 2)
        for warm_up in (True, False):
            answer = peer_process.run_data(library, task, warm_up)
            assert answer["images"] == 4
            assert 0 < answer["cpu_seconds"] < 60


def test_outputs_that_differ_in_shape_type_or_range_are_refused(monkeypatch):
    monkeypatch.syspath_prepend(peers.FOLDER)
    from peer_process import check, run_data

    views = torch.linspace(-2, 2, 2 * 3 * 224 * 224).view(2, 3, 224, 224).unbind()
    assert check("views", views) == 1
    assert check("loader", tuple(view.expand(5, 3, 224, 224) for view in views)) == 5
    for wrong, message in (
        (tuple(view.double() for view in views), "got torch.float64"),
        (tuple(100 * view for view in views), "in \\[-200"),
        (tuple(view[:, :200] for view in views), r"\(3, 200, 224\)"),
        (views[:1], "expected two views"),
    ):
        with pytest.raises(ValueError, match=message):
            check("views", wrong)
    with pytest.raises(ValueError, match=r"crops: expected torch.uint8"):
        check("crops", views)
    library = SimpleNamespace(views=lambda: iter([(views[0], views[0])] * 2))
    with pytest.raises(ValueError, match="both views are the same, of every image"):
        run_data(library, "views", True)
    library.views = lambda: iter([(views[0], views[0]), views])
    assert run_data(library, "views", True)["images"] == 2


@pytest.mark.slow
def test_quick_run_without_peers(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "peers.json"
    some = ["--libraries", "ours", "plain", "--tasks", "views", "step_no"]
    peers.main(["--quick", *some, "--output", str(output)])
    result = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert "solo-learn" in result["skipped"]
    (run,) = result["runs"]
    assert run["failed"] == []
    assert list(run["seconds_per_image"]) == ["views", "step_no"]
    for task in run["seconds_per_image"]:
        assert run["seconds_per_image"][task].keys() == {"ours", "plain"}
        assert all(len(taken["cpu"]) == 1 and taken["cpu"][0] > 0 for taken in run["seconds_per_image"][task].values())
    with pytest.raises(ValueError, match="quick"):
        peers_section(result)


def test_a_folder_without_jpeg_files_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        peers.main(["--images", str(tmp_path)])
    assert ended.value.code == 2
    assert f"no JPEG files in '{tmp_path}': pass a folder that contains some as --images" in capsys.readouterr().err
