"""The HTML report: what it says, of anything that may stand in a measurement."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, given, settings

from tests.helpers.result_strategies import measurements
from tests.helpers.sample_results import SUBJECT, cell, failed_parity, parity, sample_results
from vitdeploy.benchmark.compare import ComparedCell, ResultsComparison, SpeedVerdict
from vitdeploy.benchmark.plots import COLOURS
from vitdeploy.benchmark.report import html_text
from vitdeploy.benchmark.results import Results
from vitdeploy.errors import MissingDependency

VOID = ("meta", "link", "br", "img", "input", "hr")
STRAY = r"<script|<img|<iframe|<object|@import|https?://(?!www\.w3\.org/)"


class Page(HTMLParser):
    """Text by element, and every id; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.refers: list[str] = []
        self.classes: list[str] = []
        self.text: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.refers += (given.get("aria-labelledby") or "").split()
        self.refers += re.findall(r"url\(#([^)]+)\)", str(attrs))
        if (given.get("href") or "").startswith("#"):
            self.refers.append((given["href"] or "")[1:])
        self.classes += (given.get("class") or "").split()
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append((self.open[-1] if self.open else "", " ".join(data.split())))

    def of(self, tag: str) -> list[str]:
        return [text for where, text in self.text if where == tag]


def checked(html: str) -> Page:
    """The page, after what must hold of every one."""
    page = Page(html)
    assert len(set(page.ids)) == len(page.ids)
    assert set(page.refers) <= set(page.ids)
    assert not re.search(STRAY, html, re.IGNORECASE)
    assert html.count("<h1>") == 1
    return page


@pytest.fixture(scope="module")
def sample() -> str:
    return html_text(sample_results())


def test_the_answer_comes_first(sample: str) -> None:
    page = checked(sample)
    words = [text for _, text in page.text]
    lead = words.index(
        "openvino onnx-bf16 is the fastest verified choice at every batch size, "
        "3.10 to 3.64 times as fast as PyTorch eager in fp32."
    )
    assert lead < words.index("Batch 1") < words.index("31.0") < words.index("3.10×") < words.index("Batch 8")
    assert words.index("Batch 8") < words.index("187") < words.index("3.50×")
    assert "next: torch-compile weights-bf16, 330 ms" in words
    assert words.index("Batch 32") < words.index("Plots")
    assert page.of("title")[0] == page.of("h1")[0] == "How fast vit_base_patch16_224 runs"


def test_every_plot_has_a_name(sample: str) -> None:
    page = checked(sample)
    assert page.of("figcaption") == [
        "Latency against batch",
        "Throughput against batch",
        *(
            f"{what}, batch {batch}"
            for batch in (1, 8, 32)
            for what in ("Every timed call", "Error against latency")
        ),
    ]
    assert sample.count('<svg viewBox="') == sample.count('role="img"') == 8
    assert "currentColor" in sample
    assert "var(--series-4)" in sample


def test_every_colour_is_in_the_style_sheet(sample: str) -> None:
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", sample)) <= set(re.findall(r"(--[a-z0-9-]+):", sample))
    for scheme in range(COLOURS):
        assert sample.count(f"--series-{scheme}:") == 2


@pytest.mark.slow
def test_wrong_cells_are_struck_through_and_not_ranked(sample: str) -> None:
    row = re.search(r'<tr class="wrong">(.*?)</tr>', sample, re.DOTALL)
    assert row is not None
    assert "aotinductor aoti-bf16" in row[1]
    assert ">260<" in row[1]
    assert "×" not in row[1]
    assert "wrong outputs: not ranked" in sample
    assert "relative error 8.3e-01 above 1.0e-02" in sample
    fast_and_wrong = html_text(sample_results(cells=(cell(p50_ms=1.0, parity=failed_parity("fp32")),)))
    assert "Nothing to choose: no cell was measured and right." in checked(fast_and_wrong).of("p")
    assert "card" not in checked(fast_and_wrong).classes


def test_what_went_wrong_is_told(sample: str) -> None:
    words = [text for _, text in checked(sample).text]
    assert "failed: out of memory: the process was ended by the system" in words
    assert "⚠ disturbed: another process took 11 % of the processor; measured again 2×" in words
    assert "no NVIDIA GPU answers" in words
    assert "Weights are random: accuracy says nothing about a trained model." in words
    assert any(
        "Of 30 cells, 28 verified, 1 with wrong outputs, 1 failed, 1 disturbed." in text for text in words
    )
    assert "Partial results." not in words


def test_partial_results_say_so() -> None:
    page = checked(html_text(sample_results(partial=True, cells=())))
    assert "Partial results." in page.of("strong")
    assert "Nothing was measured: there are no cells." in page.of("p")
    assert page.of("figcaption") == []


@pytest.mark.slow
def test_the_same_measurement_gives_the_same_page(sample: str) -> None:
    assert html_text(sample_results()) == sample


@pytest.mark.slow
def test_one_cell_without_a_baseline() -> None:
    page = checked(html_text(sample_results(cells=(cell(p50_ms=80.0),))))
    assert page.of("p")[2] == (
        "onnxruntime onnx-fp32 is the fastest verified choice at batch 1. "
        "PyTorch eager in fp32 was not measured, so there is no speed-up to tell."
    )
    assert len(page.of("figcaption")) == 4


