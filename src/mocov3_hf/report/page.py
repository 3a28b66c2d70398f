"""Composes a page from its sections and renders it as HTML."""

import datetime
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment
from markupsafe import Markup

from .._version import __version__
from ..problem_types import SINGLE_LABEL
from ..run_folder import RunFolder
from .image_sections import image_sections, neighbor_findings
from .images import Samples, Seen, Viewer
from .measured import known_results, results_section
from .parts import CHART_STYLE, CSS_VARIABLES, SERIES, Kept, Section, Text, attempt, quoted
from .predictions import predictions_section
from .summary import facts, findings, lead
from .training import training_section


IMAGE_SECTIONS = ("views", "attention", "components", "map", "neighbors", "confusion")


@matplotlib.rc_context(CHART_STYLE)
def render_page(
    folder: RunFolder, looked: tuple[Viewer, Samples, Seen, Seen | None] | None, plots: Path, seed: int, earlier: str
) -> str:
    """
    One self-contained HTML document. All text is escaped. Writes the PNG files of charts and galleries to `plots`.

    Args:
        looked: the model, the images, and what it and its random start see in them; None without images.
        plots: an existing folder.
        seed: of the t-SNE map.
        earlier: the page that is replaced, whose sections about images are kept without new ones; may be empty.
    """
    notes = folder.notes
    sections = [] if folder.kind == "evaluation" else [training_section(folder, plots)]
    measured = known_results(folder)
    sections.append(results_section(folder, measured))
    predictions = attempt(
        notes, "the section 'Predictions'", lambda: predictions_section(folder, measured, plots), None
    )
    sections += [predictions] if predictions is not None else []
    noticed = attempt(notes, "the findings", lambda: findings(folder), [])
    command = f"mocov3 report {quoted(folder.path)} --dataset_name DATA --test_split test"
    if looked is not None:
        sections += image_sections(folder, *looked, plots, seed)
        noticed += attempt(notes, "the finding about neighbors", lambda: neighbor_findings(*looked[1:]), [])
    elif kept := kept_sections(earlier, command):
        sections += kept
    elif folder.kind != "evaluation":
        has_confusions = folder.kind == "classifier" and folder.config.get("problem_type") in (None, SINGLE_LABEL)
        shown = "Augmented views, attention maps, patch features, the t-SNE map and nearest neighbors"
        text = f"{shown}{', and the confusion matrix,' if has_confusions else ''} need images:"
        sections.append(Section("images", "Images", [Text(text, command)]))
    return render(
        title=folder.path.resolve().name,
        lead=attempt(notes, "the introduction", lambda: lead(folder), ""),
        facts=attempt(notes, "the summary", lambda: facts(folder), []),
        findings=noticed,
        notes=notes,
        sections=sections,
    )


def kept_sections(earlier: str, command: str) -> list[Section]:
    """The sections about images of an earlier page of this package, with its date; none in any other text."""
    date = re.search(r"<footer><p>Generated ([\d\-: ]+ UTC) by mocov3_hf ", earlier)
    begin = r'<section id="(\w+)" aria-labelledby="\w+-title"(?: data-made="([\d\-: ]+ UTC)")?>\n'
    found = re.findall(begin + r'<h2 id="\w+-title">([^<]+)</h2>\n(.*?)</section>\n', earlier, re.DOTALL)
    sections = []
    for name, made, title, inner in found:
        if date is not None and name in IMAGE_SECTIONS:
            made = made or date[1]
            inner = re.sub(r'<div class="kept">.*?</div>\n', "", inner, flags=re.DOTALL)
            text = Text(f"Pictures of {made}, from an earlier report. To renew them:", command)
            sections.append(Section(name, title, [*([] if sections else [text]), Kept(Markup(inner))], made))
    return sections


def render(**values: Any) -> str:
    """The template with its values."""
    read = files(__package__).joinpath
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(read("page.html").read_text(encoding="utf-8"))
    series = "".join(f"{CSS_VARIABLES[color]}:{color};" for color in SERIES)
    page = template.render(
        version=__version__,
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        style=Markup(read("style.css").read_text(encoding="utf-8").replace("/*series*/", series)),
        **values,
    )
    return page + "\n"
