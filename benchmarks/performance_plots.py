"""One plot per machine: speedup over the plain implementation, fraction of the hardware limit, memory."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from .performance_numbers import (
    Spread,
    gpu_step_reached,
    gpu_times_plain,
    plain_and_ours,
    ratio,
    result,
    step_name,
    step_reached,
    update_reached,
    variant_of,
)


OURS, PLAIN = "#2563ab", "#b0b7c0"
# Deterministic output: no date, no random identifiers. Text stays text.
STABLE = {"svg.hashsalt": "mocov3_hf", "svg.fonttype": "none"}
Bar = tuple[str, Spread, Spread]  # what, plain, ours


def fractions(results: dict) -> list[Bar]:
    """Fractions of the hardware limit, of the plain implementation and of ours."""
    bars = []
    data, step, updates = (result(results, part) for part in ("data_path", "step", "updates"))
    if data is not None:
        seconds = data["one_core"]["cpu_seconds"]
        bars.append(("files to views", *(ratio(seconds["decode"], seconds[who]) for who in ("classic", "ours"))))
    if step is not None and results["device_type"] == "cpu":
        bars += [
            (step_name(point), *(step_reached(point, who) for who in ("plain", "ours"))) for point in step["points"]
        ]
    elif step is not None:
        bars += [
            (step_name(point), *(gpu_step_reached(point, name) for name in ("plain", variant_of(point))))
            for point in step["points"]
        ]
    if updates is not None:
        bars += [
            (point["update"], *(update_reached(point, who) for who in ("plain", "ours")))
            for point in updates["points"]
        ]
    return bars


def times_plain(results: dict) -> list[tuple[str, Spread]]:
    """Speedups over the plain implementation."""
    bars = []
    data, step, updates = (result(results, part) for part in ("data_path", "step", "updates"))
    if data is not None:
        seconds = data["one_core"]["cpu_seconds"]
        bars.append(("files to views", ratio(seconds["classic"], seconds["ours"])))
    if step is not None and results["device_type"] == "cpu":
        bars += [(step_name(point), ratio(*plain_and_ours(point["cpu_seconds"]))) for point in step["points"]]
    elif step is not None:
        bars += [(step_name(point), gpu_times_plain(point, variant_of(point))) for point in step["points"]]
    if updates is not None:
        bars += [(point["update"], ratio(*plain_and_ours(point["seconds"]))) for point in updates["points"]]
    return bars


def error(spreads: list[Spread]) -> list[list[float]]:
    """Error bars from minimum to maximum, as offsets from the median."""
    return [[s.median - s.least for s in spreads], [s.most - s.median for s in spreads]]


def draw(results: dict, path: Path) -> None:
    """Write the plot of one machine as SVG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STABLE):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        axes = figure.subplots(1, 3)
        draw_fractions(axes[0], fractions(results))
        draw_times(axes[1], times_plain(results))
        memory = result(results, "memory")
        if memory is None:
            axes[2].remove()
        else:
            draw_memory(axes[2], memory)
        figure.savefig(path, format="svg", metadata={"Date": None})
    # matplotlib leaves trailing whitespace in paths.
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("".join(f"{line.rstrip()}\n" for line in lines), encoding="utf-8")


def draw_fractions(axes, bars: list[Bar]) -> None:
    for offset, which, name, color in ((-0.2, 1, "plain", PLAIN), (0.2, 2, "ours", OURS)):
        spreads = [bar[which] for bar in bars]
        places = [index + offset for index in range(len(bars))]
        axes.barh(places, [s.median for s in spreads], 0.38, xerr=error(spreads), color=color, label=name)
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars])
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_title("fraction of the hardware limit", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def draw_times(axes, bars: list[tuple[str, Spread]]) -> None:
    spreads = [bar[1] for bar in bars]
    axes.barh(range(len(bars)), [s.median for s in spreads], 0.6, xerr=error(spreads), color=OURS)
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars])
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_title("speedup over the plain implementation", fontsize=10)


def draw_memory(axes, memory: dict) -> None:
    for kind, name, color in (("plain", "plain step", PLAIN), ("cached", "gradient cache", OURS)):
        batches = [point["batch"] for point in memory[kind]]
        axes.plot(batches, [point["peak_gib"] for point in memory[kind]], "o-", color=color, label=name)
        axes.plot(batches, [point["counted_gib"] for point in memory[kind]], ":", color=color, label="lower bound")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch size")
    axes.set_title("peak memory of a step, GiB", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
