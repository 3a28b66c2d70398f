"""Series, rollbacks and events against what was logged, and the bounds of the loss against the loss itself."""

import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from mocov3_hf.model.loss_mocov3 import contrastive_loss
from mocov3_hf.report import training
from mocov3_hf.report.curves import loss_bounds, read_curves, series, split_discarded
from mocov3_hf.run_folder import read_run_folder


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Axes of the charts of a run, by name of the chart."""

    def draw(folder):
        figures = {}
        monkeypatch.setattr(training, "finish_chart", lambda figure, name, *_, **__: figures.update({name: figure}))
        training.training_section(folder, tmp_path)
        return {name: figure.axes for name, figure in figures.items()}

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
    assert found.known.steps.tolist() == [1, 5]
    assert found.known.values.tolist() == [1, 2]


def test_lines_discarded_by_rollbacks():
    lines = [{"step": step, "run": 0} for step in (5, 10, 15, 20)]
    lines += [{"step": step, "run": 1} for step in (10, 15)] + [{"step": step, "run": 2} for step in (15, 20, 25)]
    kept, discarded = split_discarded(lines)
    assert [(line["step"], line["run"]) for line in kept] == [(5, 0), (10, 1), (15, 2), (20, 2), (25, 2)]
    assert [(line["step"], line["run"]) for line in discarded] == [(10, 0), (15, 0), (15, 1), (20, 0)]


def test_evaluation_at_the_same_step_discards_nothing():
    lines = [{"step": 10, "loss": 1.0}, {"step": 10, "eval_top1": 0.5}, {"step": 20, "loss": 0.5}]
    assert split_discarded(lines) == (lines, [])


def test_logged_events(run):
    curves = read_curves(read_run_folder(run))
    assert [(event.kind, event.step) for event in curves.events] == [("spike", 17), ("skipped", 19), ("rollback", 27)]
    assert [event.grad_norm for event in curves.events] == pytest.approx([25.0, math.nan, math.nan], nan_ok=True)
    assert [event.to_step for event in curves.events] == pytest.approx([math.nan, math.nan, 20], nan_ok=True)
    assert curves.counts == {"spike": 1, "skipped": 1, "divergence": 0, "rollback": 1}


def test_events_from_counters_without_a_log_of_events(run):
    (run / "events.jsonl").unlink()
    lines = [{"step": step, "gradient_spikes": spikes, "skipped_steps": 0, "grad_norm": 2.0} for step, spikes in
             ((5, 0), (10, 2), (15, 2), (20, 3))]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "gradient_spikes": 3, "skipped_steps": 0, "rollbacks": 1}\n')
    curves = read_curves(read_run_folder(run))
    assert [(event.kind, event.step) for event in curves.events] == [("spike", 10), ("spike", 20), ("rollback", 25)]
    assert curves.counts == {"spike": 3, "skipped": 0, "divergence": 0, "rollback": 1}


def test_bounds_are_the_loss_of_equal_and_of_orthogonal_keys(run):
    folder = read_run_folder(run)
    batch, temperature = folder.global_batch_size, folder.temperature
    alike, orthogonal = torch.ones(batch, 8, dtype=torch.float64), torch.eye(batch, dtype=torch.float64)
    chance = 2 * contrastive_loss(alike, alike, temperature).loss
    floor = 2 * contrastive_loss(orthogonal, orthogonal, temperature).loss
    assert loss_bounds(folder) == pytest.approx((chance.item(), floor.item()), rel=1e-12)


def test_bounds_are_drawn_at_their_height(run, drawn):
    (axes,) = drawn(read_run_folder(run))["loss"]
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


def test_the_axis_of_an_accuracy_begins_at_zero_and_has_the_chance_line(run, drawn):
    (axes,) = drawn(read_run_folder(run))["knn"]
    low, high = axes.get_ylim()
    assert low == 0
    assert 0.8 < high <= 1.02
    assert [1 / 3, 1 / 3] in [list(line.get_ydata()) for line in axes.lines]
    assert "chance 33.3 %" in [text.get_text() for text in axes.texts]
    (positives,) = drawn(read_run_folder(run))["positives"]
    assert [1 / 8, 1 / 8] in [list(line.get_ydata()) for line in positives.lines]


def test_hovers_show_the_values_at_their_step(run, tmp_path):
    folder = read_run_folder(run)
    runs = {"run": (folder, read_curves(folder))}
    chart = training.draw_chart(training.LOSS, runs, tmp_path)
    svg = ElementTree.fromstring(str(chart.svg))
    (group,) = [element for element in svg.iter() if element.get("class") == "hover"]
    titles = [element.find("{*}title").text for element in group]
    assert titles == [f"step {step}\nloss: {1.6 - 0.02 * step:.4g}" for step in range(5, 41, 5)]
    boxes = [element.find("{*}rect").attrib for element in group]
    spots = [element.find("{*}circle").attrib for element in group]
    for box, spot in zip(boxes, spots, strict=True):
        assert float(box["x"]) <= float(spot["cx"]) <= float(box["x"]) + float(box["width"])
        assert float(box["y"]) <= float(spot["cy"]) <= float(box["y"]) + float(box["height"])
    heights = [float(spot["cy"]) for spot in spots]
    assert heights == sorted(heights)  # the loss falls, and y points down
    # The circle lies on the line that matplotlib drew.
    marks = [element for element in svg.iter() if element.tag.endswith("use") and element.get("style")]
    drawn_at = [(float(mark.get("x")), float(mark.get("y"))) for mark in marks if "--chart-0" in mark.get("style")]
    for spot in spots:
        assert min(abs(x - float(spot["cx"])) + abs(y - float(spot["cy"])) for x, y in drawn_at) < 0.2


def test_divergence_is_marked_on_the_loss(run, drawn):
    with (run / "events.jsonl").open("a") as file:
        file.write('{"step": 33, "event": "divergence", "loss_normalized": 0.1}\n')
    folder = read_run_folder(run)
    (axes,) = drawn(folder)["loss"]
    assert [33, 33] in [list(line.get_xdata()) for line in axes.lines]
    assert read_curves(folder).counts["divergence"] == 1


def test_spikes_skipped_steps_and_rollbacks_are_marked(run, drawn):
    (axes,) = drawn(read_run_folder(run))["gradients"]
    by_label = {line.get_label(): line for line in axes.lines}
    assert (by_label["spike"].get_xdata(), by_label["spike"].get_ydata()) == ([17], [25.0])
    assert list(by_label["skipped step"].get_xdata()) == [19]
    (span,) = axes.patches
    discarded = next(line for line in axes.lines if line.get_linestyle() == "--")
    assert (discarded.get_xdata().tolist(), discarded.get_ydata().tolist()) == ([25], [30.0])
    corners = axes.transData.inverted().transform(span.get_window_extent().get_points())
    assert corners[:, 0].tolist() == pytest.approx([20, 27])


def test_block_norms_are_logarithms_with_gaps():
    lines = [
        {"step": 1, "block_grad_norms": {"a": 1.0, "b": 100.0}},
        {"step": 3, "block_grad_norms": {"b": 0.1, "c": None, "a": 0}},
    ]
    norms = training.block_norms(lines, ["a", "b", "c"])
    np.testing.assert_allclose(norms, [[0, math.nan], [2, -1], [math.nan, math.nan]])


def test_heat_map_shows_the_logarithm_in_the_cell_of_its_block_and_step(run, drawn):
    now, before, _ = drawn(read_run_folder(run))["blocks"]
    (mesh,) = now.collections
    assert mesh.get_array().shape == (4, 8)
    np.testing.assert_allclose(mesh.get_array()[:, 3], np.log10([0.1, 0.2, 1.0, 2.0]))
    # A cell spans the steps since the previous line.
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    names = ["embeddings", "encoder.layer.0", "projector", "predictor"]
    assert [label.get_text() for label in now.get_yticklabels()] == names
    assert before.get_title() == "discarded by a rollback"
    assert before.collections[0].get_array().shape == (4, 1)


def test_charts_without_data_are_left_out(run, drawn):
    (run / "metrics.jsonl").write_text('{"step": 5, "loss": 1.0}\n{"step": 10, "loss": 0.9, "grad_norm": null}\n')
    (run / "knn.jsonl").unlink()
    assert drawn(read_run_folder(run)).keys() == {"loss"}
