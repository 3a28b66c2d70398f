"""The parts of a page, and the page."""

import base64
import io
from dataclasses import dataclass, field
from importlib.resources import files

import numpy as np
from jinja2 import Environment
from markupsafe import Markup
from PIL import Image

from .charts import Chart, style_variables


@dataclass(frozen=True)
class Picture:
    """
    Attributes:
        source: a data URI.
        width, height: in pixels; the page keeps the room before the picture is decoded.
        alt: what is seen.
        label: text below.
        mark: "right", "wrong", "query" or "" for none of them.
        pixelated: whether its pixels are values, not to be smoothed.
    """

    source: str
    width: int
    height: int
    alt: str
    label: str = ""
    mark: str = ""
    pixelated: bool = False


@dataclass(frozen=True)
class Strip:
    """Pictures that belong together, with a title of their own."""

    title: str
    pictures: list[Picture]


@dataclass(frozen=True)
class Gallery:
    """Strips of pictures with one caption; `size` is the width of a picture in pixels."""

    strips: list[Strip]
    caption: str
    size: int = 96
    columns: bool = False
    kind: str = field(default="gallery", init=False)


@dataclass(frozen=True)
class Charts:
    charts: list[Chart]
    kind: str = field(default="charts", init=False)


@dataclass(frozen=True)
class Table:
    """`numeric` are the columns that are set flush right."""

    columns: list[str]
    rows: list[list[str]]
    caption: str
    numeric: tuple[int, ...] = ()
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Text:
    """A paragraph, with a command below it where there is one."""

    text: str
    command: str = ""
    kind: str = field(default="text", init=False)


@dataclass(frozen=True)
class Section:
    """`name` is its anchor."""

    name: str
    title: str
    parts: list


@dataclass(frozen=True)
class Page:
    """
    Attributes:
        title: of the document.
        lead: one sentence of what it is about.
        facts: name and value.
        findings: pairs of "good", "look" or "bad", and a sentence.
        notes: what could not be read.
        sections: the rest.
        footer: of what and when the page was made.
    """

    title: str
    lead: str
    facts: list[tuple[str, str]]
    findings: list[tuple[str, str]]
    notes: list[str]
    sections: list[Section]
    footer: str


def render(page: Page) -> str:
    """One HTML document that needs nothing but itself. All text is escaped."""
    read = files(__package__).joinpath
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        read("page.html").read_text(encoding="utf-8")
    )
    style = read("style.css").read_text(encoding="utf-8").replace("/*series*/", style_variables())
    return template.render(page=page, style=Markup(style)) + "\n"


def make_picture(
    pixels: np.ndarray, alt: str, label: str = "", mark: str = "", kind: str | None = None, pixelated: bool = False
) -> Picture:
    """
    An image inside of a page.

    Args:
        pixels: uint8 (H, W, 3).
        alt, label, mark, pixelated: of `Picture`.
        kind: "jpeg" or "png"; None for the smaller of them: JPEG for photographs, PNG for tiny ones.
    """
    height, width = pixels.shape[:2]
    if kind is None:
        kind = "png" if max(height, width) <= 64 else "jpeg"
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **({"quality": 85} if kind == "jpeg" else {"optimize": True}))
    source = f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
    return Picture(source, width, height, alt, label, mark, pixelated)
