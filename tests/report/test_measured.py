"""Results: grouped by protocol, with those of other folders about the same weights; folders that hold nothing else."""

import json

import pytest

from mocov3_hf.loading import load_encoder
from mocov3_hf.report.measured import results_section
from mocov3_hf.results import append_result
from mocov3_hf.run_folder import read_run_folder
from mocov3_hf.weights import weights_hash
from tests.factories import save_run
from tests.report.test_report import Page, check, refused, report


DATA = {
    "name": "/secret/pets",
    "split": "test",
    "size": 359,
    "train_split": "train",
    "train_size": 1438,
    "num_classes": 4,
}


def save_result(folder, weights, accuracy=0.9, **changes):
    result = {
        "task": "knn",
        "dataset": DATA,
        "metrics": {"knn10_top1": accuracy, "knn10_top5": 0.99, "effective_rank": 12.5},
        "settings": {"temperature": 0.07},
        "seconds": 1.0,
        "model": {"name": "m", "weights": weights},
    }
    append_result(folder, **result | changes)


def table(folder):
    return results_section(read_run_folder(folder)).parts[0]


def test_repeated_evaluations_are_one_group(run, tmp_path):
    (run / "results.json").unlink()
    weights = weights_hash(load_encoder(run))
    for accuracy in (0.9, 0.88, 0.89):
        save_result(run, weights, accuracy)
    save_result(run, weights, 0.7, dataset=DATA | {"train_split": "small", "train_size": 9})
    found = table(run)
    assert found.columns == ["metric", "measured", "top-5", "range"]
    first, top1, rank, second, other_top1, _ = found.rows
    for words in ("K-nearest neighbors on pets, split test (359 images), neighbors from train (1,438 images)",
                  "4 classes, chance 25 %", "3 runs"):  # fmt: skip
        assert words in first
    assert top1 == ["top-1, k = 10", "89.00 %", "99.00 %", "88.00 % to 90.00 %"]
    assert rank == ["effective rank", "12.5", "", ""]
    assert "neighbors from small (9 images)" in second
    assert other_top1[1] == "70.00 %"


def test_top5_stands_beside_top1(run):
    (run / "results.json").unlink()
    save_result(
        run, weights_hash(load_encoder(run)), task="evaluate", metrics={"top1": 0.5, "top5": 0.75, "loss": 1.25}
    )
    assert table(run).columns == ["metric", "measured", "top-5"]
    assert table(run).rows[1:] == [["top-1", "50.00 %", "75.00 %"], ["loss", "1.25", ""]]


def test_results_of_the_same_weights_in_other_folders_are_shown(run, tmp_path):
    weights = weights_hash(load_encoder(run))
    save_result(tmp_path / "linear", weights, 0.77, task="linear_cached", metrics={"linear_top1": 0.77})
    save_result(run / "inside", weights, 0.66)
    save_result(tmp_path / "stranger", "0" * 32, 0.55)
    save_result(run, "0" * 32, 0.44)
    rows = table(run).rows
    text = json.dumps(rows)
    for words in ("77.00 %", "in folder linear", "trained on train", "66.00 %", "in folder inside", "81.50 %"):
        assert words in text, words
    assert "55.00 %" not in text
    (heading,) = [row for row in rows if isinstance(row, str) and "other weights than today's" in row]
    assert rows[rows.index(heading) + 1][1] == "44.00 %"
    assert rows.index(heading) == max(place for place, row in enumerate(rows) if isinstance(row, str))


def test_damaged_results_beside_a_run_are_named(run, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("{")
    folder = read_run_folder(run)
    results_section(folder)
    (note,) = folder.notes
    assert note.startswith("broken/results.json was left out: ValueError")


def test_a_folder_of_results_alone(tmp_path, labeled, capsys):
    save_result(tmp_path / "cached", "1" * 32, task="linear_cached", metrics={"linear_top1": 0.61})
    report(tmp_path / "cached")
    page = Page(tmp_path / "cached" / "report.html")
    check(page)
    for words in ("Evaluation of m.", "Linear probe on cached features", "61.00 %", "trained on train"):
        assert words in page.text, words
    assert "No training metrics" not in page.text
    assert page.commands == []
    message = refused([tmp_path / "cached", "--dataset_name", labeled], capsys)
    assert "has no config.json, so there is no model to run on images" in message


@pytest.mark.slow
def test_pictures_are_kept_by_a_report_without_images(run, labeled, quick_charts):
    report(run, "--dataset_name", labeled, "--num_images", "9")
    first = Page(run / "report.html")
    save_result(run, weights_hash(load_encoder(run)), 0.123)
    for _ in range(2):  # also those that were kept before
        report(run)
        page = Page(run / "report.html")
        check(page)
        assert [image["src"] for image in page.images] == [image["src"] for image in first.images]
        assert "12.30 %" in page.text
        assert page.text.count("from an earlier report. To renew them:") == 1
        assert len(page.commands) == 1
    (run / "report.html").write_text('rubbish <section id="neighbors">')
    report(run)
    assert Page(run / "report.html").images == []


@pytest.mark.slow
def test_runs_are_compared_on_one_page(tmp_path, capsys):
    one, two = save_run(tmp_path / "x" / "run"), save_run(tmp_path / "y" / "run")
    (two / "recipe.yaml").write_text(
        (two / "recipe.yaml").read_text().replace("weight_decay: 0.1", "weight_decay: 0.3")
    )
    lines = [json.loads(line) | {"loss": 1.7} for line in (two / "metrics.jsonl").read_text().splitlines()]
    (two / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_result(two, weights_hash(load_encoder(two)), 0.5)
    report(one, two)
    assert str(tmp_path / "x" / "comparison.html") in capsys.readouterr().out
    page = Page(tmp_path / "x" / "comparison.html")
    check(page)
    for words in ("Comparison of 2 runs", "x/run: The loss, 0.800, has covered", "y/run: The loss, 1.700, is at"):
        assert words in page.text, words
    assert ("81.50 %" in page.text, "50.00 %" in page.text) == (True, True)
    rows = page.source.partition("weight_decay")[2].partition("</tr>")[0]
    assert [cell in rows for cell in (">0.1</td>", ">0.3</td>")] == [True, True]
    assert "base_learning_rate" not in page.source.partition('id="differences"')[2]  # it is the same
    assert "step 40\nx/run: 0.8\ny/run: 1.7" in page.text
    assert (tmp_path / "x" / "comparison_plots" / "loss.png").is_file()
    assert "/secret" not in page.source
