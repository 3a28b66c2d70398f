"""Generate the tables and plots of docs/cifar10.md from the result files of the CIFAR-10 study.

    python -m benchmarks.study_report [--results benchmarks/results/cifar10_study_cpu] [--document docs/cifar10.md]

Replaces the text between the markers `<!-- NAME -->` and `<!-- end NAME -->` of the document, and writes the plots to
a folder next to it. The output is deterministic.
"""

import argparse
import json
import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from scipy.stats import t as student_t

from .study_arms import ABLATION_BASELINE, ARMS, FAILURE, LONGER_BASELINE, RESNET_14, Arm


ROOT = Path(__file__).parent.parent
CURVES = [*(arm for arm in ARMS if arm.group == "curves"), RESNET_14]
METRICS = ("knn_top1", "linear_top1")  # the last one decides whether signs agree
# Differences within their interval of this confidence are noise.
CONFIDENCE = 0.95
# The table of a monitored run shows every nth measurement.
SHOWN_EVERY = 4
WATCHED_METRICS = ("loss_normalized", "first_layer_grad_max", "projection_effective_rank")


def load(folder: Path) -> dict[str, list[dict]]:
    """The runs of every arm, sorted by seed."""
    runs: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*_seed*.json")):
        result = json.loads(path.read_text())
        runs.setdefault(result["arm"], []).append(result)
    for results in runs.values():
        results.sort(key=lambda result: result["seed"])
    return runs


def final(runs: Iterable[dict], metric: str) -> list[float]:
    """The last measurement of every run, in %."""
    return [100 * run["points"][-1][metric] for run in runs]


