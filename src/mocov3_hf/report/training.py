"""The section about training: learning curves of a pre-training run or a classifier."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator

from ..run_folder import METRICS, RECIPE, RunFolder
from .charts import CLASSIFIER_CHARTS, GRADIENTS, KNN, LOSS, NORMALIZED_LOSS, PRETRAINING_CHARTS, LineChart
from .curves import Curves, Lines, Series, chances, loss_bounds, number, read_curves, series
from .parts import (
    BAD,
    CHART_SIZE,
    MUTED,
    SERIES,
    Chart,
    Charts,
    Hover,
    Section,
    Text,
    attempt,
    finish_chart,
    new_figure,
    quoted,
    shorten,
)


LABEL_UNIT = "offset points"
MOST_BLOCKS, MOST_HOVERS = 200, 60
Runs = dict[str, tuple[RunFolder, Curves]]  # by the name that charts show


@dataclass(frozen=True)
class Line:
    """One line of a chart: a metric of a run."""

    label: str
    key: str
    values: Series
    curves: Curves
    color: str
    style: str = "-"


def training_section(folder: RunFolder, plots: Path) -> Section:
    """Charts of all metrics that were logged, and the command for those that were not."""
    is_classifier, notes = folder.kind == "classifier", folder.notes
    curves = attempt(notes, "the training curves", lambda: read_curves(folder), Curves([], [], [], {}))
    charts = draw_charts({folder.path.name: (folder, curves)}, plots, notes)
    blocks = attempt(notes, "the chart 'Gradient norm by block'", lambda: draw_blocks(curves, plots), None)
    charts += [blocks] if blocks is not None else []
    pretrain = "mocov3 pretrain DATA --recipe quickstart --output_dir DIR"
    if folder.recipe:
        pretrain = f"mocov3 pretrain --recipe {quoted(folder.path / RECIPE)} --output_dir DIR"
    if not charts:
        command = "mocov3 finetune --model MODEL --dataset_name DATA --output_dir DIR" if is_classifier else pretrain
        text = f"No training metrics found ({METRICS}). Training logs them:"
        return Section("training", "Training", [Text(text, command)])
    parts: list = [Charts(charts)]
    if folder.kind == "pretraining" and not folder.knn:
        text = "kNN accuracy was not measured during training. --knn_steps enables it:"
        parts.append(Text(text, f"{pretrain} --knn_steps 500"))
    return Section("training", "Training", parts)


def draw_charts(runs: Runs, plots: Path, notes: list[str]) -> list[Chart]:
    """The charts of the first run's kind, each with the lines of all runs."""
    kinds = [folder.kind for folder, _ in runs.values()]
    specs = CLASSIFIER_CHARTS if kinds[0] == "classifier" else PRETRAINING_CHARTS
    if len({loss_bounds(folder) for folder, _ in runs.values()}) > 1:
        specs = tuple(NORMALIZED_LOSS if spec is LOSS else spec for spec in specs)
    drawn = [
        attempt(notes, f"the chart {spec.title!r}", partial(draw_chart, spec, runs, plots), None) for spec in specs
    ]
    return [chart for chart in drawn if chart is not None]


def draw_chart(spec: LineChart, runs: Runs, plots: Path) -> Chart | None:
    """None if no metric of the chart was logged."""
    panels = [(next(iter(labels)), lines) for labels in spec.panels if (lines := lines_of(spec, labels, runs))]
    if not panels:
        return None
    folder, curves = next(iter(runs.values()))
    is_comparison = len(runs) > 1
    figure = new_figure()
    hovers: list[Hover] = []
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, lines) in zip(rows, panels, strict=True):
        axes.grid(axis="y")
        for line in lines:
            if not is_comparison:
                draw_line(axes, series(line.curves.discarded, line.key), MUTED, linestyle=(0, (2, 2)))
            draw_line(axes, line.values, line.color, label=line.label, linestyle=line.style)
        if len(lines) > 1 and (axes is rows[0] or not is_comparison):
            axes.legend()
        if len(panels) > 1:
            axes.set_ylabel(label)
        largest = max(line.values.known.values.max() for line in lines)
        if spec.percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
            largest = max(largest, draw_chance(axes, lines, runs))
        if spec.log and all((line.values.known.values > 0).all() for line in lines):
            use_log_scale(axes)
        if spec.from_zero or spec.percent:  # an axis cut close to the values makes noise look like progress
            axes.set_ylim(0, min(1.1 * max(1e-12, largest), 1.02 if spec.percent else math.inf))
        if not is_comparison:
            shade_rollbacks(axes, curves, label=axes is rows[0])
    rows[-1].set_xlabel("step")
    figure.align_ylabels()
    alt = [describe(line.label, line.values, spec.percent) for _, lines in panels for line in lines]
    caption = spec.caption
    if is_comparison:
        caption = caption.partition("Healthy:")[0].strip()
    elif spec is LOSS:
        caption += annotate_loss(rows[0], folder, curves)
    elif spec is GRADIENTS:
        annotate_gradients(rows[0], curves)
        alt.append("Marked: {spike} spikes, {skipped} skipped steps, {rollback} rollbacks.".format(**curves.counts))
    elif spec is KNN:
        caption += describe_knn(folder, curves)
    for axes, (_, lines) in zip(rows, panels, strict=True):
        hovers += hovers_of(axes, lines, spec.percent)
    return finish_chart(figure, spec.name, plots, title=spec.title, caption=caption, alt=" ".join(alt), hovers=hovers)


