"""Latency against image size: measured in rounds, and what the document says is the record's."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import pixels


def cell(model: str, size: int, runtime: str, *times: float) -> dict[str, Any]:
    return {
        "model": model,
        "size": size,
        "runtime": runtime,
        "flops": 40_000 * size**2 * (2 if model == "ViT" and size > 128 else 1),
        "parameters": 22_050_000,
        "error": 1e-6,
        "ms": pixels.quartiles(list(times)),
        "rounds_ms": list(times),
        "processor_ms": 2 * times[0],
    }


def record() -> dict[str, Any]:
    sized = [
        cell(model, size, runtime, *(factor * size * time for time in (1.0, 1.1, 1.2)))
        for runtime in pixels._TITLES
        for model, factor in (("ViT", 2.0), ("CNN", 1.0))
        for size in (128, 256)
    ]
    return {
        "command": "python -m benchmarks.pixels",
        "created": "2026-11-29T22:00:00Z",
        "threads": 2,
        "rounds": 3,
        "environment": {"cpu": {"name": "a processor"}},
        "cells": sized,
    }


def test_a_row_for_each_size_and_what_four_times_the_pixels_cost() -> None:
    text = pixels.table(record())
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    vit, cnn = "281.6 (268.8 to 294.4)", "140.8 (134.4 to 147.2)"
    assert rows[0] == (
        "| pixels | ViT: GFLOPs | ONNX Runtime | OpenVINO | CNN: GFLOPs | ONNX Runtime | OpenVINO |"
    )
    assert rows[1] == f"| 128 × 128 | 0.66 | {vit} | {vit} | 0.66 | {cnn} | {cnn} |"
    twice = "2.00 × (2.00 to 2.00)"
    assert rows[4] == f"| from 128 to 256 | 8.00 × | {twice} | {twice} | 4.00 × | {twice} | {twice} |"
    assert "parameters: ViT 22.1 M, CNN 22.1 M." in text


def test_a_short_run_has_a_table_too() -> None:
    short = record()
    short["cells"] = [cell("ViT", 128, "onnxruntime", 5.0)]
    text = pixels.table(short)
    assert "four times" not in text
    assert "| 128 × 128 | 0.66 | 5.0 (5.0 to 5.0) |  |" in text


def test_calls_take_turns_in_another_order_every_round() -> None:
    calls: list[int] = []
    found = pixels.taking_turns([lambda n=n: calls.append(n) for n in range(3)], 20)  # type: ignore[misc]
    assert [len(one["rounds_ms"]) for one in found] == [20] * 3
    timed = calls[
        6 :: pixels.MOST_RUNS
    ]  # two calls of each come first; these are repeated as often as may be
    orders = [tuple(timed[place : place + 3]) for place in range(0, 60, 3)]
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    assert len(set(orders)) > 1


@pytest.mark.slow
def test_the_plot_has_a_line_for_each_model() -> None:
    drawn = pixels.plot(record())
    assert drawn == pixels.plot(record())
    for text in ("ViT", "CNN", "ONNX Runtime", "OpenVINO", "median, ms", "2026-11-29T22:00:00Z"):
        assert text in drawn


def test_the_document_says_what_the_record_says() -> None:
    committed = json.loads(pixels.RESULTS.read_text(encoding="utf-8"))
    assert pixels.PART.read() == pixels.table(committed)
    assert committed["created"] in pixels.PLOT.read_text(encoding="utf-8")
    assert {cell["model"] for cell in committed["cells"]} == set(pixels.MODELS)
