"""The status page in a real browser: an image is dropped, bars appear; what goes wrong is said."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import vitdeploy
from tests.helpers.chromium import Chromium, require_chromium
from tests.helpers.live_server import PATIENCE, Live
from tests.helpers.processes import wait_for
from vitdeploy.predictor import Predictor

pytestmark = pytest.mark.slow

DROP = """
(() => {
  const bytes = Uint8Array.from(atob(%s), c => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], 'image', { type: %s }));
  document.getElementById('drop').dispatchEvent(
    new DragEvent('drop', { dataTransfer: transfer, bubbles: true, cancelable: true }));
})()"""
CHOOSE = """
(() => {
  const bytes = Uint8Array.from(atob(%s), c => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], 'image', { type: %s }));
  const input = document.getElementById('file');
  input.files = transfer.files;
  input.dispatchEvent(new Event('change'));
})()"""
BARS = """
(() => {
  const texts = name => [...document.querySelectorAll(`#result .${name}`)].map(e => e.textContent);
  const widths = [...document.querySelectorAll('#result .bar')].map(e => e.getBoundingClientRect().width);
  return [texts('name'), texts('score'), widths];
})()"""
ERROR = "document.getElementById('error').textContent"
MODELS = "[...document.querySelectorAll('#model option')].map(o => o.value)"
BEYOND = "[document.scrollingElement.scrollWidth, window.innerWidth]"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium.start(require_chromium(), tmp_path_factory.mktemp("profile")) as started:
        yield started


def png() -> bytes:
    return sorted((Path(vitdeploy.__file__).parent / "data/digits/images").glob("*.png"))[3].read_bytes()


def eventually(browser: Chromium, expression: str) -> object:
    """The first value of an expression that is not empty."""
    found: object = None

    def look() -> object:
        nonlocal found
        found = browser.evaluate(expression)
        return found

    assert wait_for(look, PATIENCE), f"still empty: {expression}"
    return found


def give(browser: Chromium, script: str, data: bytes, kind: str) -> None:
    browser.evaluate(script % (json.dumps(base64.b64encode(data).decode()), json.dumps(kind)))


@pytest.mark.parametrize("script", [DROP, CHOOSE], ids=["dropped", "chosen"])
def test_an_image_becomes_bars(browser: Chromium, live_digits: Live, digits: Path, script: str) -> None:
    browser.open(live_digits.url, width=1200, height=900)
    assert eventually(browser, MODELS) == ["digits"]
    give(browser, script, png(), "image/png")
    eventually(browser, "document.querySelectorAll('#result .bar').length")
    names, scores, widths = browser.evaluate(BARS)
    with Predictor.open(digits) as predictor:
        expected = predictor.predict(png(), top_k=5)[0]
    assert names == [prediction.label for prediction in expected]
    assert scores == [f"{100 * prediction.score:.1f} %" for prediction in expected]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 2 * widths[-1]
    assert browser.evaluate(ERROR) == ""
    assert browser.complaints == []
    assert {address.startswith((live_digits.url, "blob:", "data:")) for address in browser.requested} == {
        True
    }


LOOK = "document.getElementById('look').click()"
SEEN = """
(() => {
  const image = document.getElementById('rollout');
  const shown = !image.hidden && image.complete && image.naturalWidth > 0;
  const box = image.getBoundingClientRect(), bars = document.getElementById('result').getBoundingClientRect();
  return shown && [image.naturalWidth, box.left >= bars.right, box.top >= bars.bottom, box.right];
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_where_it_looks_is_shown_on_request(
    browser: Chromium, live_digits: Live, width: int, dark: bool
) -> None:
    browser.open(live_digits.url, width=width, height=900, dark=dark)
    eventually(browser, MODELS)
    give(browser, DROP, png(), "image/png")
    eventually(browser, "document.querySelectorAll('#result .bar').length")
    assert browser.evaluate("document.getElementById('looked').hidden")
    assert not any(":explain" in address for address in browser.requested)
    browser.evaluate(LOOK)
    pixels, beside, below, right = eventually(browser, SEEN)  # type: ignore[misc]
    assert (pixels, beside, below) == (320, width == 1200, width == 390)
    assert right <= width
    assert "whatever the class" in browser.evaluate("document.getElementById('looking').textContent")
    scrolled, window = browser.evaluate(BEYOND)
    assert scrolled <= window
    assert browser.complaints == []
    browser.evaluate(LOOK)
    assert browser.evaluate("document.getElementById('looked').hidden")


def test_where_it_looks_is_said_not_to_apply(browser: Chromium, live: Live) -> None:
    browser.open(live.url, width=390, height=900)
    eventually(browser, MODELS)
    browser.evaluate(LOOK)
    give(browser, DROP, png(), "image/png")
    said = eventually(browser, "document.getElementById('unseen').textContent")
    assert "is a module of somebody's own" in str(said)
    assert browser.evaluate("document.getElementById('looked').hidden")
    assert len(browser.evaluate(BARS)[0]) > 0
    scrolled, window = browser.evaluate(BEYOND)
    assert scrolled <= window


def test_what_is_no_image_is_said(browser: Chromium, live_digits: Live) -> None:
    browser.open(live_digits.url, width=1200, height=900)
    eventually(browser, MODELS)
    give(browser, DROP, b"this is text", "text/plain")
    assert "is not an image that can be read" in str(eventually(browser, ERROR))
    assert browser.evaluate("document.querySelectorAll('#result .bar').length") == 0
    # The browser itself notes the status 400; nothing else is on the console.
    assert [complaint for complaint in browser.complaints if '"source": "network"' not in complaint] == []
    give(browser, DROP, png(), "image/png")
    eventually(browser, "document.querySelectorAll('#result .bar').length")
    assert browser.evaluate(ERROR) == ""


@pytest.mark.parametrize("width, dark", [(1200, False), (1200, True), (390, False), (390, True)])
def test_it_fits(browser: Chromium, live_digits: Live, width: int, dark: bool) -> None:
    browser.open(live_digits.url, width=width, height=800, dark=dark)
    eventually(browser, MODELS)
    scrolled, window = browser.evaluate(BEYOND)
    assert scrolled <= window
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(20, 24, 31)") is dark
    assert browser.complaints == []


def test_the_interface_page(browser: Chromium, live_digits: Live) -> None:
    browser.open(f"{live_digits.url}/docs", width=390, height=800)
    text = browser.evaluate("document.body.innerText")
    for path in ("/v2/models/{model}/infer", "/v1/models/{model}:predict", "/metrics"):
        assert path in text
    scrolled, window = browser.evaluate(BEYOND)
    assert scrolled <= window
    assert browser.complaints == []