def lines_of(spec: LineChart, labels: dict[str, str], runs: Runs) -> list[Line]:
    """The lines of one panel: by color the metrics of one run, or several runs, with their second metric dashed."""
    colors = [key for panel in spec.panels for key in panel.values()]
    found = []
    for position, (run, (_, curves)) in enumerate(runs.items()):
        for index, (label, key) in enumerate(labels.items()):
            values, color, style = series(curves.kept, key), SERIES[colors.index(key)], "-"
            if len(runs) > 1:
                label = shorten(run) if len(labels) == 1 else f"{shorten(run)}: {label}"
                color, style = SERIES[position % len(SERIES)], ("-", "--")[index % 2]
            if len(values.known):
                found.append(Line(label, key, values, curves, color, style))
    return found


def draw_chance(axes: Axes, lines: list[Line], runs: Runs) -> float:
    """Mark the accuracy at chance, if it is the same for all lines; returns it, 0 if unknown."""
    found = {chances(folder, curves.kept).get(line.key) for folder, curves in runs.values() for line in lines}
    chance = found.pop() if len(found) == 1 else None
    if chance is None:
        return 0.0
    axes.axhline(chance, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    place = {"xycoords": ("axes fraction", "data"), "textcoords": LABEL_UNIT, "ha": "right"}
    axes.annotate(f"chance {100 * chance:.3g} %", (1, chance), (-2, 3), **place)
    return chance


def describe_knn(folder: RunFolder, curves: Curves) -> str:
    """Protocol of the kNN accuracy in the chart."""
    recipe, images = folder.recipe, series(curves.kept, "knn_test_images").known.values
    words = {name: shorten(str(recipe.get(f"knn_{name}"))) for name in ("k", "train_split", "test_split")}
    count = f" ({images[-1]:,.0f} images)" if len(images) else ""
    return (
        f" k = {words['k']}; split {words['test_split']}{count}, neighbors from split {words['train_split']}."
        " Chance: the share of the most frequent class."
    )


def hovers_of(axes: Axes, lines: list[Line], percent: bool) -> list[Hover]:
    """The values of all lines of a panel at up to `MOST_HOVERS` steps."""
    known = [line.values.known for line in lines]
    steps = np.unique(np.concatenate([values.steps for values in known]))
    steps = steps[np.unique(np.linspace(0, len(steps) - 1, MOST_HOVERS).round().astype(int))]
    begin, end = axes.get_xlim()
    edges = [begin, *(steps[1:] + steps[:-1]) / 2, end]
    hovers = []
    for step, low, high in zip(steps, edges, edges[1:], strict=False):
        texts, dots = [f"step {step:,.0f}"], []
        for line, values in zip(lines, known, strict=True):
            nearest = np.abs(values.steps - step).argmin()
            if low <= values.steps[nearest] <= high:
                value = values.values[nearest]
                texts.append(f"{line.label}: {f'{100 * value:.2f} %' if percent else f'{value:.4g}'}")
                dots.append((values.steps[nearest], value, line.color))
        hovers.append(Hover(axes, (low, 0), (high, 1), "\n".join(texts), tuple(dots), is_band=True))
    return hovers


def annotate_loss(axes: Axes, folder: RunFolder, curves: Curves) -> str:
    """Mark divergences and the bounds of the loss; returns what to add to the caption."""
    for event in curves.events:
        if event.kind == "divergence":
            axes.axvline(event.step, color=BAD, linewidth=1)
            axes.annotate("divergence", (event.step, 0.5), (4, 3), ("data", "axes fraction"), LABEL_UNIT, color=BAD)
    bounds = loss_bounds(folder)
    if bounds is None:
        return " Chance and floor are not shown: the global batch size or the temperature is unknown."
    for value, name, height in zip(bounds, ("chance", "floor"), (-10, 3), strict=True):
        axes.axhline(value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        place = {"xycoords": ("axes fraction", "data"), "textcoords": LABEL_UNIT, "ha": "right"}
        axes.annotate(f"{name} {value:.2f}", (1, value), (-2, height), **place)
    return " Chance: all keys equally similar. Floor: aligned positives, orthogonal negatives."


def annotate_gradients(axes: Axes, curves: Curves) -> None:
    """Mark spikes and skipped steps."""
    options = {"linestyle": "none", "markersize": 6, "color": BAD}
    spikes = [event for event in curves.events if event.kind == "spike"]
    if spikes:
        steps, norms = [event.step for event in spikes], [event.grad_norm for event in spikes]
        axes.plot(steps, norms, marker="v", label="spike", **options)
    skipped = [event.step for event in curves.events if event.kind == "skipped"]
    if skipped:
        heights, transform = np.full(len(skipped), 0.03), axes.get_xaxis_transform()
        axes.plot(skipped, heights, marker="x", label="skipped step", transform=transform, **options)
    if spikes or skipped:
        axes.legend(loc="upper right")


def draw_blocks(curves: Curves, plots: Path) -> Chart | None:
    """Heat map of the gradient norm by block and step, next to that of the discarded steps."""
    key = "block_grad_norms"
    panels = {"": curves.kept, "discarded by a rollback": curves.discarded}
    panels = {title: [line for line in lines if isinstance(line.get(key), dict)] for title, lines in panels.items()}
    names = list(dict.fromkeys(name for lines in panels.values() for line in lines for name in line[key]))
    if len(names) > MOST_BLOCKS:
        raise ValueError(f"{len(names):,} blocks are too many to draw")
    norms = {title: block_norms(lines, names) for title, lines in panels.items() if lines}
    known = [values[np.isfinite(values)] for values in norms.values()]
    known = np.concatenate(known) if known else np.empty(0)
    if not len(known):
        return None
    figure = new_figure((CHART_SIZE[0], 1.3 + 0.17 * len(names)))
    widths = [max(values.shape[1], 4) for values in norms.values()]
    row = figure.subplots(1, len(norms), squeeze=False, sharey=True, width_ratios=widths)[0]
    for axes, (title, values) in zip(row, norms.items(), strict=True):
        steps = np.array([line["step"] for line in panels[title]], dtype=np.float64)
        first = 2 * steps[0] - steps[1] if len(steps) > 1 else steps[0] - 1
        # A cell spans the steps since the previous line.
        edges = (np.concatenate([[first], steps]), np.arange(len(names) + 1))
        mesh = axes.pcolormesh(*edges, values, vmin=known.min(), vmax=known.max(), rasterized=True)
        axes.set_xlabel("step")
        axes.set_title(title, color=BAD)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    row[0].set_yticks(np.arange(len(names)) + 0.5, names, fontsize=7)
    row[0].invert_yaxis()
    bar = figure.colorbar(mesh, ax=row, pad=0.02, aspect=30, label="log₁₀ of the norm")
    bar.outline.set_visible(False)
    return finish_chart(
        figure,
        "blocks",
        plots,
        title="Gradient norm by block",
        caption="From the input (top) to the loss (bottom); brighter is larger. Healthy: rows keep their order and"
        " change slowly. A bright column is a spike: look for the row where it began.",
        alt=f"Heat map of the gradient norms of {len(names)} blocks over {len(panels[''])} log lines.",
    )


def block_norms(lines: Lines, names: list[str]) -> np.ndarray:
    """log10 of the gradient norms (blocks, lines), NaN where unknown or 0."""
    norms = np.array([[number(line["block_grad_norms"].get(name)) for line in lines] for name in names])
    return np.log10(np.where(norms > 0, norms, np.nan))


def draw_line(axes: Axes, values: Series, color: str, **options) -> None:
    """Few points are marked, so that a single one is visible too."""
    axes.plot(values.steps, values.values, color=color, marker="o" if len(values.known) < 20 else None, **options)


def use_log_scale(axes: Axes) -> None:
    """A logarithmic scale with plain numbers, also for ranges of less than a decade."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter("{x:g}")


def shade_rollbacks(axes: Axes, curves: Curves, label: bool) -> None:
    for event in curves.events:
        if event.kind == "rollback":
            begin = event.step if np.isnan(event.to_step) else event.to_step
            axes.axvspan(begin, event.step, color=BAD, alpha=0.12, linewidth=0)
            if label:
                place = {"xycoords": ("data", "axes fraction"), "textcoords": LABEL_UNIT, "va": "top"}
                axes.annotate("rollback", (begin, 0.98), (4, 3), **place, color=BAD)


def describe(name: str, values: Series, percent: bool = False) -> str:
    """A line in words."""
    known = values.known
    first, last = (f"{100 * value:.1f} %" if percent else f"{value:.4g}" for value in known.values[[0, -1]])
    return f"{name}: {first} at step {known.steps[0]:.0f}, {last} at step {known.steps[-1]:.0f}."
