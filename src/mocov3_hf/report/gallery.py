"""The page of `mocov3 neighbors`: near-duplicates, outliers and nearest images with their pictures."""

from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import numpy as np

from .page import render
from .parts import Gallery, Picture, Section, Table, Text, percent, shorten, shown_name


# Pictures of a group or of a query; the tables have all.
MOST_PICTURES = 12
MOST_BAD_IMAGES = 20
# In place of an image that cannot be read any more.
NO_PICTURE = np.full((64, 64, 3), 128, dtype=np.uint8)

Rows = list[tuple[int, float]]


def render_neighbors(
    summary: dict[str, Any],
    names: list[str],
    picture: Callable[[int], np.ndarray | None],
    groups: list[Rows],
    outliers: Rows,
    queries: list[tuple[str, np.ndarray | None, Rows]],
    bad_images: list[dict[str, str]],
) -> str:
    """
    One self-contained HTML document.

    Args:
        summary: As `summary.json`.
        names: Of all images, by row.
        picture: A small picture of a row, uint8 (h, w, 3); None if it cannot be read.
        groups: Near-duplicates that are shown: rows with the similarity to the nearest.
        outliers: Rows with the mean distance to the neighbors.
        queries: Name, picture, and nearest rows with similarities.
        bad_images: `{"image", "reason"}` of those without features.
    """
    missing: list[str] = []

    def shown(pixels: np.ndarray | None, name: str, label: str, mark: str = "") -> Picture:
        if pixels is None:
            missing.append(name)
            pixels, label = NO_PICTURE, f"cannot be read: {label}"
        return Picture(pixels, f"Image {name}", label, mark)

    def of_row(row: int, value: float) -> Picture:
        name = short(names[row])
        return shown(picture(row), name, f"{value:.4f} {shorten(name, 30)}")

    sections = []
    if groups:
        strips = []
        for rows in groups:
            values = [value for _, value in rows]
            title = f"{len(rows)} images, similarity {min(values):.4f} to {max(values):.4f}"
            title += f", {MOST_PICTURES} shown" if len(rows) > MOST_PICTURES else ""
            strips.append((title, [of_row(*row) for row in rows[:MOST_PICTURES]]))
        caption = (
            f"Groups of images connected by a cosine similarity of at least {summary['threshold']:g}; the number is"
            " the similarity to the nearest other image. If groups hold different images, raise --threshold; if copies"
            " are missing, lower it."
        )
        shown_of = f"The {len(groups)} largest of {summary['groups']:,} groups; duplicates.csv lists all."
        parts = [Text(shown_of)] if len(groups) < summary["groups"] else []
        sections.append(Section("duplicates", "Near-duplicates", [*parts, Gallery(strips, caption)]))
    if outliers:
        caption = (
            f"The images farthest from all others, with the mean cosine distance to their {summary['k']} neighbors."
            " Look for images that do not belong to the data: broken downloads, blank pages, other subjects."
        )
        number = summary["outliers"]
        title = f"The first {number:,} are far from all others." if 0 < number < len(outliers) else ""
        strip = (title, [of_row(*row) for row in outliers])
        sections.append(Section("outliers", "Outliers", [Gallery([strip], caption)]))
    strips = []
    for name, pixels, rows in queries:
        first = shown(pixels, short(name), shorten(short(name), 30), "query")
        strips.append(("", [first, *(of_row(*row) for row in rows[: MOST_PICTURES - 1])]))
    what = "A query (first)" if summary["queries"] else "Some images of the data (first)"
    caption = f"{what} and the most similar images, with cosine similarity."
    sections.append(Section("nearest", "Nearest images", [Gallery(strips, caption)]))
    if bad_images:
        listed = [[short(bad["image"]), bad["reason"]] for bad in bad_images[:MOST_BAD_IMAGES]]
        more = f" The first {MOST_BAD_IMAGES}." if len(bad_images) > MOST_BAD_IMAGES else ""
        table = Table(["image", "reason"], listed, f"Images that could not be decoded, which have no features.{more}")
        sections.append(Section("bad", "Images that could not be decoded", [table]))
    notes = [f"{counted(len(missing), 'picture')}, such as {missing[0]}."] if missing else []
    return render(
        title="Neighbors",
        lead=f"Near-duplicates, outliers and nearest images among {summary['images']:,} images.",
        facts=facts(summary),
        findings=findings(summary),
        notes=notes,
        sections=sections,
    )


def short(name: str) -> str:
    """The last two parts of a path: the class folder and the file."""
    return "/".join(PurePath(name).parts[-2:]) or name


def facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What was searched, and how."""
    return [
        ("images", f"{summary['images']:,}"),
        ("model", shown_name(summary["model"])),
        ("similarity of near-duplicates", f"at least {summary['threshold']:g}"),
        ("this threshold", summary["threshold_chosen"]),
        ("neighbors per image", f"{summary['k']}"),
        ("search", f"exact, {summary['backend']}"),
    ]


def findings(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What to look at."""
    images, similar, groups = summary["images"], summary["near_duplicates"], summary["groups"]
    if similar:
        left = images - similar + groups
        share, of = percent(similar / images), counted(groups, "group")
        text = f"{similar:,} images ({share}) are near-duplicates, in {of}: with one of each group, {left:,} are left."
        found = [("look", text)]
    else:
        found = [("good", "No near-duplicates.")]
    if summary["outliers"]:
        found.append(("look", f"Far from all others: {counted(summary['outliers'], 'image')}."))
    else:
        found.append(("good", "No image is far from all others."))
    if summary["bad_images"]:
        found.append(("bad", f"Could not be decoded: {counted(summary['bad_images'], 'image')}."))
    if summary["bad_queries"]:
        found.append(
            ("bad", f"Could not be decoded: {', '.join(map(short, summary['bad_queries'][:5]))} of the queries.")
        )
    return found


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
