"""Charts as vector graphics that follow the page into the dark, and as PNG files for a model card."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure


# Inches of a chart that fills a telephone's screen at a scale near 1, with labels that can be read there.
WIDTH, HEIGHT = 4.4, 2.75
PNG_DPI = 200


@dataclass(frozen=True)
class Palette:
    """Colours of a chart. Series can be told apart without seeing colours well (Okabe and Ito, 2008)."""

    ink: str
    muted: str
    grid: str
    bad: str
    paper: str
    series: tuple[str, ...]


LIGHT = Palette(
    ink="#24292f",
    muted="#8a9099",
    grid="#e3e6ea",
    bad="#c62f2d",
    paper="#ffffff",
    series=(
        "#0072b2",
        "#d55e00",
        "#009e73",
        "#b4578f",
        "#b58900",
        "#3aa0d8",
        "#7a5cc0",
        "#5a6b1f",
        "#a34a28",
        "#47606f",
    ),
)
# Stand-ins that no chart uses otherwise: in the page each becomes a variable of its style sheet.
STAND_INS = Palette(
    ink="#fe0101",
    muted="#fe0102",
    grid="#fe0103",
    bad="#fe0104",
    paper="#fe0105",
    series=tuple(f"#fe02{number:02x}" for number in range(len(LIGHT.series))),
)


@dataclass(frozen=True)
class Chart:
    """
    Attributes:
        name: of its PNG file and its place in the page.
        title, caption: text.
        alt: what is seen, for those who do not see it.
        svg: the picture, to stand in HTML.
        wide: whether it takes the whole width of the page.
        min_width: pixels below which its labels cannot be read: it is then moved sideways; 0 for any width.
    """

    name: str
    title: str
    caption: str
    alt: str
    svg: Markup
    wide: bool = False
    min_width: int = 0


def make_chart(
    name: str,
    draw: Callable[[Figure, Palette], None],
    plots: Path,
    *,
    title: str,
    caption: str,
    alt: str,
    size: tuple[float, float] = (WIDTH, HEIGHT),
    wide: bool = False,
    min_width: int = 0,
) -> Chart:
    """
    Draw a chart for the page and write `plots/name.png`.

    Args:
        name: letters, digits and hyphens.
        draw: puts axes on an empty figure, in the colours of a palette.
        plots: an existing folder.
        title, caption, alt, wide, min_width: of `Chart`.
        size: width and height in inches.
    """
    with matplotlib.rc_context(_settings(LIGHT, name)):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, LIGHT)
        figure.suptitle(plain(title), fontsize=10, color=LIGHT.ink)
        figure.savefig(plots / f"{name}.png", dpi=PNG_DPI, facecolor=LIGHT.paper)
    with matplotlib.rc_context(_settings(STAND_INS, name)):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, STAND_INS)
        stream = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing, dpi=PNG_DPI)
    return Chart(name, title, caption, alt, svg_for_page(stream.getvalue(), name, alt), wide, min_width)


def _settings(palette: Palette, name: str) -> dict:
    return {
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": palette.ink,
        "axes.edgecolor": palette.muted,
        "axes.labelcolor": palette.ink,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "xtick.color": palette.muted,
        "ytick.color": palette.muted,
        "xtick.labelcolor": palette.ink,
        "ytick.labelcolor": palette.ink,
        "grid.color": palette.grid,
        "grid.linewidth": 0.8,
        "lines.linewidth": 1.6,
        "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and copied
        "svg.hashsalt": name,  # one report is the same file twice
    }


def svg_for_page(svg: str, name: str, alt: str) -> Markup:
    """matplotlib's document as an element of a page: without a size of its own, in the page's colours, and with ids
    that no other chart has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<style type="text/css">.*?</style>', "", svg, flags=re.DOTALL)
    view_box = re.search(r'viewBox="[^"]*"', svg).group()
    label = Markup('role="img" aria-label="{}"').format(alt)
    svg = re.sub(r"<svg [^>]*>", lambda _: f'<svg {view_box} xmlns:xlink="" {label}>', svg, count=1, flags=re.DOTALL)
    svg = svg.replace(' xmlns:xlink=""', "")
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg))
    used = {one or other for one, other in used}
    svg = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    for stand_in, variable in _variables().items():
        svg = svg.replace(stand_in, f"var({variable})")
    return Markup(re.sub(r">\s*\n\s*<", ">\n<", svg).strip())


def _variables() -> dict[str, str]:
    names = {getattr(STAND_INS, name): f"--chart-{name}" for name in ("ink", "muted", "grid", "bad", "paper")}
    return names | {colour: f"--chart-{number}" for number, colour in enumerate(STAND_INS.series)}


def style_variables() -> str:
    """The series' colours as variables; `style.css` itself has the others, and brighter ones for the dark."""
    return "".join(f"--chart-{number}:{colour};" for number, colour in enumerate(LIGHT.series))


def plain(text: str) -> str:
    """Text that matplotlib draws as it is: a dollar sign would begin a formula."""
    return str(text).replace("$", r"\$")


def label_line(axes: Axes, x: float, y: float, text: str, color: str, **options) -> None:
    """A name beside what it names, instead of a legend."""
    options = {"xytext": (4, 3), "textcoords": "offset points", "fontsize": 8, "color": color} | options
    axes.annotate(plain(text), (x, y), **options)
