"""Series, rollbacks and marks against what was written, and the bounds of the loss against the loss itself."""

import json
import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from mocov3_hf.model.loss_mocov3 import contrastive_loss
from mocov3_hf.report import training
from mocov3_hf.report.charts import LIGHT
from mocov3_hf.report.curves import block_norms, count_marks, edges, loss_bounds, marks, series, split_abandoned
from mocov3_hf.report.folder import read_folder


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Axes of a chart of the module `training`, by name of the function that makes it."""

    def draw(function, *arguments):
        caught = {}
        monkeypatch.setattr(training, "make_chart", lambda name, draw, plots, **options: caught.update(draw=draw))
        function(*arguments, tmp_path)
        figure = Figure()
        caught["draw"](figure, LIGHT)
        return figure.axes

    return draw


def test_series_has_gaps_where_there_is_no_number():
    lines = [
        {"step": 1, "a": 1.0},
        {"step": 2, "a": None},
        {"step": 3},
        {"step": 4, "a": math.inf},
        {"step": 5, "a": 2},
    ]
    found = series(lines, "a")
    assert found.steps.tolist() == [1, 2, 4, 5]
    assert np.isnan(found.values).tolist() == [False, True, True, False]
    assert found.known.tolist() == [1, 2]


def test_lines_that_a_rollback_threw_away():
    lines = [{"step": step, "run": 0} for step in (5, 10, 15, 20)]
    lines += [{"step": step, "run": 1} for step in (10, 15)] + [{"step": step, "run": 2} for step in (15, 20, 25)]
    kept, abandoned = split_abandoned(lines)
    assert [(line["step"], line["run"]) for line in kept] == [(5, 0), (10, 1), (15, 2), (20, 2), (25, 2)]
    assert [(line["step"], line["run"]) for line in abandoned] == [(10, 0), (15, 0), (15, 1), (20, 0)]


def test_evaluation_of_the_same_step_throws_nothing_away():
    lines = [{"step": 10, "loss": 1.0}, {"step": 10, "eval_top1": 0.5}, {"step": 20, "loss": 0.5}]
    assert split_abandoned(lines) == (lines, [])


def test_marks_of_events(run):
    found = [(mark.kind, mark.step, mark.value, mark.to_step) for mark in marks(read_folder(run))]
    assert found == [("spike", 17, 25.0, None), ("skipped", 19, None, None), ("rollback", 27, None, 20)]
    assert count_marks(read_folder(run)) == {"spike": 1, "skipped": 1, "divergence": 0, "rollback": 1}


def test_marks_of_counters_where_there_are_no_events(run):
    (run / "events.jsonl").unlink()
    lines = [{"step": step, "gradient_spikes": spikes, "skipped_steps": 0, "grad_norm": 2.0} for step, spikes in
             ((5, 0), (10, 2), (15, 2), (20, 3))]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "gradient_spikes": 3, "skipped_steps": 0, "rollbacks": 1}\n')
    folder = read_folder(run)
    assert [(mark.kind, mark.step) for mark in marks(folder)] == [("spike", 10), ("spike", 20), ("rollback", 25)]
    assert count_marks(folder) == {"spike": 3, "skipped": 0, "divergence": 0, "rollback": 1}


def test_bounds_are_the_loss_of_alike_and_of_orthogonal_keys(run):
    folder = read_folder(run)
    batch, temperature = folder.global_batch_size, folder.temperature
    alike, orthogonal = torch.ones(batch, 8, dtype=torch.float64), torch.eye(batch, dtype=torch.float64)
    chance = 2 * contrastive_loss(alike, alike, temperature).loss
    floor = 2 * contrastive_loss(orthogonal, orthogonal, temperature).loss
    assert loss_bounds(folder) == pytest.approx((chance.item(), floor.item()), rel=1e-12)


def test_bounds_are_drawn_at_their_height(run, drawn):
    folder = read_folder(run)
    kept, abandoned = split_abandoned(folder.metrics)
    (axes,) = drawn(training.loss_chart, folder, kept, abandoned, marks(folder))
    flat = sorted(
        line.get_ydata()[0] for line in axes.lines if len(set(line.get_ydata())) == 1 and len(line.get_ydata()) == 2
    )
    floor = 4 * 0.2 * math.log(math.exp(1 / 0.2) + 7) - 4
    assert flat == pytest.approx([floor, 4 * 0.2 * math.log(8)])
    curve = max(axes.lines, key=lambda line: len(line.get_xdata()))
    assert curve.get_xdata().tolist() == [5, 10, 15, 20, 25, 30, 35, 40]
    assert curve.get_ydata() == pytest.approx([1.6 - 0.02 * step for step in range(5, 41, 5)])
    low, high = axes.get_ylim()
    assert low < floor
    assert high > 4 * 0.2 * math.log(8)


def test_divergence_is_marked_on_the_loss(run, drawn):
    with (run / "events.jsonl").open("a") as file:
        file.write('{"step": 33, "event": "divergence", "loss_normalized": 0.1}\n')
    folder = read_folder(run)
    kept, abandoned = split_abandoned(folder.metrics)
    (axes,) = drawn(training.loss_chart, folder, kept, abandoned, marks(folder))
    assert [33, 33] in [list(line.get_xdata()) for line in axes.lines]
    assert count_marks(folder)["divergence"] == 1


def test_spikes_skipped_steps_and_rollbacks_are_marked(run, drawn):
    folder = read_folder(run)
    kept, abandoned = split_abandoned(folder.metrics)
    (axes,) = drawn(training.gradient_chart, kept, abandoned, marks(folder))
    by_label = {line.get_label(): line for line in axes.lines}
    assert (by_label["spike"].get_xdata(), by_label["spike"].get_ydata()) == ([17], [25.0])
    assert list(by_label["skipped step"].get_xdata()) == [19]
    (span,) = axes.patches
    corners = axes.transData.inverted().transform(span.get_window_extent().get_points())
    assert corners[:, 0].tolist() == pytest.approx([20, 27])


def test_block_norms_fill_gaps_with_nan():
    lines = [
        {"step": 1, "block_grad_norms": {"a": 1.0, "b": 2.0}},
        {"step": 2},
        {"step": 3, "block_grad_norms": {"b": 4.0, "c": None}},
    ]
    steps, names, norms = block_norms(lines)
    assert steps.tolist() == [1, 3]
    assert names == ["a", "b", "c"]
    np.testing.assert_array_equal(norms, [[1, math.nan], [2, 4], [math.nan, math.nan]])
    assert block_norms([{"step": 1}]) is None


def test_heat_map_shows_the_logarithm_in_the_cell_of_its_block_and_step(run, drawn):
    kept, abandoned = split_abandoned(read_folder(run).metrics)
    now, before, _ = drawn(training.blocks_chart, kept, abandoned)
    (mesh,) = now.collections
    assert mesh.get_array().shape == (4, 8)
    np.testing.assert_allclose(mesh.get_array()[:, 3], np.log10([0.1, 0.2, 1.0, 2.0]))
    assert [label.get_text() for label in now.get_yticklabels()] == [
        "embeddings",
        "encoder.layer.0",
        "projector",
        "predictor",
    ]
    assert before.get_title() == "thrown away by a rollback"
    assert before.collections[0].get_array().shape == (4, 1)


def test_edges_lie_half_way():
    assert edges([10, 20, 40]).tolist() == [5, 15, 30, 50]
    assert edges([3]).tolist() == [2.5, 3.5]
