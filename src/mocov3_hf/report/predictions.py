"""The section about the predictions of a classifier on a test split, from what its evaluation recorded."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ..run_folder import RunFolder
from .curves import number
from .measured import Measured, describe_protocol
from .parts import (
    BAD,
    MUTED,
    SERIES,
    Chart,
    Charts,
    Hover,
    Section,
    Text,
    attempt,
    finish_chart,
    mapping,
    new_figure,
    percent,
    shorten,
)


SQUARE = (4.0, 3.6)
# Classes in the chart of average precision: the worst and the best; targets with a chart of their own.
MOST_BARS, MOST_TARGETS = 30, 6


def predictions_section(folder: RunFolder, measured: list[Measured], plots: Path) -> Section | None:
    """Charts of the newest evaluation of today's weights that recorded its predictions; None without one."""
    results = [each.result for each in measured if each.is_current and mapping(each.result.get("plots"))]
    if not results:
        return None
    result = max(results, key=lambda each: str(each.get("date", "")))
    values = mapping(result["plots"])
    build: dict[str, Callable[[Any, Path], list[Chart]]] = {
        "reliability": draw_reliability,
        "selective_accuracy": draw_selective_accuracy,
        "average_precision": draw_average_precision,
        "scatter": draw_scatter,
    }
    charts: list[Chart] = []
    for name, draw in build.items():
        if name in values:
            charts += attempt(folder.notes, f"the chart {name!r}", partial(draw, values[name], plots), [])
    if not charts:
        return None
    return Section("predictions", "Predictions", [Text(f"{shorten(describe_protocol(result), 300)}."), Charts(charts)])


def draw_reliability(bins: Any, plots: Path) -> list[Chart]:
    """Accuracy in bins of confidence."""
    counts = finite(bins["count"])
    used = counts > 0
    confidence, accuracy = (
        finite([0 if count == 0 else value for count, value in zip(counts, bins[name], strict=True)])
        for name in ("confidence", "accuracy")
    )
    error = float(np.sum(counts[used] * np.abs(confidence - accuracy)[used]) / counts.sum())
    edges = np.linspace(0, 1, len(counts) + 1)
    figure = new_figure(SQUARE)
    axes = figure.subplots()
    percent_axes(axes, "confidence", "accuracy")
    axes.bar(edges[:-1][used], accuracy[used], 1 / len(counts), align="edge", color=SERIES[0], alpha=0.7, linewidth=0)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.plot(confidence[used], accuracy[used], color=SERIES[1], marker="o", linestyle="none")
    hovers = []
    for index in np.flatnonzero(used):
        text = f"confidence {percent(confidence[index])}, accuracy {percent(accuracy[index])}"
        hovers.append(Hover(axes, (edges[index], 0), (edges[index + 1], 1), f"{text}\n{counts[index]:,.0f} images"))
    return [
        finish_chart(
            figure,
            "reliability",
            plots,
            title="Calibration",
            caption=f"Accuracy of predictions by their confidence, the largest probability. Expected calibration error"
            f" (ECE): {percent(error)}. Healthy: points on the diagonal. Below it the model is overconfident, which"
            " longer training increases and label smoothing or Mixup reduce; above it, underconfident.",
            alt=f"Reliability diagram; expected calibration error {percent(error)}.",
            hovers=hovers,
        )
    ]


def draw_selective_accuracy(curve: Any, plots: Path) -> list[Chart]:
    """Accuracy of the most confident predictions over their share."""
    coverage, accuracy = (finite(curve[name]) for name in ("coverage", "accuracy"))
    figure = new_figure(SQUARE)
    axes = figure.subplots()
    percent_axes(axes, "coverage", "accuracy")
    axes.plot(coverage, accuracy, color=SERIES[0], marker="o" if len(coverage) < 20 else None)
    half = accuracy[np.searchsorted(coverage, 0.5)]
    return [
        finish_chart(
            figure,
            "selective-accuracy",
            plots,
            title="Selective accuracy",
            caption=f"Accuracy if only the most confident predictions are kept: {percent(accuracy[-1])} of all images,"
            f" {percent(half)} of the most confident half. Healthy: rises steadily towards the left, so that the"
            " images to check by hand are those of low confidence.",
            alt=f"Accuracy over coverage: {percent(half)} at half, {percent(accuracy[-1])} at full coverage.",
            hovers=[
                Hover(axes, (low, 0), (high, 1), f"coverage {percent(high)}\naccuracy {percent(value)}")
                for low, high, value in zip([0, *coverage[:-1]], coverage, accuracy, strict=True)
            ],
        )
    ]


