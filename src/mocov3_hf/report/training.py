"""The section about training: learning curves of a pre-training run or a classifier."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator

from ..run_folder import METRICS, RECIPE, RunFolder
from .curves import Curves, Lines, Series, loss_bounds, number, read_curves, series
from .parts import BAD, MUTED, SERIES, Chart, Charts, Section, Text, attempt, finish_chart, new_figure
from .summary import quoted


LABEL_UNIT = "offset points"
MOST_BLOCKS = 200


@dataclass(frozen=True)
class LineChart:
    """
    Metrics over steps. Discarded lines are dashed, and the steps that they cover are shaded.

    Attributes:
        name, title, caption: as in `Chart`.
        panels: for each panel, one above the other, the labels of its lines and their keys in the logs.
        percent, log, from_zero: format and range of the y axes.
    """

    name: str
    title: str
    caption: str
    panels: tuple[dict[str, str], ...]
    percent: bool = False
    log: bool = False
    from_zero: bool = False


LOSS = LineChart(
    "loss",
    "Contrastive loss",
    "InfoNCE loss. Healthy: leaves chance during warmup, then falls steadily and slowly towards the floor.",
    ({"loss": "loss"},),
)
GRADIENTS = LineChart(
    "gradients",
    "Gradient norm",
    "L2 norm of all gradients, mean since the previous log line; spikes are single steps. Healthy: falls or stays"
    " within a factor of 2 of its usual value, without spikes (▼), skipped steps (×) or rollbacks (shaded).",
    ({"gradient norm": "grad_norm"},),
    log=True,
)
PRETRAINING_CHARTS = (
    LOSS,
    LineChart(
        "knn",
        "kNN accuracy",
        "Top-1 on labeled images during training. Healthy: rises throughout. A dip indicates instability (paper §4):"
        " it follows a spike in the gradient, and the run ends with lower accuracy.",
        ({"kNN top-1": "knn_top1"},),
        percent=True,
    ),
    LineChart(
        "positives",
        "Contrastive accuracy",
        "Share of queries whose positive is the most similar of all keys in the batch; chance is 1 in the global batch"
        " size. Healthy: rises as the loss falls.",
        ({"positive top-1": "positive_top1"},),
        percent=True,
    ),
    GRADIENTS,
    LineChart(
        "layers",
        "Largest gradient, first and last layer",
        "Largest gradient component since the previous log line. Healthy: level. In an unstable run the first layer"
        " spikes tens of steps before the last layer (paper §4.2, figure 4).",
        ({"first layer": "first_layer_grad_max", "last layer": "last_layer_grad_max"},),
        log=True,
    ),
    LineChart(
        "schedule",
        "Learning rate and EMA decay",
        "Healthy: linear warmup of the learning rate, then cosine decay; the EMA decay of the momentum encoder rises"
        " to 1 at the end. A step down that the recipe does not contain is a rollback with a lower learning rate.",
        ({"learning rate": "learning_rate"}, {"EMA decay": "ema_decay"}),
    ),
    LineChart(
        "collapse",
        "Spread and rank of the projections",
        "Spread: standard deviation of the L2-normalized projections times the square root of their dimension; 1 if"
        " uniform on the sphere, 0 if collapsed. Effective rank: number of directions in use. Healthy: spread near 1"
        " and rank well above 1. A fall towards 0 and 1 is collapse.",
        ({"spread": "projection_std_ratio"}, {"effective rank": "projection_effective_rank"}),
        from_zero=True,
    ),
    LineChart(
        "throughput",
        "Throughput and data-loading stall",
        "Stall: share of the time spent waiting for data. Healthy: constant throughput and a stall below 0.1. A larger"
        " stall means that decoding is the bottleneck: raise --dataloader_num_workers.",
        ({"images/s": "images_per_second"}, {"stall": "data_wait_fraction"}),
        from_zero=True,
    ),
)
CLASSIFIER_CHARTS = (
    LineChart(
        "loss",
        "Training loss",
        "Cross-entropy on augmented images. Healthy: falls fast, then slowly, without jumps. Mixup and label smoothing"
        " keep it well above 0.",
        ({"training loss": "loss"},),
    ),
    LineChart(
        "accuracy",
        "Test accuracy",
        "Top-1 after every epoch. Healthy: still rising slightly at the end of the schedule; a decline from the middle"
        " on is overfitting. The EMA of the weights usually leads until the end.",
        ({"weights": "eval_top1", "EMA of the weights": "eval_top1_ema"},),
        percent=True,
    ),
    LineChart(
        "gradients",
        "Gradient norm",
        "L2 norm of all gradients. Healthy: stays within a small factor of its usual value.",
        ({"gradient norm": "grad_norm"},),
        log=True,
    ),
    LineChart(
        "schedule",
        "Learning rate",
        "Healthy: the schedule of the recipe, ending near 0.",
        ({"learning rate": "learning_rate"},),
    ),
)


def training_section(folder: RunFolder, plots: Path) -> Section:
    """Charts of all metrics that were logged, and the command for those that were not."""
    is_classifier, notes = folder.kind == "classifier", folder.notes
    curves = attempt(notes, "the training curves", lambda: read_curves(folder), Curves([], [], [], {}))
    draw: dict[str, Callable[[], Chart | None]] = {
        spec.title: partial(draw_chart, spec, folder, curves, plots)
        for spec in (CLASSIFIER_CHARTS if is_classifier else PRETRAINING_CHARTS)
    }
    draw["Gradient norm by block"] = partial(draw_blocks, curves, plots)
    drawn = [attempt(notes, f"the chart {title!r}", build, None) for title, build in draw.items()]
    charts = [chart for chart in drawn if chart is not None]
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


def draw_chart(spec: LineChart, folder: RunFolder, curves: Curves, plots: Path) -> Chart | None:
    """None if no metric of the chart was logged."""
    panels = [{label: series(curves.kept, key) for label, key in panel.items()} for panel in spec.panels]
    panels = [{label: values for label, values in panel.items() if len(values.known)} for panel in panels]
    panels = [panel for panel in panels if panel]
    if not panels:
        return None
    keys = {label: key for panel in spec.panels for label, key in panel.items()}
    colors = iter(SERIES)
    figure = new_figure()
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(rows, panels, strict=True):
        axes.grid(axis="y")
        for label, values in panel.items():
            draw_line(axes, series(curves.discarded, keys[label]), MUTED, linestyle=(0, (2, 2)))
            draw_line(axes, values, next(colors), label=label)
        if len(panel) > 1:
            axes.legend()
        if len(panels) > 1:
            axes.set_ylabel(next(iter(panel)))
        if spec.percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        if spec.log and all((values.known.values > 0).all() for values in panel.values()):
            use_log_scale(axes)
        if spec.from_zero:
            axes.set_ylim(0, max(1e-12, 1.1 * max(values.known.values.max() for values in panel.values())))
        shade_rollbacks(axes, curves, label=axes is rows[0])
    rows[-1].set_xlabel("step")
    figure.align_ylabels()
    alt = [describe(label, values, spec.percent) for panel in panels for label, values in panel.items()]
    caption = spec.caption
    if spec is LOSS:
        caption += annotate_loss(rows[0], folder, curves)
    if spec is GRADIENTS:
        annotate_gradients(rows[0], curves)
        alt.append("Marked: {spike} spikes, {skipped} skipped steps, {rollback} rollbacks.".format(**curves.counts))
    return finish_chart(figure, spec.name, plots, title=spec.title, caption=caption, alt=" ".join(alt))


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
    figure = new_figure((7.0, 1.5 + 0.16 * len(names)))
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
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
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
