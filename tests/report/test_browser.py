"""The page as a person opens it: from the disk, in a browser, on a telephone and on a desk."""

import pytest

from mocov3_hf.report import write
from tests.factories import save_run, save_trained_classifier
from tests.report.browser import Browser, find_chromium


pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium or Chrome on the PATH to open the page in"),
]


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
    outside = browser.run(
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') &&"
        " e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert outside == []


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