def draw_average_precision(rows: Any, plots: Path) -> list[Chart]:
    """Bars of the average precision of the classes, the best first; of many, the best and the worst."""
    names, *columns = zip(*rows, strict=True)
    rows = sorted(zip(map(str, names), *map(finite, columns), strict=True), key=lambda row: -row[1])
    mean = float(np.mean([value for _, value, _ in rows]))
    shown = rows
    if len(rows) > MOST_BARS:
        shown = rows[: MOST_BARS // 2] + rows[-MOST_BARS // 2 :]
    figure = new_figure((4.4, 1.2 + 0.19 * len(shown)))
    axes = figure.subplots()
    axes.grid(axis="x")
    places = np.arange(len(shown))
    axes.barh(places, [value for _, value, _ in shown], 0.75, color=SERIES[0], alpha=0.8, linewidth=0)
    axes.axvline(mean, color=SERIES[1], linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yticks(places, [shorten(name) for name, _, _ in shown], fontsize=8)
    axes.set(xlim=(0, 1.02), ylim=(len(shown) - 0.4, -0.6), xlabel="average precision")
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.tick_params(axis="y", length=0)
    if len(shown) < len(rows):
        axes.axhline(len(shown) / 2 - 0.5, color=MUTED, linewidth=0.8)
    some = f" The {MOST_BARS // 2} best and the {MOST_BARS // 2} worst of {len(rows)} classes." * (
        len(shown) < len(rows)
    )
    return [
        finish_chart(
            figure,
            "average-precision",
            plots,
            title="Average precision",
            caption=f"Average precision of each class; dashed, their mean (mAP), {percent(mean)}.{some} Chance is the"
            " share of the images with the class. With few images of a class, its value is noisy.",
            alt=f"Bars of the average precision of {len(shown)} classes, from {percent(shown[0][1])} to"
            f" {percent(shown[-1][1])}; mean {percent(mean)}.",
            hovers=[
                Hover(axes, (0, place - 0.5), (1, place + 0.5), f"{name}: {percent(value)}, {count:,.0f} images")
                for place, (name, value, count) in zip(places, shown, strict=True)
            ],
        )
    ]


def draw_scatter(values: Any, plots: Path) -> list[Chart]:
    """Predicted against true values, a chart for each target."""
    charts = []
    columns = list(zip(values["names"], values["true"], values["predicted"], strict=True))
    for index, (name, *sides) in enumerate(columns[:MOST_TARGETS]):
        true, predicted = map(finite, sides)
        low, high = min(true.min(), predicted.min()), max(true.max(), predicted.max())
        margin = 0.03 * (high - low) or 1.0
        figure = new_figure(SQUARE)
        axes = figure.subplots()
        axes.grid()
        axes.plot([low, high], [low, high], color=BAD, linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(true, predicted, color=SERIES[0], marker="o", markersize=3, alpha=0.6, linestyle="none")
        limits = (low - margin, high + margin)
        axes.set(xlim=limits, ylim=limits, xlabel="true", ylabel="predicted")
        axes.locator_params(nbins=5)
        axes.ticklabel_format(scilimits=(-2, 5))
        correlation = np.corrcoef(true, predicted)[0, 1] if len(true) > 1 and true.std() and predicted.std() else 0.0
        of = f"; the first {MOST_TARGETS} of {len(columns)} targets" if len(columns) > MOST_TARGETS else ""
        charts.append(
            finish_chart(
                figure,
                f"scatter-{index}",
                plots,
                title=f"Predicted against true: {shorten(str(name), 40)}",
                caption=f"{shorten(str(name), 40)}, {len(true):,} test images{of}. Healthy: points along the diagonal."
                " A cloud that is flatter than the diagonal means predictions near the mean; single points far away"
                " are worth a look.",
                alt=f"Scatter plot of predicted against true values, {low:.4g} to {high:.4g}; correlation"
                f" {correlation:.2f}.",
            )
        )
    return charts


def finite(values: Any) -> np.ndarray:
    """Numbers of a file, (n,), n ≥ 1; ValueError for anything else."""
    found = np.array([number(value) for value in values])
    if found.size == 0 or not np.isfinite(found).all():
        raise ValueError("it holds values that are not numbers")
    return found


def percent_axes(axes: Axes, xlabel: str, ylabel: str) -> None:
    """Both axes from 0 to 100 %."""
    axes.grid()
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel=xlabel, ylabel=ylabel)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
