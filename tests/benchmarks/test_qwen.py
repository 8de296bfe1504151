"""The measurement of Qwen2.5-VL's tower says where our claim does not hold."""

from __future__ import annotations

import json
from typing import Any

from benchmarks import qwen


def record(ratio: float, control: tuple[str, ...] = ()) -> dict[str, Any]:
    cells = [{"runtime": name, "ratio": {"median": ratio}} for name in ("onnxruntime", "openvino")]
    return {"graphs": {"ours": {"nodes": 176, "control": list(control)}}, "cells": cells}


def test_what_does_not_hold_is_said() -> None:
    assert qwen.broken_claims(record(1.1)) == []
    lines = qwen.broken_claims(record(1.04, ("If",)))
    assert lines == [
        "ONNX Runtime: 1.040 × instead of 1.1 ×",
        "OpenVINO: 1.040 × instead of 1.1 ×",
        "the graph has If",
    ]


def test_the_document_says_what_the_record_says() -> None:
    committed = json.loads(qwen.RESULTS.read_text(encoding="utf-8"))
    assert qwen.PART.read() == qwen.table(committed)
    assert qwen.broken_claims(committed) == []


def test_the_tower_is_of_whole_windows_and_one_block_sees_the_whole_image() -> None:
    assert all(side % 8 == 0 for side in qwen.GRID)
    assert qwen.VISION["fullatt_block_indexes"] == [qwen.VISION["depth"] - 1]
