"""The parts of a page: text, tables, charts and galleries. The last two are also saved as PNG for model cards."""

import base64
import io
import itertools
import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import matplotlib
import numpy as np
import torch
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torchvision.utils import make_grid

from ..reporting import one_line
from ..storage import atomic_file, is_local


Built = TypeVar("Built")

# Default size of a chart in inches: readable at full width on a phone.
CHART_SIZE = (4.4, 2.75)
PNG_DPI = 200
# Side of a picture in the PNG of a gallery, in pixels.
TILE = 128

INK, MUTED, GRID, BAD, PAPER = "#24292f", "#8a9099", "#e3e6ea", "#c62f2d", "#ffffff"
# A palette for readers with impaired color vision (after Okabe and Ito, 2008).
SERIES = ["#0072b2", "#d55e00", "#009e73", "#b4578f", "#b58900", "#3aa0d8", "#7a5cc0", "#5a6b1f", "#a34a28", "#47606f"]
# In the page every color of a chart is a CSS variable, so that charts follow the light or dark theme.
CSS_VARIABLES = {INK: "--chart-ink", MUTED: "--chart-muted", GRID: "--chart-grid", BAD: "--chart-bad"}
CSS_VARIABLES |= {PAPER: "--chart-paper"} | {color: f"--chart-{number}" for number, color in enumerate(SERIES)}
CHART_STYLE = {
    "font.family": "sans-serif",
    "font.size": 8,
    "figure.titlesize": 10,
    "axes.titlesize": 8,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.prop_cycle": matplotlib.cycler(color=SERIES),
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text stays text: screen readers read it, and it can be searched and copied
}


@dataclass(frozen=True)
class Text:
    """A paragraph, optionally followed by a command."""

    kind: ClassVar[str] = "text"
    text: str
    command: str = ""


@dataclass(frozen=True)
class Table:
    """`numeric` lists the right-aligned columns. A row that is a text heads the rows below it."""

    kind: ClassVar[str] = "table"
    columns: list[str]
    rows: list[list[str] | str]
    caption: str
    numeric: tuple[int, ...] = ()


@dataclass(frozen=True)
class Chart:
    """
    Attributes:
        name: anchor in the page and stem of the PNG file.
        svg: inline SVG element.
        width: in inches.
    """

    name: str
    title: str
    caption: str
    svg: Markup
    width: float


@dataclass(frozen=True)
class Charts:
    kind: ClassVar[str] = "charts"
    charts: list[Chart]


@dataclass(frozen=True)
class Hover:
    """
    A text that the page shows where the pointer is.

    Attributes:
        axes: that it belongs to.
        low, high: opposite corners of the rectangle; in data coordinates, but y in fractions of the axes if `is_band`.
        text: one or several lines.
        dots: x, y and color of marks that appear with the text, in data coordinates.
        margin: added to each side, in points.
    """

    axes: Axes
    low: tuple[float, float]
    high: tuple[float, float]
    text: str
    dots: tuple[tuple[float, float, str], ...] = ()
    is_band: bool = False
    margin: float = 0.0

    def svg(self) -> str:
        """As an element of the SVG document, whose unit is the point and whose y axis points down."""
        figure = self.axes.figure
        height = 72 * figure.get_figheight()

        def place(points, transform) -> np.ndarray:
            return transform.transform(np.asarray(points, dtype=float)) * 72 / figure.dpi * [1, -1] + [0, height]

        transform = self.axes.get_xaxis_transform() if self.is_band else self.axes.transData
        corners = place([self.low, self.high], transform)
        (x, y), (right, bottom) = corners.min(axis=0) - self.margin, corners.max(axis=0) + self.margin
        box = f'<rect x="{x:.1f}" y="{y:.1f}" width="{right - x:.1f}" height="{bottom - y:.1f}"/>'
        for *point, color in self.dots:
            ((x, y),) = place([point], self.axes.transData)
            box += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" style="fill: {color}"/>'
        return f"<g><title>{escape(self.text)}</title>{box}</g>"


@dataclass(frozen=True)
class Picture:
    """
    Attributes:
        pixels: uint8 (H, W, 3).
        alt: description for screen readers.
        label: text below the picture.
        mark: "right", "wrong", "query" or "".
        is_grid: whether pixels are cells of a grid, which must not be smoothed when enlarged.
    """

    pixels: np.ndarray
    alt: str
    label: str = ""
    mark: str = ""
    is_grid: bool = False

    @property
    def source(self) -> str:
        """Data URI: JPEG for photographs, PNG for grids and small images."""
        kind = "png" if self.is_grid or max(self.pixels.shape[:2]) <= 64 else "jpeg"
        stream = io.BytesIO()
        Image.fromarray(self.pixels).save(stream, kind, quality=85, optimize=True)
        return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


