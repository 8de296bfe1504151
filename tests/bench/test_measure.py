"""Every cell is measured in every round, in turn, with its error beside it."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import numpy as np
import pytest
from bundles import WEIGHT, write_bundle

import vitdeploy
from vitdeploy.backends.onnxruntime import OnnxRuntimeSession
from vitdeploy.bench.measure import LEAST_ROUNDS
from vitdeploy.config import BatchRange
from vitdeploy.errors import ParityError, UsageError

ORT = ["onnxruntime"]


def test_cells(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b", precisions=("fp32", "fp16"))
    report = vitdeploy.bench(made.root, backends=ORT, batches=(1, 8, 9), budget=0.2)
    cells = report.cells
    assert [(c.artifact, c.batch) for c in cells] == [
        (name, batch) for name in ("onnx-fp32", "onnx-fp16") for batch in (1, 8)
    ]
    for cell in cells:
        assert len(cell.samples_ms) == report.rounds >= LEAST_ROUNDS
        assert min(cell.samples_ms) <= cell.p50_ms <= cell.p90_ms <= cell.p99_ms <= max(cell.samples_ms)
        assert cell.mean_ms == pytest.approx(np.mean(cell.samples_ms), abs=1e-3)
        assert cell.images_per_s == pytest.approx(1000 * cell.batch / cell.p50_ms, rel=0.02)
        assert cell.image_size == (8, 8)
    assert cells[0].parity["relative"] < 1e-5 < cells[2].parity["relative"] < 1e-2


def test_document(tmp_path: Path) -> None:
    report = vitdeploy.bench(write_bundle(tmp_path / "b"), backends=ORT, batches=(1,), threads=1, budget=0.1)
    document = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert document.keys() == {"schema_version", "environment", "cells", "rounds", "skipped"}
    assert document["environment"]["threads"] == 1
    assert document["environment"]["cpu"]["name"]
    names = ["backend", "artifact", "precision", "batch", "image_size", "images_per_s", "samples_ms"]
    times = ["p50_ms", "p90_ms", "p99_ms", "mean_ms"]
    assert {*names, *times, "parity"} <= document["cells"][0].keys()


def test_rounds_are_interleaved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, int]] = []
    run = OnnxRuntimeSession._run

    def watched(self: OnnxRuntimeSession, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        order.append((self.facts.artifact, len(inputs["pixel_values"])))
        return run(self, inputs)

    monkeypatch.setattr(OnnxRuntimeSession, "_run", watched)
    made = write_bundle(tmp_path / "b", precisions=("fp32", "fp16"))
    report = vitdeploy.bench(made, backends=ORT, batches=(1, 4), budget=0.05)
    measured = order[-4 * report.rounds :]
    assert measured == measured[:4] * report.rounds
    assert len(set(measured[:4])) == 4


def test_a_wrong_artifact_shows(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b", weight=WEIGHT * 1.1)
    (cell,) = vitdeploy.bench(made, backends=ORT, batches=(2,), budget=0.05).cells
    assert cell.parity["relative"] == pytest.approx(0.1, rel=1e-3)


def test_uint8_input(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b", kind="uint8", batch=BatchRange(4, 4, 4))
    (cell,) = vitdeploy.bench(made, backends=ORT, batches=(1, 4), budget=0.05).cells
    assert (cell.batch, cell.image_size) == (4, (8, 8))


def test_nothing_to_measure(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="batch of 64"):
        vitdeploy.bench(write_bundle(tmp_path / "a"), backends=ORT, batches=(64,))
    with pytest.raises(ParityError, match="golden"):
        vitdeploy.bench(write_bundle(tmp_path / "b", golden={}), backends=ORT)


def test_the_garbage_collector_is_on_again(tmp_path: Path) -> None:
    vitdeploy.bench(write_bundle(tmp_path / "b"), backends=ORT, batches=(1,), budget=0.05)
    assert gc.isenabled()
