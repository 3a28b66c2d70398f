"""Charts and galleries: SVG with ids of its own, in the colors of the page, with text as it is written; PNG files."""

import re
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from PIL import Image

from mocov3_hf.report.parts import (
    BAD,
    CHART_STYLE,
    INK,
    PAPER,
    PNG_DPI,
    SERIES,
    TILE,
    Picture,
    finish_chart,
    new_figure,
    save_sheet,
)


@pytest.fixture
def chart(tmp_path):
    @matplotlib.rc_context(CHART_STYLE)
    def make(name="loss", text="a & $b_c$ <i>"):
        figure = new_figure((4, 2))
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=SERIES[0], marker="o")
        axes.axhspan(0, 0.5, color=BAD, alpha=0.2)
        axes.imshow([[0.0, 1.0]], extent=(0, 1, 0, 1))
        axes.set_title(text)
        return finish_chart(figure, name, tmp_path, title="T", caption="C", alt='line of "a" <b>')

    return make


def test_ids_are_unique_in_the_page_and_every_reference_resolves(chart):
    one, other = str(chart("one").svg), str(chart("other").svg)
    ids = [re.findall(r'\bid="([^"]+)"', svg) for svg in (one, other)]
    assert ids[0]
    assert len(set(ids[0] + ids[1])) == len(ids[0] + ids[1])
    for svg, own in zip((one, other), ids, strict=True):
        used = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg))
        assert used
        assert used <= set(own)


def test_every_color_is_a_variable_of_the_page(chart):
    svg = re.sub(r'"data:[^"]*"', "", str(chart().svg))
    for variable in ("--chart-0", "--chart-bad", "--chart-ink", "--chart-muted"):
        assert f"var({variable})" in svg
    colors = set(re.findall(r"#[0-9a-fA-F]{6}\b", svg))
    assert colors <= {"#000000"}  # default of marker shapes, overridden where they are used


def test_svg_is_a_single_element_without_foreign_content(chart):
    svg = str(chart().svg)
    assert svg.startswith("<svg viewBox=")
    for foreign in ("<?xml", "<!DOCTYPE", "<metadata", "<style", "http", "xlink"):
        assert foreign not in svg
    assert 'aria-label="line of &#34;a&#34; &lt;b&gt;"' in svg
    assert ElementTree.fromstring(svg).tag == "svg"


def test_text_is_text_and_not_a_formula(chart):
    assert "a &amp; $b_c$ &lt;i&gt;</text>" in str(chart(text="a & $b_c$ <i>").svg)


def test_text_that_looks_like_a_color_stays(chart):
    assert f"{INK}</text>" in str(chart(text=INK).svg)


def test_a_chart_is_reproducible(chart):
    assert chart() == chart()


def test_png_of_a_chart(chart, tmp_path):
    chart("card")
    with Image.open(tmp_path / "card.png") as picture:
        assert picture.size == (4 * PNG_DPI, 2 * PNG_DPI)
        assert picture.convert("RGB").getpixel((0, 0)) == tuple(bytes.fromhex(PAPER[1:]))


def test_png_of_a_gallery_keeps_the_order_and_the_cells_of_grids(tmp_path):
    colors = np.eye(3, dtype=np.uint8) * 255
    strips = [("a", [Picture(np.tile(color, (5, 7, 1)), "") for color in colors[:2]])]
    grid = np.zeros((2, 2, 3), dtype=np.uint8)
    grid[0, 0] = 255
    strips.append(("b", [Picture(np.tile(colors[2], (9, 4, 1)), ""), Picture(grid, "", is_grid=True)]))
    save_sheet(strips, tmp_path / "sheet.png", per_row=2)
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.array(sheet.convert("RGB"))
    assert pixels.shape == (2 * TILE + 18, 2 * TILE + 18, 3)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    middle = 6 + TILE // 2
    for place, color in zip(((0, 0), (0, 1), (1, 0)), colors, strict=True):
        row, column = (middle + index * (TILE + 6) for index in place)
        assert pixels[row, column].tolist() == color.tolist()
    tile = pixels[12 + TILE : 12 + 2 * TILE, 12 + TILE : 12 + 2 * TILE]
    assert set(np.unique(tile)) == {0, 255}  # not smoothed
    assert (tile == 255).mean() == 0.25
