"""What more pixels cost on ONNX Runtime: two models at a size and at its double.

    pytest benchmarks/bench_pixels.py --benchmark-json=pixels.json

Fit for following them over time; ``python -m benchmarks.pixels`` compares sizes, in interleaved rounds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.pixels import MODELS, measured, prepare
from benchmarks.spread import Rounds

SIZES = (192, 384)
NAMES = ("ViT-S/16", "ResNet-50")
SMALL = ("Ti/16",)
"""A named variant at a fraction of the size, to find out whether it runs."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("name", SMALL if metafunc.config.getoption("--quick") else NAMES)


def test_four_times_the_pixels(
    benchmark: BenchmarkFixture, name: str, quick: bool, rounds: Rounds, tmp_path: Path
) -> None:
    points = [
        point
        for size in (SIZES[:1] if quick else SIZES)
        if (point := prepare(name, MODELS.get(name, lambda: name), size // 6 if quick else size, tmp_path))
    ]

    def run() -> list[dict[str, Any]]:
        return list(measured(points, "onnxruntime", rounds(15)))

    cells = benchmark.pedantic(run, rounds=1, iterations=1)
    assert all(cell["error"] < 1e-4 for cell in cells), "a fast wrong model is no result"
    benchmark.extra_info["cells"] = cells
