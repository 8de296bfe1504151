"""Measured values as text, and what stands in which table."""

from __future__ import annotations

import pytest

from tests.helpers.sample_results import cell, failed_parity, sample_results
from vitdeploy.benchmark.compare import ComparedCell
from vitdeploy.benchmark.ranking import groups
from vitdeploy.benchmark.tables import (
    by_batch,
    bytes_text,
    compared_table,
    measurements,
    number_text,
    percent_text,
    plain_text,
    series_name,
)


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
    assert number_text(value) == text


def test_sizes_and_shares() -> None:
    assert [bytes_text(n) for n in (None, 12, 3_400, 346_290_000, 25_280_000_000)] == [
        "–", "12 B", "3.40 kB", "346 MB", "25.3 GB",
    ]  # fmt: skip
    assert percent_text(0.8107) == "81.07 %"
    assert percent_text(-0.0006, signed=True) == "−0.06 %"


def test_names_tell_apart_what_varies() -> None:
    one = cell(threads=1)
    assert series_name(sample_results(cells=(one,)), one) == "onnxruntime onnx-fp32"
    two = cell(threads=None, concurrency=4)
    both = sample_results(cells=(one, two))
    assert series_name(both, one) == "onnxruntime onnx-fp32, 1 thread, 1 caller"
    assert series_name(both, two) == "onnxruntime onnx-fp32, default threads, 4 callers"


def test_text_becomes_one_line_without_controls() -> None:
    assert plain_text(" a\r\n\tb\x00\u202ec\u2028d ") == "a b c d"


def test_cells_then_and_now() -> None:
    row = ComparedCell(
        subject="vit",
        label="openvino onnx-bf16",
        batch=8,
        threads=2,
        concurrency=4,
        old_ms=190.0,
        new_ms=228.0,
        ratio=1.2,
        low=1.1,
        high=1.3,
        verdict="slower",
    )
    table = compared_table([row])
    assert [column.title for column in table.columns][2:6] == ["then ms", "now ms", "ratio", "95 % interval"]
    (made,) = table.rows
    times = ("190.00", "228.00", "1.200", "1.100 to 1.300")
    assert made.entries == ("openvino onnx-bf16, 2 threads, 4 callers", "8", *times, "slower")
    assert made.marks[6] == "slower"
    other = row.model_copy(update={"subject": "another"})
    assert [r.entries[0] for r in compared_table([row, other]).rows] == [
        "vit: openvino onnx-bf16, 2 threads, 4 callers",
        "another: openvino onnx-bf16, 2 threads, 4 callers",
    ]


def test_columns_without_an_entry_are_left_out() -> None:
    results = sample_results(cells=(cell(p50_ms=10.0, mean_ms=None, spread=None),))
    (group,) = groups(results)
    titles = [column.title for column in measurements(results, group).columns]
    assert titles == ["backend, artifact", "batch", "p50 ms", "images/s", "p90 ms", "p99 ms", "computes in"]


def test_a_row_for_each_series_and_columns_for_each_batch() -> None:
    wrong = cell(batch=8, parity=failed_parity())
    results = sample_results(cells=(cell(p50_ms=10.0), wrong, wrong))
    (group,) = groups(results)
    table = by_batch(results, group)
    assert [len(row.entries) for row in table.rows] == [len(table.columns)] * 2
    assert [row.marks[2:] for row in table.rows] == [
        ("best", "", "", "wrong", "wrong", "wrong"),
        ("", "", "", "wrong", "wrong", "wrong"),
    ]
    assert table.rows[1].entries[2:5] == ("", "", "")
