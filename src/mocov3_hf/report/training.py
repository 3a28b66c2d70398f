"""The curves of a run as charts."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from .charts import Chart, Palette, label_line, make_chart, plain
from .curves import Mark, Series, block_norms, edges, loss_bounds, marks, series, split_abandoned
from .folder import Lines, ModelFolder


def pretraining_charts(folder: ModelFolder, plots: Path) -> list[Chart]:
    """Charts of `metrics.jsonl` and `knn.jsonl`, those without data left out."""
    kept, abandoned = split_abandoned(folder.metrics)
    found = marks(folder)
    drawn = [
        loss_chart(folder, kept, abandoned, found, plots),
        knn_chart(folder, found, plots),
        positives_chart(folder, kept, found, plots),
        gradient_chart(kept, abandoned, found, plots),
        layers_chart(kept, found, plots),
        pair_chart(
            ("learning_rate", "learning rate"),
            ("momentum", "momentum"),
            kept,
            plots,
            name="schedule",
            title="Learning rate and momentum",
            caption="Healthy: the learning rate rises in a line through the warm-up and falls along a cosine; the"
            " momentum of the key encoder rises to 1 by the end. A step down that is not in the recipe is a rollback"
            " that lowered it.",
        ),
        pair_chart(
            ("projection_std_ratio", "spread"),
            ("projection_effective_rank", "effective rank"),
            kept,
            plots,
            name="collapse",
            title="Spread and rank of the projections",
            caption="Spread is the standard deviation of the normalised projections times √P: 1 when they lie evenly"
            " on the sphere, 0 when all images share one. Effective rank counts the directions in use. Healthy:"
            " the spread stays near 1 and the rank settles far above 1. A fall towards 0 and 1 is collapse.",
            zero=True,
        ),
        pair_chart(
            ("images_per_second", "images / s"),
            ("data_wait_fraction", "wait for data"),
            kept,
            plots,
            name="throughput",
            title="Throughput and wait for data",
            caption="Healthy: level after the first lines, with a wait below a tenth. A larger one means that decoding"
            " cannot keep up: more --dataloader_num_workers.",
            zero=True,
        ),
        blocks_chart(kept, abandoned, plots),
    ]
    return [chart for chart in drawn if chart is not None]


def classifier_charts(folder: ModelFolder, plots: Path) -> list[Chart]:
    """Charts of a classifier's training."""
    kept, abandoned = split_abandoned(folder.metrics)
    drawn = [
        simple_chart(
            {"training loss": series(kept, "loss")},
            plots,
            name="loss",
            title="Training loss",
            caption="Cross-entropy on augmented images. Healthy: falls fast, then slowly, and never jumps. Mixup and"
            " label smoothing keep it well above 0.",
            before=series(abandoned, "loss"),
        ),
        simple_chart(
            {"weights": series(kept, "eval_top1"), "their average": series(kept, "eval_top1_ema")},
            plots,
            name="accuracy",
            title="Accuracy on the test split",
            caption="Top-1 after every epoch. Healthy: still rising a little where the learning rate ends; a fall from"
            " the middle on is overfitting. The moving average of the weights leads until the end.",
            percent=True,
        ),
        simple_chart(
            {"gradient norm": series(kept, "grad_norm")},
            plots,
            name="gradients",
            title="Gradient norm",
            caption="L2 norm of all gradients. Healthy: within a factor of a few of its usual value.",
            log=True,
        ),
        simple_chart(
            {"learning rate": series(kept, "learning_rate")},
            plots,
            name="schedule",
            title="Learning rate",
            caption="Healthy: the schedule of the recipe, down to about 0 at the end.",
        ),
    ]
    return [chart for chart in drawn if chart is not None]


def loss_chart(folder: ModelFolder, kept: Lines, abandoned: Lines, found: list[Mark], plots: Path) -> Chart | None:
    loss, bounds = series(kept, "loss"), loss_bounds(folder)
    if not len(loss.known):
        return None

    def draw(figure: Figure, palette: Palette) -> None:
        axes = step_axes(figure, palette)
        draw_rollbacks(axes, palette, found)
        draw_line(axes, series(abandoned, "loss"), palette.muted, dashed=True)
        draw_line(axes, loss, palette.series[0])
        for mark in found:
            if mark.kind == "divergence":
                axes.axvline(mark.step, color=palette.bad, linewidth=1)
                label_line(axes, mark.step, 0.5, "divergence", palette.bad, xycoords=("data", "axes fraction"))
        for value, name in zip(bounds or (), ("chance", "floor"), strict=False):
            axes.axhline(value, color=palette.muted, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                f"{name} {value:.2f}",
                (1, value),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 3 if name == "floor" else -10),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color=palette.ink,
            )

    caption = "Healthy: leaves chance within the warm-up, then falls steadily and slowly towards the floor."
    if bounds:
        caption += " Chance: all keys equally similar. Floor: positives coincide and negatives are orthogonal."
    else:
        caption += " Chance and floor are not drawn: the folder tells no global batch or no temperature."
    return make_chart("loss", draw, plots, title="Contrastive loss", caption=caption, alt=describe("loss", loss))


