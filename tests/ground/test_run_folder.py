"""The record of results: nothing lost, nothing half-written, nothing made up."""

import json
import math
import multiprocessing
import os

import pytest

from mocov3_hf.evaluation import results as results_module
from mocov3_hf.evaluation.results import append_result, read_results, table


def append(folder, task="knn", **changes):
    arguments = {"dataset": {"name": "d"}, "metrics": {"top1": 0.5}, "settings": {"k": [1, 5]}, "seconds": 1.23456}
    return append_result(folder, task=task, **(arguments | changes))


def test_a_result_says_what_was_done(tmp_path):
    result = append(tmp_path / "new" / "folder", seed=3, model={"name": "m"})
    assert read_results(tmp_path / "new" / "folder") == [result]
    assert result["metrics"] == {"top1": 0.5}
    assert (result["task"], result["seed"], result["seconds"], result["model"]) == ("knn", 3, 1.235, {"name": "m"})
    assert set(result["versions"]) >= {"python", "torch", "transformers", "datasets", "mocov3_hf"}
    assert result["hardware"]["cpu_count"] == os.cpu_count()
    assert result["date"].endswith("+00:00")


def test_results_add_up_in_order_and_stay_as_they_were(tmp_path):
    first = append(tmp_path)
    second = append(tmp_path, task="linear", metrics={"top1": 0.7})
    assert read_results(tmp_path) == [first, second]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_keys_of_other_writers_survive(tmp_path):
    append(tmp_path)
    path = tmp_path / "results.json"
    content = json.loads(path.read_text())
    content["results"][0]["remark"] = "by hand"
    path.write_text(json.dumps(content))
    append(tmp_path)
    assert read_results(tmp_path)[0]["remark"] == "by hand"


def write_many(folder, name):
    for number in range(20):
        append(folder, task=f"{name}-{number}")


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(tmp_path, name)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    tasks = [result["task"] for result in read_results(tmp_path)]
    assert sorted(tasks) == sorted(f"{name}-{number}" for name in "abc" for number in range(20))


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    first = append(tmp_path)

    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(results_module.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        append(tmp_path)
    assert read_results(tmp_path) == [first]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": 1}', '{"format": 1, "results": {}}', '{"format": 9, "results": []}']
)
def test_a_damaged_file_is_moved_aside_not_written_over(tmp_path, content):
    (tmp_path / "results.json.damaged").write_text("an earlier one")
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json"):
        read_results(tmp_path)
    with pytest.warns(UserWarning, match=r"moved to results\.json\.damaged-2, a new file begins"):
        result = append(tmp_path)
    assert read_results(tmp_path) == [result]
    assert (tmp_path / "results.json.damaged").read_text() == "an earlier one"
    assert (tmp_path / "results.json.damaged-2").read_text() == content


def test_no_file_no_results(tmp_path):
    assert read_results(tmp_path) == []


@pytest.mark.parametrize("metrics", [{"top1": math.nan}, {"top1": object()}])
def test_what_json_cannot_say_is_refused_before_anything_is_touched(tmp_path, metrics):
    with pytest.raises(ValueError, match="numbers, text, lists and dicts only") as error:
        append(tmp_path / "new", metrics=metrics)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_table_shows_accuracies_in_percent():
    lines = table({"knn20_top1": 0.98765, "effective_rank": 12.3456}, "title").splitlines()
    assert lines[0] == "title"
    assert lines[1].split() == ["knn20_top1", "98.77", "%"]
    assert lines[2].split() == ["effective_rank", "12.35"]
