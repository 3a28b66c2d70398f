"""The page that compares several runs or models: what differs, their curves in the same charts, and their results."""

from pathlib import Path
from typing import Any

import matplotlib

from ..run_folder import RunFolder
from .curves import read_curves
from .measured import all_results, describe_protocol, is_value, name_of, shown
from .page import render
from .parts import CHART_STYLE, Charts, Section, Table, Text, attempt, shorten, shown_name
from .summary import facts, findings
from .training import draw_charts


# Options that name a place and do not change a run.
PLACES = ("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "dataset_name")


@matplotlib.rc_context(CHART_STYLE)
def render_comparison(folders: list[RunFolder], plots: Path) -> str:
    """One self-contained HTML document. All text is escaped. Writes the PNG files of the charts to `plots`."""
    known, options, curves, results, noticed = {}, {}, {}, {}, []
    runs = dict(zip(names_of(folders), folders, strict=True))
    for run, folder in runs.items():
        notes = folder.notes
        summary = attempt(notes, "the summary", lambda folder=folder: facts(folder), [])
        known[run] = {name: value for name, value in summary if not name.startswith("Evaluated")}
        options[run] = flat({name: value for name, value in folder.recipe.items() if name not in PLACES})
        read = attempt(notes, "the training curves", lambda folder=folder: read_curves(folder), None)
        curves |= {run: (folder, read)} if read is not None else {}
        results[run] = attempt(notes, "the results", lambda folder=folder: result_cells(folder), {})
        found = attempt(notes, "the findings", lambda folder=folder: findings(folder), [])
        noticed += [(kind, f"{run}: {text}") for kind, text in found if not text.startswith("No ")]
    notes = [f"{run}: {note}" for run, folder in runs.items() for note in folder.notes]
    kind = next((folder.kind for folder, read in curves.values() if read.kept), "")
    charts = (
        draw_charts({run: both for run, both in curves.items() if both[0].kind == kind}, plots, notes) if kind else []
    )
    training: list = [Charts(charts) if charts else Text("No training metrics found in these folders.")]
    if others := [run for run, (folder, read) in curves.items() if read.kept and folder.kind != kind]:
        training.append(Text(f"Not shown, because their losses have another meaning: {', '.join(others)}."))
    differing = [
        table_of(runs, "", known, "What differs; the summary has what is the same.", differing=True),
        table_of(runs, "option", options, "Options of the recipes that differ.", differing=True),
    ]
    measured = table_of(runs, "metric", results, "The newest result of each protocol, also from neighboring folders.")
    first = next(iter(runs))
    return render(
        title=f"Comparison of {len(runs)} runs",
        lead=f"{', '.join(runs)}.",
        facts=[(name, value) for name, value in known[first].items() if is_same(known, name)],
        findings=noticed,
        notes=notes,
        sections=[
            Section("training", "Training", training),
            Section(
                "differences", "Differences", [table for table in differing if table.rows] or [Text("None found.")]
            ),
            Section("results", "Results", [measured if measured.rows else Text("No results in any of the folders.")]),
        ],
    )


def names_of(folders: list[RunFolder]) -> list[str]:
    """Names of the folders, each with as many folders above it as it takes to tell them apart."""
    parts = [folder.path.resolve().parts for folder in folders]
    depths = range(1, 1 + max(map(len, parts)))
    depth = next(depth for depth in depths if len({part[-depth:] for part in parts}) == len(parts))
    return ["/".join(part[-depth:]) for part in parts]


def flat(options: dict[str, Any]) -> dict[str, Any]:
    """Options with the items of mappings as options of their own, and only the last part of local paths."""
    found = {}
    for name, value in options.items():
        inner = {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        found |= {key: shown_name(item) if isinstance(item, str) else item for key, item in inner.items()}
    return found


def is_same(values: dict[str, dict[str, Any]], name: str) -> bool:
    """Whether all runs have the same value."""
    return len({repr(found.get(name)) for found in values.values()}) == 1


def table_of(
    runs: dict[str, RunFolder], corner: str, values: dict[str, dict[str, Any]], caption: str, differing: bool = False
) -> Table:
    """One column for each run and one row for each name, or only for the names whose values differ."""
    names = dict.fromkeys(name for found in values.values() for name in found)
    rows: list = []
    heading = ""
    for name in names:
        group, _, label = name.rpartition("\n")
        if differing and is_same(values, name):
            continue
        if group != heading:
            rows.append(heading := group)
        cells = [values[run].get(name) for run in runs]
        rows.append([label, *("" if cell is None else shorten(str(cell), 100) for cell in cells)])
    return Table([corner, *map(shorten, runs)], rows, caption)


def result_cells(folder: RunFolder) -> dict[str, str]:
    """Measured values in words by protocol and metric, which a line break separates; the newest of each."""
    found = {}
    for measured in all_results(folder):
        if measured.is_current:
            group = describe_protocol(measured.result)
            numbers = {name: value for name, value in measured.result["metrics"].items() if is_value(value)}
            found |= {f"{group}\n{name_of(name)}": shown(name, value) for name, value in numbers.items()}
    return found
