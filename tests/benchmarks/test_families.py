"""The table of other families: made right, and true to the committed record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import families
from vitdeploy.benchmark.loop import Array


def record(ratio: float = 1.1, block: int = 20, control: tuple[str, ...] = ()) -> dict[str, Any]:
    spread = {"median": ratio, "q1": ratio - 0.1, "q3": ratio + 0.1, "pairs": 9}
    cell = {"model": "CLIP-B/32", "ours_ms": 40.0, "plain_ms": 44.0, "error": 1e-6}
    cell |= {"ratio": spread, "processor_ratio": {**spread, "median": 1.02}}
    graph = {"nodes": 300, "block": block, "control": list(control)}
    return {
        "command": "python -m benchmarks.families",
        "threads": 2,
        "rounds": 9,
        "environment": {"cpu": {"name": "a processor"}},
        "graphs": {"CLIP-B/32": {"ours": graph, "plain": {"nodes": 500, "block": 0, "control": ["Shape"]}}},
        "cells": [
            {**cell, "runtime": runtime, "batch": batch}
            for runtime in ("onnxruntime", "openvino")
            for batch in (1, 8)
        ],
    }


def test_a_row_for_each_runtime() -> None:
    rows = [line for line in families.table(record()).splitlines() if line.startswith("| CLIP")]
    cell = "**40**, 44, 1.10 × (1.00 to 1.20), 1.02 ×"
    assert rows == [
        f"| CLIP-B/32 | {title} | {cell} | {cell} | 500, 300 | 20 |" for title in ("ONNX Runtime", "OpenVINO")
    ]


def test_what_does_not_hold_is_said() -> None:
    assert families.broken_claims(record()) == []
    lines = families.broken_claims(record(ratio=1.04, block=29, control=("Shape",)))
    assert lines[0] == "CLIP-B/32 on ONNX Runtime, batch 1: 1.040 × instead of 1.05 ×"
    assert lines[4:] == ["CLIP-B/32: 29 nodes in a block instead of 28", "CLIP-B/32: the graph has Shape"]


def test_ratios_are_of_one_round() -> None:
    calls: list[str] = []

    def caller(name: str) -> families.Caller:
        def run(pixels: Array) -> tuple[Array, float | None]:
            calls.append(name)
            return pixels, None

        return run

    found = families.taking_turns(caller("ours"), caller("plain"), np.zeros((8, 1)), 4)
    assert calls == ["plain", "ours", "ours", "plain"] * 2
    assert found["ratio"]["pairs"] == found["processor_ratio"]["pairs"] == 4


def test_the_document_says_what_the_record_says() -> None:
    committed = json.loads(families.RESULTS.read_text(encoding="utf-8"))
    assert families.PART.read() == families.table(committed)
    assert committed["graphs"].keys() <= families.FAMILIES.keys()
    assert families.broken_claims(committed) == []


def test_a_record_keeps_what_it_has_of_other_models(tmp_path: Path) -> None:
    path = tmp_path / "families.json"
    assert families.kept(path, ["Swin-T"], 9) == {"graphs": {}, "cells": []}
    earlier = record()
    path.write_text(json.dumps(earlier), encoding="utf-8")
    assert families.kept(path, ["Swin-T"], 9) == {key: earlier[key] for key in ("graphs", "cells")}
    assert (
        families.kept(path, ["CLIP-B/32"], 9)
        == families.kept(path, ["Swin-T"], 5)
        == {"graphs": {}, "cells": []}
    )