def spread(values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


def paired_differences(changed: list[dict], baseline: list[dict], metric: str) -> list[float]:
    """Differences per seed in percentage points; arms share initial weights and order of images per seed."""
    original = {run["seed"]: run["points"][-1][metric] for run in baseline}
    return [100 * (run["points"][-1][metric] - original[run["seed"]]) for run in changed if run["seed"] in original]


def interval(samples: Iterable[list[float]]) -> float:
    """
    Half the width of the confidence interval of a single value: divide by the root of the number of values for that of
    a mean. From the pooled variance of samples with different means (Student's t).
    """
    samples = [sample for sample in samples if len(sample) > 1]
    freedom = sum(len(sample) - 1 for sample in samples)
    if freedom == 0:
        return math.nan
    variance = sum((len(sample) - 1) * statistics.variance(sample) for sample in samples) / freedom
    return student_t.ppf((1 + CONFIDENCE) / 2, freedom) * math.sqrt(variance)


def verdict(here: float, half_width: float, there: float) -> str:
    """Whether a difference here has the same sign as in the paper."""
    if math.isnan(half_width):
        return "one seed"
    if abs(here) < half_width:
        return "within noise"
    return "yes" if (here > 0) == (there > 0) else "no"


def ablation_table(runs: dict[str, list[dict]], arms: list[Arm]) -> str:
    """Every arm compared with the first and with the paper; signs are compared on linear accuracy."""
    baseline, changed = arms[0], [arm for arm in arms[1:] if arm.name in runs]
    differences = {
        metric: {arm.name: paired_differences(runs[arm.name], runs[baseline.name], metric) for arm in changed}
        for metric in METRICS
    }
    intervals = {metric: interval(differences[metric].values()) for metric in METRICS}
    lines = [
        "| setting | seeds | kNN % | vs. baseline | linear % | vs. baseline | paper, ImageNet % |"
        " vs. paper's baseline | same sign |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in (baseline, *changed):
        row = f"| {arm.name} | {len(runs[arm.name])} |"
        for metric in METRICS:
            row += f" {spread(final(runs[arm.name], metric))} |"
            if arm is baseline:
                row += " |"
                continue
            sample = differences[metric][arm.name]
            here, half_width = statistics.fmean(sample), intervals[metric] / math.sqrt(len(sample))
            row += f" {here:+.1f} ± {half_width:.1f} |"
        if arm is baseline:
            lines.append(f"{row} | | |")
        elif arm.paper is None:
            lines.append(f"{row} not in the paper | | |")
        else:
            original, place = arm.paper[1:]
            there = arm.paper[0] - original
            lines.append(f"{row} {arm.paper[0]} ({place}) | {there:+.1f} | {verdict(here, half_width, there)} |")
    return "\n".join(lines)


def plain_table(runs: dict[str, list[dict]], arms: list[Arm]) -> str:
    lines = ["| setting | seeds | epochs | kNN % | linear % | core-minutes of training |", "|---|---|---|---|---|---|"]
    for arm in arms:
        if arm.name not in runs:
            continue
        results = runs[arm.name]
        minutes = statistics.fmean(run["cpu_seconds"]["pretraining"] or math.nan for run in results) / 60
        epochs = results[0]["points"][-1]["epoch"]
        knn, linear = (spread(final(results, metric)) for metric in ("knn_top1", "linear_top1"))
        lines.append(f"| {arm.name} | {len(results)} | {epochs:.3g} | {knn} | {linear} | {minutes:.1f} |")
    return "\n".join(lines)


def curve_table(runs: dict[str, list[dict]], arms: list[Arm]) -> str:
    """One row per evaluation: epochs, kNN and linear accuracy, mean over the seeds."""
    lines = ["| network | epochs | kNN % | linear % | seeds |", "|---|---|---|---|---|"]
    for arm in arms:
        for points in zip(*(run["points"] for run in runs.get(arm.name, [])), strict=True):
            knn, linear = (spread([100 * point[metric] for point in points]) for metric in ("knn_top1", "linear_top1"))
            lines.append(f"| {arm.name} | {points[0]['epoch']:.2f} | {knn} | {linear} | {len(points)} |")
    return "\n".join(lines)


def watched(runs: dict[str, list[dict]]) -> dict[str, dict]:
    """The failing run and the runs to compare it with, by name."""
    return {arm.name: runs[arm.name][0] for arm in ARMS if arm.group == "failure" and arm.name in runs}


def failure_table(shown: dict[str, dict]) -> str:
    """Values of the monitors at some steps, and the number of events."""
    lines = [
        "| run | step | normalized loss | positive top-1 | largest gradient, first layer | effective rank | kNN % |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in shown.items():
        measured = {point["step"]: point["knn_top1"] for point in run["knn_while_training"]}
        lines_at = {line["step"]: line for line in run["metrics"]}
        for step in sorted(measured.keys() & lines_at.keys())[::SHOWN_EVERY]:
            line = lines_at[step]
            lines.append(
                f"| {name} | {step} | {line['loss_normalized']:.3f} | {line['positive_top1']:.3f} |"
                f" {line['first_layer_grad_max']:.2g} | {line['projection_effective_rank']:.1f} |"
                f" {100 * measured[step]:.1f} |"
            )
    events = [
        f"{name}: {len(run['events'])} ({', '.join(sorted({event['event'] for event in run['events']})) or 'none'})"
        for name, run in shown.items()
    ]
    return "\n".join([*lines, "", f"Events in `events.jsonl`: {'; '.join(events)}."])


def plot_curves(runs: dict[str, list[dict]], arms: list[Arm], path: Path) -> None:
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, metric, title in zip(axes, ("knn_top1", "linear_top1"), ("kNN (k = 20)", "linear"), strict=True):
        for arm in arms:
            points = list(zip(*(run["points"] for run in runs.get(arm.name, [])), strict=True))
            if not points:
                continue
            epochs = [group[0]["epoch"] for group in points]
            values = [[100 * point[metric] for point in group] for group in points]
            (line,) = axis.plot(epochs, [statistics.fmean(group) for group in values], marker="o", label=arm.name)
            lowest, highest = [min(group) for group in values], [max(group) for group in values]
            axis.fill_between(epochs, lowest, highest, alpha=0.2, color=line.get_color())
        axis.set(title=title, xlabel="epochs")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("CIFAR-10 top-1 %")
    axes[1].legend()
    save(figure, path)


def plot_failure(shown: dict[str, dict], path: Path) -> None:
    """Loss, first-layer gradient, effective rank and kNN of the failing run and the runs to compare it with."""
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    axes = figure.subplots(1, 4)
    for name, run in shown.items():
        steps = [line["step"] for line in run["metrics"]]
        for axis, metric in zip(axes, WATCHED_METRICS, strict=False):
            axis.plot(steps, [line.get(metric, math.nan) for line in run["metrics"]], label=name)
        measured = run["knn_while_training"]
        accuracies = [100 * point["knn_top1"] for point in measured]
        axes[3].plot([point["step"] for point in measured], accuracies, marker=".")
        for event in run["events"]:
            axes[1].axvline(event["step"], color="tab:red", alpha=0.2, linewidth=1)
    titles = (
        "normalized loss",
        "largest gradient, first layer",
        "effective rank of the keys",
        "kNN during training, %",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Save as deterministic SVG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "mocov3_hf"}):
        figure.savefig(path, metadata={"Date": None})


def replace_section(text: str, name: str, section: str) -> str:
    """
    Replace one generated section of the document.

    Raises:
        ValueError: if the document has no markers of that name.
    """
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the document has no section between '<!-- {name} -->' and '<!-- end {name} -->'")
    return pattern.sub(lambda found: f"{found[1]}{section}\n{found[2]}", text)


def sections(runs: dict[str, list[dict]]) -> dict[str, str]:
    """The generated tables, by the names of their markers."""
    groups = {group: [arm for arm in ARMS if arm.group == group] for group in dict.fromkeys(a.group for a in ARMS)}
    made = {
        "curves": curve_table(runs, CURVES),
        "ablations": ablation_table(runs, groups["ablations"]),
        "tuning": plain_table(runs, groups["tuning"]),
    }
    if LONGER_BASELINE in runs:
        made["longer"] = ablation_table(runs, groups["longer"])
        made["longer curves"] = curve_table(runs, groups["longer"])
    if any(arm.name in runs for arm in groups["lars"]):
        made["lars"] = curve_table(runs, groups["lars"])
    if FAILURE in runs:
        made["failure"] = failure_table(watched(runs))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/cifar10_study_cpu")
    parser.add_argument("--document", type=Path, default=ROOT / "docs/cifar10.md")
    options = parser.parse_args()
    runs = load(options.results)
    if ABLATION_BASELINE not in runs:
        parser.error(f"{options.results} has no runs of the arm {ABLATION_BASELINE!r}: run cifar10_study.py first")
    text = options.document.read_text()
    for name, section in sections(runs).items():
        text = replace_section(text, name, section)
    options.document.write_text(text)
    plots = options.document.parent / options.document.stem
    plot_curves(runs, CURVES, plots / "curves.svg")
    if LONGER_BASELINE in runs:
        plot_curves(runs, [arm for arm in ARMS if arm.group == "longer"], plots / "longer.svg")
    if FAILURE in runs:
        plot_failure(watched(runs), plots / "failure.svg")


if __name__ == "__main__":
    main()