@dataclass(frozen=True)
class Gallery:
    """Titled strips of pictures with one caption; `size` is the width of a picture in pixels."""

    kind: ClassVar[str] = "gallery"
    strips: list[tuple[str, list[Picture]]]
    caption: str
    size: int = 96
    columns: bool = False


@dataclass(frozen=True)
class Kept:
    """HTML of an earlier page."""

    kind: ClassVar[str] = "kept"
    html: Markup


@dataclass(frozen=True)
class Section:
    """`name` is the anchor; `made` is the date of a section that comes from an earlier page."""

    name: str
    title: str
    parts: list[Text | Table | Charts | Gallery | Kept]
    made: str = ""


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def attempt(notes: list[str], what: str, build: Callable[[], Built], otherwise: Built) -> Built:
    """
    A part of a page; `otherwise`, with a note, where the folder holds something that the part cannot show. A folder
    may hold anything, and no part of it may keep the others from being shown.
    """
    try:
        return build()
    except Exception as error:
        notes.append(f"{what} was left out: {type(error).__name__}: {shorten(one_line(error), 200)}.")
        return otherwise


def mapping(value: Any) -> dict[str, Any]:
    """A value where a file holds an object; empty for anything else."""
    return value if isinstance(value, dict) else {}


def new_figure(size: tuple[float, float] = CHART_SIZE) -> Figure:
    """An empty figure, `size` in inches. Draw on it inside `matplotlib.rc_context(CHART_STYLE)`."""
    return Figure(figsize=size)


def finish_chart(
    figure: Figure, name: str, plots: Path, *, title: str, caption: str, alt: str, hovers: Iterable[Hover] = ()
) -> Chart:
    """Turn a figure into a `Chart`, described by `alt` for screen readers, and write it to `plots/name.png`."""
    stream = io.StringIO()
    # Salted with the name, ids are unique in the page and the same in every run.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=metadata, dpi=PNG_DPI)
    texts = "".join(hover.svg() for hover in hovers)
    svg = stream.getvalue().replace("</svg>", f'<g class="hover">{texts}</g></svg>' if texts else "</svg>")
    figure.suptitle(title)
    with atomic_file(plots / f"{name}.png") as aside:
        figure.savefig(aside, format="png", dpi=PNG_DPI, facecolor=PAPER)
    return Chart(name, title, caption, inline_svg(svg, alt), figure.get_figwidth())


def inline_svg(svg: str, alt: str) -> Markup:
    """Matplotlib's SVG document as an element that scales with the page and uses its colors."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    view_box = re.search(r'viewBox="[^"]*"', svg).group()
    body = svg[svg.index(">") + 1 :].replace("xlink:href", "href")
    svg = f'<svg {view_box} role="img" aria-label="{escape(alt)}">{body}'
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # numbered group ids repeat in every chart, and nothing refers to them
    for color, variable in CSS_VARIABLES.items():
        svg = svg.replace(f": {color}", f": var({variable})")
    return Markup(re.sub(r">\s*\n\s*<", ">\n<", svg).strip())


def save_sheet(strips: list[tuple[str, list[Picture]]], path: Path, per_row: int) -> None:
    """Write the pictures of a gallery as one PNG on white."""
    tiles = []
    for picture in itertools.chain.from_iterable(pictures for _, pictures in strips):
        method = Image.Resampling.NEAREST if picture.is_grid else Image.Resampling.BICUBIC
        tile = Image.fromarray(picture.pixels).resize((TILE, TILE), method)
        tiles.append(torch.from_numpy(np.array(tile)).permute(2, 0, 1))
    sheet = make_grid(torch.stack(tiles), nrow=per_row, padding=6, pad_value=255)
    with atomic_file(path) as aside:
        Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(aside, "png")


def shown_name(name: Any) -> str:
    """Name of a dataset or model; only the last part of a local path, because a report may be published."""
    name = str(name)
    name = Path(name).name if is_local(name) else name
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")  # any bytes in names of files


def quoted(path: Path) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))


def shorten(name: str, length: int = 22) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
