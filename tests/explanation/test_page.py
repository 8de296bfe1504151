"""The page: whole, light, and right in a browser; the folder beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.chromium import Chromium, require_chromium
from tests.helpers.models import CONFIGS
from tests.helpers.pictures import picture
from tests.helpers.swins import SWINS
from tests.helpers.weights_bundles import SPEC, write_weights
from vitdeploy.config import ModelConfig
from vitdeploy.explanation.figures import Explanation
from vitdeploy.explanation.run import MARKER, run_explain

pytestmark = pytest.mark.slow
MOST_BYTES = 3_000_000
KINDS: dict[str, ModelConfig] = {
    # As many blocks and heads as ViT-B/16 at 224 pixels, and its 14 x 14 patches: what the page's size is of.
    "base": replace(CONFIGS["dinov2"], image_size=(224, 224), patch_size=16, depth=12, heads=12),
    "swin": SWINS["v1"],
    "headless": CONFIGS["no_head"],
}
ALT = "[...document.images].filter(image => !image.alt || !image.naturalWidth || !image.complete).length"
BEYOND = "[document.scrollingElement.scrollWidth, window.innerWidth]"
COLOURS = "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"


class Reader(HTMLParser):
    """What a page's tags refer to, and whether every one is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action", "poster"):
                (self.links if tag == "a" else self.loads).append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def made(folder: Path) -> dict[str, Explanation]:
    """An explanation of one image with each."""
    picture(3, (300, 400)).save(folder / "photo & <b>.png")
    found = {}
    for kind, config in KINDS.items():
        bundle = write_weights(
            folder / f"{kind}.bundle", config, preprocess=replace(SPEC, size=config.image_size)
        )
        found[kind] = run_explain(bundle, [folder / "photo & <b>.png"], folder / kind)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_whole(made: dict[str, Explanation], kind: str) -> None:
    explanation = made[kind]
    assert explanation.folder is not None
    text = (explanation.folder / "index.html").read_text(encoding="utf-8")
    assert len(text.encode()) <= MOST_BYTES
    reader = Reader(text)
    assert reader.open == []
    assert all(address.startswith(("data:", "#")) for address in reader.loads)
    assert all(address.startswith("https://arxiv.org/abs/") for address in reader.links)
    assert "<script" not in text
    assert "photo &amp; &lt;b&gt;.png" in text
    for left in explanation.left_out:
        assert left.figure in text


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_has_what_is_said(made: dict[str, Explanation], kind: str) -> None:
    explanation = made[kind]
    assert explanation.folder is not None
    found = {
        p.relative_to(explanation.folder).as_posix() for p in explanation.folder.rglob("*") if p.is_file()
    }
    assert found == set(explanation.files)
    for name in found:
        if name.endswith(".png"):
            with Image.open(explanation.folder / name) as image:
                assert image.format == "PNG"
                assert min(image.size) > 20
    names = {name.rpartition("/")[2] for name in found}
    expected = {"input.png", "attention.png", "norms.png", "distance.png", "precision.png", "filters.png"}
    assert names >= expected
    assert ("rollout.png" in names) == (kind != "swin")
    assert any(name.startswith("relevance") for name in names) == (kind == "base")
    document = json.loads((explanation.folder / MARKER).read_text(encoding="utf-8"))
    assert document["generator"].startswith("vitdeploy")
    assert len(document["distances"]) == KINDS[kind].depth
    assert set(document["files"]) == found


def test_a_zero_shot_classifier_shows_what_speaks_for_each_label(folder: Path) -> None:
    labels = tuple(f"label <{number}>" for number in range(10))
    config = CONFIGS["zero_shot"]
    bundle = write_weights(folder / "zero.bundle", config, labels=labels)
    found = run_explain(bundle, [picture(0), picture(1)], html=folder / "zero.html")
    text = (folder / "zero.html").read_text(encoding="utf-8")
    assert Reader(text).open == []
    for image in found.images:
        assert [shown.label for shown in image.relevance][:5] == list(image.predictions)
        assert len(image.relevance) == 6
        for shown in image.relevance:
            assert f"Relevance for label &lt;{shown.label.index}&gt;" in text
    # Two images: what is large is folded, and distances are the mean of both.
    assert text.count("<details>") == 4
    both = [image.distances[0][0] for image in found.images]
    assert found.distances[0][0] == pytest.approx(sum(both) / 2)
    assert (found.folder, found.files, found.html) == (None, (), folder / "zero.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium.start(require_chromium(), tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("kind", ["base", "swin"])
def test_in_a_browser(
    browser: Chromium, made: dict[str, Explanation], kind: str, width: int, dark: bool
) -> None:
    page = (made[kind].folder or Path()) / "index.html"
    browser.open(page.as_uri(), width=width, height=800, dark=dark)
    assert browser.complaints == []
    assert [url for url in browser.requested if not url.startswith("data:")] == [page.as_uri()]
    assert browser.evaluate("document.title") == "What tiny looks at"
    needed, given = browser.evaluate(BEYOND)
    assert needed <= given == width
    assert browser.evaluate(ALT) == 0
    ink, paper = browser.evaluate(COLOURS)
    assert (ink, paper) == (
        ("rgb(230, 233, 237)", "rgb(20, 23, 27)") if dark else ("rgb(27, 31, 36)", "rgb(255, 255, 255)")
    )