def knn_chart(folder: ModelFolder, found: list[Mark], plots: Path) -> Chart | None:
    kept, abandoned = split_abandoned(folder.knn)
    return simple_chart(
        {"kNN": series(kept, "knn_top1")},
        plots,
        name="knn",
        title="Nearest neighbour accuracy",
        caption="Top-1 on labelled images while training. Healthy: rises all the way. A dip is what an unstable run"
        " looks like (paper §4): a spike of the gradient comes shortly before it, and the run ends lower.",
        percent=True,
        before=series(abandoned, "knn_top1"),
        rollbacks=found,
        dots=True,
    )


def positives_chart(folder: ModelFolder, kept: Lines, found: list[Mark], plots: Path) -> Chart | None:
    batch = folder.global_batch_size
    return simple_chart(
        {"positive top-1": series(kept, "positive_top1")},
        plots,
        name="positives",
        title="Positives found among the keys",
        caption="Share of the queries whose own image is the most similar of all keys of the batch"
        f"{f'; by chance 1 in {batch}' if batch else ''}. Healthy: rises with the fall of the loss.",
        percent=True,
        rollbacks=found,
    )


def gradient_chart(kept: Lines, abandoned: Lines, found: list[Mark], plots: Path) -> Chart | None:
    norms = series(kept, "grad_norm")
    if not len(norms.known):
        return None

    def draw(figure: Figure, palette: Palette) -> None:
        axes = step_axes(figure, palette)
        logarithmic(axes)
        draw_rollbacks(axes, palette, found)
        draw_line(axes, series(abandoned, "grad_norm"), palette.muted, dashed=True)
        draw_line(axes, norms, palette.series[0])
        spikes = [mark for mark in found if mark.kind == "spike" and mark.value is not None]
        if spikes:
            axes.plot(
                [mark.step for mark in spikes],
                [mark.value for mark in spikes],
                linestyle="none",
                marker="v",
                markersize=6,
                color=palette.bad,
                label="spike",
            )
        skipped = [mark.step for mark in found if mark.kind == "skipped"]
        if skipped:
            axes.plot(
                skipped,
                np.full(len(skipped), 0.03),
                transform=axes.get_xaxis_transform(),
                linestyle="none",
                marker="x",
                markersize=6,
                color=palette.bad,
                label="skipped step",
            )
        if spikes or skipped:
            axes.legend(frameon=False, fontsize=8, loc="upper right", labelcolor=palette.ink)

    counts = {kind: sum(mark.kind == kind for mark in found) for kind in ("spike", "skipped", "rollback")}
    return make_chart(
        "gradients",
        draw,
        plots,
        title="Gradient norm",
        caption="L2 norm of all gradients, mean between two lines; spikes are single steps. Healthy: falls or stays"
        " within a factor of 2 of its usual value, without spikes (▼), skipped steps (×) and rollbacks (shaded).",
        alt=f"{describe('gradient norm', norms)} Marked: {counts['spike']} spikes, {counts['skipped']} skipped steps,"
        f" {counts['rollback']} rollbacks.",
    )


def layers_chart(kept: Lines, found: list[Mark], plots: Path) -> Chart | None:
    return simple_chart(
        {"first layer": series(kept, "first_layer_grad_max"), "last layer": series(kept, "last_layer_grad_max")},
        plots,
        name="layers",
        title="Largest gradient, first and last layer",
        caption="Largest component of the gradient since the last line. Healthy: level. In an unstable run the first"
        " layer spikes, and the last one tens of steps later (paper §4.2, figure 4).",
        log=True,
        rollbacks=found,
    )


def blocks_chart(kept: Lines, abandoned: Lines, plots: Path) -> Chart | None:
    parts = [("", block_norms(kept)), ("thrown away by a rollback", block_norms(abandoned))]
    parts = [(title, table) for title, table in parts if table is not None]
    if not parts:
        return None
    names = list(dict.fromkeys(name for _, table in parts for name in table[1]))
    all_norms = np.concatenate([table[2].ravel() for _, table in parts])
    logarithms = np.log10(all_norms[np.isfinite(all_norms) & (all_norms > 0)])
    if not len(logarithms):
        return None

    def draw(figure: Figure, palette: Palette) -> None:
        widths = [max(len(table[0]), 4) for _, table in parts]
        row = figure.subplots(1, len(parts), squeeze=False, sharey=True, width_ratios=widths)[0]
        for axes, (title, (steps, own, norms)) in zip(row, parts, strict=True):
            shown = np.full((len(names), len(steps)), np.nan)
            shown[[names.index(name) for name in own]] = np.log10(np.where(norms > 0, norms, np.nan))
            mesh = axes.pcolormesh(
                edges(steps),
                np.arange(len(names) + 1),
                shown,
                cmap="viridis",
                vmin=logarithms.min(),
                vmax=logarithms.max(),
                rasterized=True,
                shading="flat",
            )
            axes.set_xlabel("step", fontsize=8)
            axes.set_title(title, fontsize=8, color=palette.bad)
            axes.tick_params(axis="y", length=0)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        row[0].set_yticks(np.arange(len(names)) + 0.5, [plain(name) for name in names], fontsize=7)
        row[0].invert_yaxis()
        bar = figure.colorbar(mesh, ax=row, pad=0.02, aspect=30)
        bar.outline.set_visible(False)
        bar.set_label("log₁₀ of the norm", fontsize=8, color=palette.ink)

    caption = (
        "From the image (top) to the loss (bottom); brighter is larger. Healthy: rows keep their order and change"
        " slowly. A bright column is a spike: see in which row it began."
    )
    return make_chart(
        "blocks",
        draw,
        plots,
        title="Gradient norm of every block",
        caption=caption,
        alt=f"Heat map of the gradient norms of {len(names)} blocks over {len(kept)} lines.",
        size=(7.0, 1.5 + 0.16 * len(names)),
        wide=True,
        min_width=560,
    )


