"""Composes a page from its sections and renders it as HTML."""

import datetime
from importlib.resources import files
from pathlib import Path

import matplotlib
from jinja2 import Environment
from markupsafe import Markup

from .._version import __version__
from ..run_folder import RunFolder
from .image_sections import image_sections
from .parts import CHART_STYLE, CSS_VARIABLES, SERIES, Section, Text, attempt
from .summary import facts, findings, lead, quoted, results_section
from .training import training_section


@matplotlib.rc_context(CHART_STYLE)
def render_page(folder: RunFolder, looked: tuple | None, plots: Path, seed: int) -> str:
    """
    One self-contained HTML document. All text is escaped. Writes the PNG files of charts and galleries to `plots`.

    Args:
        looked: `(viewer, samples, seen)`, None without images.
        plots: an existing folder.
        seed: of the t-SNE map.
    """
    notes = folder.notes
    sections = [training_section(folder, plots), results_section(folder)]
    if looked is not None:
        sections += image_sections(*looked, plots, seed, notes)
    else:
        shown = "Attention maps, patch features, the t-SNE map and nearest neighbors"
        text = f"{shown}{', and the confusion matrix,' if folder.kind == 'classifier' else ''} need images:"
        command = f"mocov3 report {quoted(folder.path)} --dataset_name DATA --test_split test"
        sections.append(Section("images", "Images", [Text(text, command)]))
    read = files(__package__).joinpath
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(read("page.html").read_text(encoding="utf-8"))
    series = "".join(f"{CSS_VARIABLES[color]}:{color};" for color in SERIES)
    page = template.render(
        title=folder.path.resolve().name,
        lead=attempt(notes, "the introduction", lambda: lead(folder), ""),
        facts=attempt(notes, "the summary", lambda: facts(folder), []),
        findings=attempt(notes, "the findings", lambda: findings(folder), []),
        notes=notes,
        sections=sections,
        version=__version__,
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        style=Markup(read("style.css").read_text(encoding="utf-8").replace("/*series*/", series)),
    )
    return page + "\n"
