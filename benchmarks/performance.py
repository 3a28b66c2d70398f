"""Write the tables and plots of docs/performance.md and the section of README from what bench.py measured.

    python -m benchmarks.performance [--check]

Reads benchmarks/results/MACHINE.json of every machine, and replaces what stands between the markers of both files: all
machines in docs/performance.md, those that README's marker names there. The text follows from the files alone;
--check writes nothing and ends with exit code 1 where it differs. Plots need matplotlib.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from .performance_figures import (
    NAMES,
    OPERATIONS,
    PRECISIONS,
    gpu_step_reached,
    gpu_times_plain,
    plain_and_ours,
    ratio,
    result,
    step_reached,
    table,
    update_reached,
    variant_of,
)
from .performance_tables import report


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE, README = Path("docs/performance.md"), Path("README.md")
PLOTS = Path("docs/performance")
BEGIN = re.compile(r"<!-- figures(?: of (?P<machines>[^:]+))?: written by make bench, not by hand -->\n")
END = "<!-- end of figures -->"


def load_results(folder: Path) -> dict[str, dict]:
    """Results by machine in alphabetical order; files of other benchmarks and of `--quick` are passed over."""
    machines = {}
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        if "machine" in results and "parts" in results and not results["quick"]:
            machines[results["machine"]] = results
    return machines


def between_markers(text: str, machines: dict[str, dict], name: str) -> str:
    """
    `text` with new figures between its markers.

    Raises:
        ValueError: no markers, or a machine without results.
    """
    begin = BEGIN.search(text)
    end = text.find(END)
    if begin is None or end < begin.end():
        raise ValueError(
            f"{name} lacks the markers '<!-- figures: written by make bench, not by hand -->' and '{END}'"
        )
    if begin["machines"] is None:
        body = "\n".join(report(results) for results in machines.values())
    else:
        named = begin["machines"].split(" and ")
        for machine in named:
            if machine not in machines:
                known = ", ".join(machines) or "none"
                raise ValueError(
                    f"{name} names the machine {machine!r}, and there are results of {known}: name one of them"
                )
        body = readme_table([machines[machine] for machine in named])
    return f"{text[: begin.end()]}\n{body.rstrip()}\n\n{text[end:]}"


def rewritten(root: Path, machines: dict[str, dict]) -> dict[Path, str]:
    """The text that both files should have."""
    return {
        path: between_markers((root / path).read_text(encoding="utf-8"), machines, str(path))
        for path in (PAGE, README)
    }


def readme_table(machines: list[dict]) -> str:
    """The first machine's parts, and with its name before them those of the others."""
    first, *others = machines
    rows = readme_rows(first)
    for results in others:
        rows += [[f"{results['device']}: {what}", *figures] for what, *figures in readme_rows(results)]
    return table([first["device"], "against the plain implementation", "of its limit"], rows)


def readme_rows(results: dict) -> list[list[str]]:
    """At most six: every part against the plain implementation and against its limit."""
    rows = []
    parts = ("data_path", "step", "updates", "memory", "inference")
    data, step, updates, memory, inference = (result(results, part) for part in parts)
    if data is not None:
        seconds = data["one_core"]["cpu_seconds"]
        rows.append(
            [
                "files to views",
                f"{ratio(seconds['classic'], seconds['ours']).median:.1f} times the classic PIL pipeline",
                f"{100 * ratio(seconds['decode'], seconds['ours']).median:.0f} % of the rate of decoding alone",
            ]
        )
    if step is not None and results["device_type"] == "cpu":
        for backbone in dict.fromkeys(point["backbone"] for point in step["points"]):
            points = [point for point in step["points"] if point["backbone"] == backbone]
            precisions = [PRECISIONS[point["mixed_precision"]] for point in points]
            times = [f"{ratio(*plain_and_ours(point['cpu_seconds'])).median:.2f}" for point in points]
            reached = [f"{100 * step_reached(point, 'ours').median:.0f} %" for point in points]
            operation = OPERATIONS[points[0]["limit"]["operation"]]
            rows.append(
                [
                    f"{NAMES[backbone]} step, {', '.join(precisions)}",
                    f"{', '.join(times)} times the plain step",
                    f"{', '.join(reached)} of the rate of a {operation}",
                ]
            )
    elif step is not None:
        rows.append(gpu_step_row(step["points"]))
    if updates is not None:
        points = updates["points"]
        times = [f"{ratio(*plain_and_ours(point['seconds'])).median:.1f}" for point in points]
        reached = [f"{100 * update_reached(point, 'ours').median:.0f} %" for point in points]
        rows.append(
            [
                ", ".join(point["update"] for point in points),
                f"{', '.join(times)} times a loop over parameters",
                f"{', '.join(reached)} of memory bandwidth",
            ]
        )
    if memory is not None:
        cached, plain = memory["cached"][-1], memory["plain"][-1]
        rows.append(
            [
                f"memory, batch {cached['batch']} in chunks of {memory['chunk_size']}",
                f"{cached['peak_gib']:.1f} GiB; the plain step {plain['peak_gib']:.1f} GiB at batch {plain['batch']}",
                f"{cached['counted_gib']:.1f} GiB must be kept",
            ]
        )
    if inference is not None:
        points = [point for point in inference["points"] if point["task"] == "classification"]
        last = [list(point["variants"].values())[-1] for point in points]
        times = [f"{figures['times_the_pipeline']['median']:.1f}" for figures in last]
        reached = [f"{100 * figures['fraction_of_limit']:.0f} %" for figures in last]
        rows.append(
            [
                f"classification in bf16, {', '.join(NAMES[point['model']] for point in points)}",
                f"{', '.join(times)} times transformers' pipeline",
                f"{', '.join(reached)} of decoding and matrix products",
            ]
        )
    return rows


def gpu_step_row(points: list[dict]) -> list[str]:
    compiled = ", compiled" if all(variant_of(point) == "compiled" for point in points) else ""
    times = [f"{gpu_times_plain(point, variant_of(point)).median:.1f}" for point in points]
    reached: dict[str, list[str]] = {}
    for point in points:
        percent = f"{100 * gpu_step_reached(point, variant_of(point)).median:.0f} %"
        reached.setdefault(OPERATIONS[point["limit"]["operation"]], []).append(percent)
    return [
        f"{', '.join(NAMES[point['backbone']] for point in points)} step, bf16{compiled}",
        f"{', '.join(times)} times the plain step",
        ", ".join(f"{', '.join(percents)} of the rate of a {operation}" for operation, percents in reached.items()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only tell whether the text is up to date")
    options = parser.parse_args()
    machines = load_results(RESULTS)
    texts = rewritten(ROOT, machines)
    if options.check:
        stale = [str(path) for path, text in texts.items() if (ROOT / path).read_text(encoding="utf-8") != text]
        if stale:
            sys.exit(f"error: {', '.join(stale)} differ from benchmarks/results: run python -m benchmarks.performance")
        return
    from .performance_plots import draw  # here, since --check does without matplotlib

    for path, text in texts.items():
        (ROOT / path).write_text(text, encoding="utf-8")
    for machine, results in machines.items():
        draw(results, ROOT / PLOTS / f"{machine}.svg")
    print(f"{', '.join(map(str, texts))} and {PLOTS}: {', '.join(machines) or 'no machine'}")


if __name__ == "__main__":
    main()