def pair_chart(
    upper: tuple[str, str], lower: tuple[str, str], kept: Lines, plots: Path, *, name, title, caption, zero=False
) -> Chart | None:
    """Two values over the same steps, each on axes of its own. `upper` and `lower`: key and label."""
    pairs = [(label, series(kept, key)) for key, label in (upper, lower)]
    pairs = [(label, values) for label, values in pairs if len(values.known)]
    if not pairs:
        return None

    def draw(figure: Figure, palette: Palette) -> None:
        rows = figure.subplots(len(pairs), 1, sharex=True, squeeze=False)[:, 0]
        for row, ((label, values), axes) in enumerate(zip(pairs, rows, strict=True)):
            axes.grid(axis="y")
            draw_line(axes, values, palette.series[row])
            axes.set_ylabel(label, fontsize=8)
            if zero:
                axes.set_ylim(0, max(1e-12, 1.1 * values.known.max()))
        figure.align_ylabels()
        rows[-1].set_xlabel("step", fontsize=8)

    alt = " ".join(describe(label, values) for label, values in pairs)
    return make_chart(name, draw, plots, title=title, caption=caption, alt=alt)


def simple_chart(
    lines: dict[str, Series],
    plots: Path,
    *,
    name: str,
    title: str,
    caption: str,
    percent: bool = False,
    log: bool = False,
    before: Series | None = None,
    rollbacks: list[Mark] = (),
    dots: bool = False,
) -> Chart | None:
    """One or several series on common axes; `before` is what a rollback threw away."""
    lines = {label: values for label, values in lines.items() if len(values.known)}
    if not lines:
        return None

    def draw(figure: Figure, palette: Palette) -> None:
        axes = step_axes(figure, palette)
        draw_rollbacks(axes, palette, rollbacks)
        if before is not None:
            draw_line(axes, before, palette.muted, dashed=True)
        for number, (label, values) in enumerate(lines.items()):
            few = dots or len(values) < 20
            draw_line(axes, values, palette.series[number], label=label, marker="o" if few else None)
        if percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        if log and all((values.known > 0).all() for values in lines.values()):
            logarithmic(axes)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=palette.ink)

    alt = " ".join(describe(label, values, percent) for label, values in lines.items())
    return make_chart(name, draw, plots, title=title, caption=caption, alt=alt)


def step_axes(figure: Figure, palette: Palette) -> Axes:
    axes = figure.subplots()
    axes.grid(axis="y")
    axes.set_xlabel("step", fontsize=8)
    return axes


def logarithmic(axes: Axes) -> None:
    """A logarithmic scale with numbers as one writes them, also where it spans less than a decade."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")


def draw_line(axes: Axes, values: Series, color: str, dashed: bool = False, **options) -> None:
    if len(values.known) == 1:
        options["marker"] = "o"
    style = (0, (2, 2)) if dashed else "solid"
    axes.plot(values.steps, values.values, color=color, linestyle=style, markersize=3.5, **options)


def draw_rollbacks(axes: Axes, palette: Palette, found: list[Mark]) -> None:
    """Shade the steps that were done again, on which the dashed line lies."""
    for mark in found:
        if mark.kind == "rollback":
            begin = mark.step if mark.to_step is None else mark.to_step
            axes.axvspan(begin, mark.step, color=palette.bad, alpha=0.12, linewidth=0)
            label_line(axes, begin, 0.98, "rollback", palette.bad, xycoords=("data", "axes fraction"), va="top")


def describe(name: str, values: Series, percent: bool = False) -> str:
    """A line chart in a sentence."""
    steps, known = values.steps[np.isfinite(values.values)], values.known
    first, last = (f"{100 * value:.1f} %" if percent else f"{value:.4g}" for value in known[[0, -1]])
    return f"Line of {name}: {first} at step {steps[0]:.0f}, {last} at step {steps[-1]:.0f}."
