"""The report in a real browser: nothing on the console, nothing loaded, nothing beyond the edge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.chromium import Chromium, require_chromium
from tests.helpers.sample_results import SUBJECT, cell, sample_results
from vitdeploy.benchmark.report import html_text

pytestmark = pytest.mark.slow

PLOTS = """
[...document.querySelectorAll('figure.plot')].map(figure => {
  const svg = figure.querySelector('svg'), box = svg.getBoundingClientRect();
  const title = document.getElementById(svg.getAttribute('aria-labelledby'));
  return [figure.querySelector('figcaption').textContent, title.textContent, box.width, box.height,
    svg.querySelectorAll('path, use').length, box.right <= innerWidth];
})"""
BEYOND = "[document.scrollingElement.scrollWidth, window.innerWidth]"
COLOURS = """
[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor,
 getComputedStyle(document.querySelector('figure.plot svg text')).fill]"""
OFF_COLOUR = """
[...document.querySelectorAll('.plot :is(.line, .mark) > path, .plot :is(.line, .mark) use')].filter(drawn =>
  getComputedStyle(drawn).stroke !== getComputedStyle(drawn.closest('[class]')).color).length
+ document.querySelectorAll('.plot defs [style]').length"""
SERIES = """
new Set([...document.querySelectorAll('.plot .line')].map(line => getComputedStyle(line).color)).size"""
SMALLEST_TEXT = """
Math.min(...[...document.querySelectorAll('figure.plot svg text')].map(
  text => parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a))"""
CLIPPED = """
[...document.querySelectorAll('figure.plot svg')].flatMap(svg => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(text => {
    const at = text.getBoundingClientRect();
    return at.left < box.left - 1 || at.right > Math.max(box.right, innerWidth) + 1
      || at.top < box.top - 1 || at.bottom > box.bottom + 1;
  }).map(text => text.textContent);
})"""
LIGHT, DARK = "rgb(255, 255, 255)", "rgb(20, 23, 27)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium.start(require_chromium(), tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(html_text(sample_results()), encoding="utf-8")
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375, 360])
def test_the_report(browser: Chromium, report: Path, width: int, dark: bool) -> None:
    browser.open(report.as_uri(), width=width, height=800, dark=dark)
    assert browser.complaints == []
    assert browser.requested == [report.as_uri()]
    assert browser.evaluate("document.title") == "How fast vit_base_patch16_224 runs"
    needed, given = browser.evaluate(BEYOND)
    assert needed <= given == width
    plots = browser.evaluate(PLOTS)
    assert len(plots) == 8
    for caption, title, plot_width, height, shapes, inside in plots:
        assert caption == title
        assert plot_width > 300
        assert height > 150
        assert shapes > 10
        assert inside, caption
    assert browser.evaluate(CLIPPED) == []
    assert browser.evaluate(SMALLEST_TEXT) > 8.5
    ink, paper, text = browser.evaluate(COLOURS)
    assert paper == (DARK if dark else LIGHT)
    assert text == ink != paper
    assert browser.evaluate(OFF_COLOUR) == 0, "a style of matplotlib's own hides the page's"
    assert browser.evaluate(SERIES) == 5 + 2, "backends, what is wrong, and ink"


def test_hostile_and_endless_names(browser: Chromium, tmp_path: Path) -> None:
    name = "<script>console.log('seen')</script><img src=x onerror=console.log(1)>" + "W" * 200
    subject = SUBJECT.model_copy(update={"name": name, "model": name, "digest": name})
    cells = tuple(cell(subject=name, artifact=name, batch=batch, disturbed=(name,)) for batch in (1, 8))
    path = tmp_path / "report.html"
    path.write_text(html_text(sample_results(subjects=(subject,), cells=cells, notes=(name,), command=name)))
    browser.open(path.as_uri(), width=360, height=800)
    assert browser.complaints == []
    assert browser.requested == [path.as_uri()]
    needed, given = browser.evaluate(BEYOND)
    assert needed <= given


def test_the_browser_reports_what_these_tests_look_for(browser: Chromium, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("<script>console.warn('w'); undefined_name()</script><img src='absent.png'>")
    browser.open(path.as_uri(), width=360, height=800)
    assert len(browser.complaints) >= 2
    assert browser.requested == [path.as_uri(), (tmp_path / "absent.png").as_uri()]
