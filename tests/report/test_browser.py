"""The page as a person opens it: from the disk, in a browser, on a telephone and on a desk."""

import pytest

from mocov3_hf.report import write
from tests.factories import save_run, save_trained_classifier
from tests.report.browser import Browser, find_chromium


pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium or Chrome on the PATH to open the page in"),
]


# Elements that reach beyond the window, and tables and charts that must be scrolled to be seen whole.
CUT = (
    "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1"
    " || (e.matches('.scroll') && e.scrollWidth > e.clientWidth + 1)).map(e => e.outerHTML.slice(0, 80))"
)


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module", params=[save_run, save_trained_classifier], ids=["run", "classifier"])
def page(request, labeled, tmp_path_factory):
    folder = request.param(tmp_path_factory.mktemp("page") / "a <i>folder & more")
    write.main([str(folder), "--dataset_name", str(labeled), "--num_images", "15"])
    return (folder / "report.html").as_uri()


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
def test_page(width, page, browser):
    browser.show(width)
    browser.open(page)
    assert browser.requests == [page]
    assert browser.complaints == []
    assert browser.run("document.documentElement.scrollWidth") <= width
    sizes = browser.run("Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))")
    assert len(sizes) > 50
    assert min(sizes) > 0
    links = browser.run("[...document.querySelectorAll('nav a')].map(a => document.querySelector(a.hash) !== null)")
    assert len(links) > 6
    assert all(links)
    assert browser.run(CUT) == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
def test_comparison(width, browser, tmp_path):
    folders = [save_run(tmp_path / f"a <i>run & more {number}") for number in range(3)]
    (folders[1] / "recipe.yaml").write_text((folders[1] / "recipe.yaml").read_text() + "blur_sigma: [0.25, 4.0]\n")
    write.main(list(map(str, folders)))
    browser.show(width)
    browser.open((tmp_path / "comparison.html").as_uri())
    assert browser.complaints == []
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(CUT) == []
    assert "blur_sigma" in browser.run("document.body.innerText")


@pytest.mark.slow
def test_the_values_of_a_chart_appear_at_the_pointer(page, browser):
    browser.show(1400)
    browser.open(page)
    marks = "document.querySelectorAll('#chart-loss .hover g')"
    place = f"(() => {{ const r = {marks}[1].getBoundingClientRect(); return [r.x + r.width / 2, r.y + 9]; }})()"
    browser.run("document.documentElement.style.scrollBehavior = 'auto'")
    browser.run("document.querySelector('#chart-loss').scrollIntoView()")
    x, y = browser.run(place)
    assert browser.run(f"document.elementFromPoint({x}, {y}).parentNode.querySelector('title').textContent")
    opacity = f"[...{marks}].map(e => getComputedStyle(e.querySelector('circle')).opacity)"
    assert set(browser.run(opacity)) == {"0"}
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    shown = browser.run(opacity)
    assert (shown[1], shown.count("1")) == ("1", 1)


@pytest.mark.slow
def test_following_a_link_of_the_contents_leads_to_its_section(page, browser):
    browser.show(1400)
    browser.open(page)
    browser.run("document.documentElement.style.scrollBehavior = 'auto'")
    browser.run("document.querySelector('nav a[href=\"#neighbors\"]').click()")
    assert abs(browser.run("document.querySelector('#neighbors').getBoundingClientRect().top")) < 60


@pytest.mark.slow
def test_names_of_classes_are_text(page, browser):
    browser.open(page)
    assert browser.run("document.title") != "x"
    assert "<b>bold</b>" in browser.run("document.body.innerText")
    assert browser.run("document.querySelectorAll('main b, main script').length") == 0


@pytest.mark.slow
def test_charts_can_be_read_in_the_light_and_in_the_dark(page, browser):
    """Contrast of text and background, by the formula of WCAG 2: 4.5 and more."""
    contrast = """(() => {
      const light = color => {
        const parts = color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255);
        const linear = parts.map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
      };
      const paper = light(getComputedStyle(document.body).backgroundColor);
      const ratio = color => (Math.max(light(color), paper) + 0.05) / (Math.min(light(color), paper) + 0.05);
      return [...document.querySelectorAll('svg text, main p, main dd, figcaption')]
        .map(e => ratio(getComputedStyle(e)[e.tagName == 'text' ? 'fill' : 'color']));
    })()"""
    papers = []
    for dark in (False, True):
        browser.show(1400, dark=dark)
        browser.open(page)
        papers.append(browser.run("getComputedStyle(document.body).backgroundColor"))
        ratios = browser.run(contrast)
        assert len(ratios) > 40
        assert min(ratios) > 4.5
    assert papers[0] != papers[1]
