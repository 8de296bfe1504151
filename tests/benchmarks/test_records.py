"""The table of what exporting and building cost says what the committed records say."""

from __future__ import annotations

import json
from typing import Any

from tests.helpers.paths import ROOT


def records(suite: str) -> dict[str, dict[str, Any]]:
    text = (ROOT / "benchmarks" / "results" / f"{suite}.json").read_text(encoding="utf-8")
    return {row["name"]: row for row in json.loads(text)["benchmarks"]}


def rows() -> dict[str, list[str]]:
    """The table's rows by their first words."""
    section = (ROOT / "docs/performance.md").read_text(encoding="utf-8").split("## Exporting and building")[1]
    cells = [line.strip("| ").split("|") for line in section.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells}


def test_cost_of_an_engine() -> None:
    record = records("engines_cpu")["test_rtx_engine_vit_b16_fp16"]
    extra, table = record["extra_info"], rows()
    memory, six = extra["peak_beyond_framework_mb"], extra["six_targets_over_one_seconds"]
    first = "a TensorRT for RTX engine of the fp16 ViT-B/16, for one architecture"
    assert table[first] == [f"{record['stats']['median']:.1f} s", f"{record['stats']['rounds']} runs"]
    assert table["its peak memory beyond the library's own"] == [
        f"{memory['median']:.0f} MB", f"{memory['q1']:.0f} to {memory['q3']:.0f}",
    ]  # fmt: skip
    assert table["its size over the ONNX file's"][0] == f"{extra['engine_over_onnx_bytes']:.2f} ×"
    assert table["engines for six architectures from one parse, over the time for one"] == [
        f"{six['median']:.1f} ×", f"{six['q1']:.1f} to {six['q3']:.1f}",
    ]  # fmt: skip


def test_cost_of_a_further_image_size() -> None:
    table = rows()
    for size in ("384", "512x336"):
        record = records("sizes_cpu")[f"test_export_of_a_further_size[{size}]"]
        share = record["extra_info"]["further_over_first_seconds"]
        name = size if "x" in size else f"{size}x{size}"
        assert table[f"a further image size, {name}, over the export of 224x224 to fp16"] == [
            f"{share['median']:.2f} ×", f"{share['q1']:.2f} to {share['q3']:.2f}",
        ]  # fmt: skip
        assert share["median"] <= 0.4


def test_cost_of_an_export() -> None:
    record = records("export_cpu")["test_export_vit_b16_fp32_and_fp16"]
    memory = record["extra_info"]["peak_beyond_framework_over_weights"]
    table = rows()
    assert table["export to fp32 and fp16, with all proofs"][0] == f"{record['stats']['median']:.0f} s"
    measured, spread = table["its peak memory beyond the framework's own, over the weights' size"]
    assert measured == f"{memory['median']:.1f} ×"
    assert spread == f"{memory['q1']:.1f} to {memory['q3']:.1f}"
    assert table["`vitdeploy --help`"][0] == f"{records('export_cpu')['test_help']['stats']['median']:.2f} s"
