"""What a measurement looks like as CSV and Markdown."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given, settings

from tests.helpers.result_strategies import measurements
from tests.helpers.sample_results import cell, failed_parity, sample_results
from vitdeploy.benchmark.results import Results
from vitdeploy.benchmark.views import csv_text, markdown_text

EAGER = {"backend": "torch", "artifact": "weights"}


def rows(results: Results) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(csv_text(results), newline=""), strict=True))


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


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(measurements())
def test_any_measurement_has_both_views(results: Results) -> None:
    assert len(rows(results)) == len(results.cells)
    text = markdown_text(results)
    assert text.count("~~") % 2 == 0
    assert "<script" not in text