@pytest.mark.slow
def test_different_choices_and_none() -> None:
    cells = (
        cell(backend="torch", artifact="weights", p50_ms=10.0),
        cell(batch=8, p50_ms=50.0),
        cell(batch=32, status="failed", reason="out of memory"),
    )
    page = checked(html_text(sample_results(cells=cells)))
    assert page.of("p")[2] == (
        "The fastest verified choices: at batch 1 torch weights; at batch 8 onnxruntime onnx-fp32 "
        "(none at batch 32)."
    )
    assert "PyTorch eager itself" in page.of("small")


def test_all_failed() -> None:
    page = checked(html_text(sample_results(cells=(cell(status="failed", reason="no memory"),))))
    assert page.of("figcaption") == []
    assert "failed: no memory" in page.of("div")


@pytest.mark.slow
def test_names_are_strangers_text() -> None:
    bad = "<script>alert(1)</script>"
    cells = tuple(
        cell(subject=bad, artifact=f"{bad}\"'&{n}", batch=n, p50_ms=5.0, executes=bad) for n in (1, 2)
    )
    subject = SUBJECT.model_copy(update={"name": bad, "model": bad, "digest": bad})
    html = html_text(sample_results(cells=cells, subjects=(subject,), notes=(bad,), command=bad))
    assert "<script" not in html
    page = checked(html)
    assert page.of("title")[0] == page.of("h1")[0] == f"How fast {bad} runs"
    assert f"onnxruntime {bad}\"'&1" in page.of("text")


@pytest.mark.slow
def test_labels_are_neither_mathematics_nor_cut_off() -> None:
    names = ("$x_1^2$", "日本語", "x" * 300)
    page = checked(html_text(sample_results(cells=tuple(cell(artifact=n, p50_ms=5.0) for n in names))))
    shown = page.of("text")
    assert "onnxruntime $x_1^2$" in shown
    assert "onnxruntime 日本語" in shown
    assert f"onnxruntime {'x' * 37}…" in shown


@pytest.mark.slow
def test_several_models_threads_and_callers() -> None:
    small = SUBJECT.model_copy(update={"name": "ti", "model": "vit_tiny_patch16_224"})
    cells = [
        cell(subject=subject, threads=threads, concurrency=callers, p50_ms=10.0 * threads * callers)
        for subject in ("vit-b16", "ti")
        for threads in (1, 2)
        for callers in (1, 4)
    ]
    page = checked(html_text(sample_results(cells=tuple(cells), subjects=(SUBJECT, small))))
    assert page.of("h1") == ["How fast vit_base_patch16_224 and vit_tiny_patch16_224 run"]
    assert page.of("h3").count("vit_tiny_patch16_224, 224×224") == 3
    assert len(page.of("figcaption")) == 8
    assert "onnxruntime onnx-fp32, 2 threads, 4 callers" in page.of("span")


def compared(label: str, verdict: SpeedVerdict, *ratio: float, reason: str = "") -> ComparedCell:
    """A cell whose ratio and interval these are, if they are given."""
    value, low, high = ratio or (None, None, None)
    return ComparedCell(
        subject="vit-b16", label=label, batch=8, threads=None, concurrency=1, verdict=verdict, reason=reason,
        old_ms=190.0 if value else None, new_ms=value and 190.0 * value, ratio=value, low=low, high=high,
    )  # fmt: skip


@pytest.mark.slow
def test_a_comparison_is_shown(sample: str) -> None:
    rows = (
        compared("openvino onnx-bf16", "same", 0.984, 0.97, 1.0),
        compared("torch weights", "slower", 1.2, 1.1, 1.3),
        compared("gone", "not comparable", reason="other <machine>"),
    )
    found = ResultsComparison(tolerance=0.05, rows=rows, summary="1 slower, 1 same <b>")
    page = checked(html_text(sample_results(cells=(cell(),)), found))
    assert "1 slower, 1 same <b>" in page.of("p")
    assert {"slower", "1.100 to 1.300", "other <machine>", "228.00"} <= set(page.of("td"))
    assert "slower" in page.classes
    assert "Compared with before" not in sample
    checked(html_text(sample_results(cells=()), found.model_copy(update={"rows": ()})))


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingDependency, match=library) as caught:
        html_text(sample_results())
    assert caught.value.hint == 'pip install "vitdeploy[report]"'


@pytest.mark.slow
def test_a_hundred_cells() -> None:
    cells = tuple(
        cell(
            backend=f"backend{n % 10}",
            artifact=f"artifact{n // 10 % 5}",
            batch=1 + n // 50,
            p50_ms=10.0 ** (n % 7 - 2),
            parity=parity(relative=0.0 if n % 3 else 1e-9),
        )
        for n in range(100)
    )
    page = checked(html_text(sample_results(cells=cells)))
    assert len(page.of("figcaption")) == 6
    assert page.of("th").count("batch") == 2


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(measurements(most_cells=4))
def test_any_measurement_has_a_report(results: Results) -> None:
    checked(html_text(results))
