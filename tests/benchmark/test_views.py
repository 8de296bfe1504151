"""What a measurement looks like as CSV and Markdown, and which cell is called the fastest."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given, settings

from tests.helpers.result_strategies import measurements
from tests.helpers.sample_results import cell, failed_parity, parity, sample_results
from vitdeploy.benchmark import wording
from vitdeploy.benchmark.ranking import answers, eager, fastest, groups, members, pareto, ranked, speedup
from vitdeploy.benchmark.results import Cell, Results
from vitdeploy.benchmark.views import csv_text, markdown_text

EAGER = {"backend": "torch", "artifact": "weights"}


def rows(results: Results) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(csv_text(results), newline=""), strict=True))


# Ranking


def test_the_fastest_right_cell_wins() -> None:
    slow, fast = cell(p50_ms=20.0), cell(backend="openvino", p50_ms=10.0)
    wrong = cell(backend="triton", p50_ms=1.0, parity=failed_parity())
    unproven = cell(backend="torch", p50_ms=1.0, parity=None)
    failed = cell(backend="tensorrt", status="failed", reason="gone")
    results = sample_results(cells=(wrong, slow, unproven, fast, failed))
    assert fastest(results, "vit-b16", 1) == fast
    assert ranked(results.cells) == (fast, slow)
    assert fastest(results, "vit-b16", 2) is None
    assert fastest(results, "another", 1) is None


def test_image_sizes_are_different_questions() -> None:
    small, large = cell(p50_ms=5.0, image_size=(160, 160)), cell(p50_ms=9.0)
    results = sample_results(cells=(large, small))
    assert [members(results, group) for group in groups(results)] == [(large,), (small,)]
    assert fastest(results, "vit-b16", 1, (224, 224)) == large
    assert fastest(results, "vit-b16", 1) == small


def test_speedup_is_over_eager_on_the_same_work() -> None:
    measured = cell(p50_ms=20.0, threads=2)
    other_work = [
        cell(**EAGER, p50_ms=60.0, threads=1),
        cell(**EAGER, p50_ms=60.0, threads=2, concurrency=2),
        cell(**EAGER, p50_ms=60.0, threads=2, batch=8),
        cell(**EAGER, p50_ms=60.0, threads=2, image_size=(160, 160)),
        cell(backend="torch", artifact="weights-bf16", precision="bf16", p50_ms=60.0, threads=2),
        cell(**EAGER, p50_ms=60.0, threads=2, parity=failed_parity("fp32")),
    ]
    assert eager(sample_results(cells=(measured, *other_work)), measured) is None
    base = cell(**EAGER, p50_ms=50.0, threads=2)
    over = eager(sample_results(cells=(measured, *other_work, base)), measured)
    assert over == base
    assert speedup(measured, over) == 2.5
    assert speedup(measured, None) is None
    assert speedup(cell(p50_ms=0.0), over) is None


def test_pareto() -> None:
    def point(name: str, p50: float, error: float | None, **changes: object) -> Cell:
        return cell(backend=name, p50_ms=p50, parity=parity(relative=error), **changes)

    best = point("fast", 1.0, 1e-3)
    exact = point("exact", 3.0, 1e-6)
    beaten = point("beaten", 4.0, 1e-5)
    level = point("level", 1.0, 2e-3)
    unknown = point("unknown", 0.5, None)
    other_batch = point("slow", 9.0, 1e-3, batch=8)
    assert pareto([beaten, exact, other_batch, best, level, unknown]) == (best, exact, other_batch)


def test_an_answer_per_batch() -> None:
    results = sample_results()
    found = answers(results.cells, results)
    assert [(a.batch, a.cell.label if a.cell else None) for a in found] == [
        (1, "openvino onnx-bf16"),
        (8, "openvino onnx-bf16"),
        (32, "openvino onnx-bf16"),
    ]
    assert [a.factor for a in found] == pytest.approx([96 / 31, 655 / 187, 2700 / 742])
    # The wrong cell is the second fastest at batch 8.
    assert [a.runner_up.label if a.runner_up else None for a in found] == [
        "aotinductor aoti-bf16",
        "torch-compile weights-bf16",
        "aotinductor aoti-bf16",
    ]


# Wording


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "–"),
        (0.0, "0"),
        (0.0123456, "0.0123"),
        (1.0, "1.00"),
        (9.999, "10.0"),
        (99.96, "100"),
        (742.4, "742"),
        (2344.6, "2,345"),
        (1e9, "1.00e+09"),
        (1e-7, "1.00e-07"),
        (-3.14159, "-3.14"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert wording.number(value) == text


def test_sizes_and_shares() -> None:
    assert [wording.size(n) for n in (None, 12, 3_400, 346_290_000, 25_280_000_000)] == [
        "–", "12 B", "3.40 kB", "346 MB", "25.3 GB",
    ]  # fmt: skip
    assert wording.share(0.8107) == "81.07 %"
    assert wording.share(-0.0006, signed=True) == "−0.06 %"


def test_names_tell_apart_what_varies() -> None:
    one = cell(threads=1)
    assert wording.series(sample_results(cells=(one,)), one) == "onnxruntime onnx-fp32"
    two = cell(threads=None, concurrency=4)
    both = sample_results(cells=(one, two))
    assert wording.series(both, one) == "onnxruntime onnx-fp32, 1 thread, 1 caller"
    assert wording.series(both, two) == "onnxruntime onnx-fp32, default threads, 4 callers"


def test_text_becomes_one_line_without_controls() -> None:
    assert wording.plain(" a\r\n\tb\x00\u202ec\u2028d ") == "a b c d"


# CSV


def test_csv_has_a_row_per_cell_and_no_samples() -> None:
    results = sample_results()
    found = rows(results)
    assert len(found) == len(results.cells)
    first = found[0]
    assert first["model"] == "vit_base_patch16_224"
    assert (first["image_size_height"], first["image_size_width"]) == ("224", "224")
    assert (first["p50_ms"], first["threads"], first["valid"]) == ("96.0", "", "true")
    assert float(first["parity_relative"]) == 6e-7
    assert float(first["accuracy_top1"]) == 0.8107
    assert float(first["startup_load_s"]) == 0.6
    assert first["samples"] == "40"
    assert "samples_ms" not in first
    assert csv_text(results).count("\r\n") == len(found) + 1
    failed = next(row for row in found if row["status"] == "failed")
    assert (failed["p50_ms"], failed["parity_passed"], failed["valid"]) == ("", "", "false")
    assert failed["reason"].startswith("out of memory")


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", " =1", "\r=1", "＝1"])
def test_csv_runs_no_formula(text: str) -> None:
    (row,) = rows(sample_results(cells=(cell(executes=text),)))
    assert row["executes"] == f"'{text}"


def test_csv_keeps_quotes_commas_newlines_and_negative_numbers() -> None:
    text = 'a "quoted", name\nand more'
    odd = cell(executes=text, disturbed=("one", "two"), p50_ms=5.0, mean_ms=-1.5)
    (row,) = rows(sample_results(cells=(odd,)))
    assert (row["executes"], row["disturbed"], row["mean_ms"]) == (text, "one; two", "-1.5")


# Markdown


def test_markdown_answers_first() -> None:
    lines = markdown_text(sample_results()).splitlines()
    assert lines[0] == "### vit-b16 (vit_base_patch16_224), 224×224"
    assert lines[2] == (
        "- Batch 1: **openvino onnx-bf16**, 31.0 ms (32.3 images/s), **3.10×** PyTorch eager in fp32"
    )
    assert lines[6].startswith("| backend, artifact | precision | batch 1: p50 ms | images/s | error |")
    assert "| openvino onnx-bf16 | bf16 | **31.0** | 32.3 | 6.0e-03 | **187** |" in "\n".join(lines)


def test_markdown_shows_what_went_wrong() -> None:
    text = markdown_text(sample_results())
    assert "~~260~~ | ~~30.8~~ | ~~8.3e-01~~" in text
    assert text.count("~~") == 6
    assert "| failed |  |  |" in text
    assert "- torch-compile weights-bf16, batch 32: out of memory: the process was ended" in text
    assert "- aotinductor aoti-bf16, batch 8: relative error 8.3e-01 above" in text
    assert "| 78.0 ⚠ |" in text
    assert "- onnxruntime onnx-fp32, batch 1: another process took 11 % of the processor" in text
    assert "- tensorrt plan-fp16: no NVIDIA GPU answers" in text
    assert "AMD EPYC 9R14, 2 threads; Linux" in text.splitlines()[-1]


def test_markdown_tables_are_rectangular() -> None:
    text = markdown_text(sample_results(cells=(*sample_results().cells, cell(batch=2, executes="a|b"))))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1


def test_markdown_escapes() -> None:
    odd = cell(
        provider="CUDA",
        backend="a|b<script>",
        artifact="*x*\n# y",
        status="failed",
        reason="`rm` ~~all~~ [x](y) &amp;",
    )
    text = markdown_text(sample_results(cells=(odd,), skipped=(), notes=()))
    assert r"| a\|b&lt;script&gt;\[CUDA\] \*x\* \# y | fp32 | failed |" in text
    assert r": \`rm\` \~\~all\~\~ \[x\](y) &amp;amp;" in text
    assert "<script" not in text


def test_markdown_without_an_answer() -> None:
    wrong = sample_results(cells=(cell(parity=failed_parity("fp32")),))
    assert "- Batch 1: nothing to choose: no cell was measured and right" in markdown_text(wrong)
    empty = markdown_text(sample_results(cells=(), partial=True))
    assert empty.startswith("> **Partial:**")
    assert "**Nothing was measured:**" in empty


def test_markdown_without_a_baseline() -> None:
    text = markdown_text(sample_results(cells=(cell(p50_ms=80.0),)))
    assert "- Batch 1: **onnxruntime onnx-fp32**, 80.0 ms (12.5 images/s)\n" in text
    own = markdown_text(sample_results(cells=(cell(**EAGER, p50_ms=80.0),)))
    assert "(12.5 images/s), which is PyTorch eager itself\n" in own


@settings(max_examples=40, deadline=None)
@given(measurements())
def test_any_measurement_has_both_views(results: Results) -> None:
    assert len(rows(results)) == len(results.cells)
    text = markdown_text(results)
    assert text.count("~~") % 2 == 0
    assert "<script" not in text
