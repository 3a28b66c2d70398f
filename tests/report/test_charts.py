"""Charts as elements of a page: of their own ids, in its colours, with text as it is written."""

import re

import pytest
from PIL import Image

from mocov3_hf.report.charts import LIGHT, PNG_DPI, make_chart, plain


@pytest.fixture
def chart(tmp_path):
    def make(name="loss", text="a & $b_c$ <i>"):
        def draw(figure, palette):
            axes = figure.subplots()
            axes.plot([0, 1], [0, 1], color=palette.series[0], marker="o")
            axes.axhspan(0, 0.5, color=palette.bad, alpha=0.2)
            axes.imshow([[0.0, 1.0]], extent=(0, 1, 0, 1))
            axes.set_title(plain(text), color=palette.ink)

        return make_chart(name, draw, tmp_path, title="T", caption="C", alt='line of "a" <b>', size=(4, 2))

    return make


def test_ids_differ_between_charts_and_every_reference_resolves(chart):
    one, other = str(chart("one").svg), str(chart("other").svg)
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (one, other)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for svg, own in zip((one, other), ids, strict=True):
        assert set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg)) == own


def test_every_colour_is_one_of_the_page(chart):
    svg = re.sub(r'"data:[^"]*"', "", str(chart().svg))
    assert "var(--chart-0)" in svg
    assert "var(--chart-bad)" in svg
    colors = set(re.findall(r"#[0-9a-fA-F]{6}\b", svg))
    assert colors <= {"#000000"}  # of markers' shapes, painted over where they are used


def test_nothing_of_a_document_is_left(chart):
    svg = str(chart().svg)
    assert svg.startswith("<svg viewBox=")
    for foreign in ("<?xml", "<!DOCTYPE", "<metadata", "<style", "http"):
        assert foreign not in svg
    assert 'aria-label="line of &#34;a&#34; &lt;b&gt;"' in svg


def test_text_is_text_and_no_formula(chart):
    svg = str(chart(text="a & $b_c$ <i>").svg)
    assert "a &amp; $b_c$ &lt;i&gt;</text>" in svg


def test_one_chart_is_the_same_twice(chart):
    assert chart() == chart()


def test_png_for_a_card(chart, tmp_path):
    chart("card")
    with Image.open(tmp_path / "card.png") as picture:
        assert picture.size == (4 * PNG_DPI, 2 * PNG_DPI)
        assert picture.convert("RGB").getpixel((0, 0)) == tuple(bytes.fromhex(LIGHT.paper[1:]))
