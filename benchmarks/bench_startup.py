"""What starting costs: whole processes, from nothing to the import, the help, the first answer.

pytest benchmarks/bench_startup.py --benchmark-json=startup.json
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.spread import Rounds

ROUNDS = 15
IMAGES = Path(__file__).parent.parent / "vitdeploy" / "data" / "digits" / "images"


def run(*arguments: str) -> str:
    """Run Python in a process of its own; returns what it prints."""
    done = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def test_import(benchmark: BenchmarkFixture, rounds: Rounds) -> None:
    benchmark.pedantic(lambda: run("-c", "import vitdeploy"), rounds=rounds(ROUNDS), iterations=1)


def test_help(benchmark: BenchmarkFixture, rounds: Rounds) -> None:
    benchmark.pedantic(lambda: run("-m", "vitdeploy", "--help"), rounds=rounds(ROUNDS), iterations=1)


def test_first_prediction(benchmark: BenchmarkFixture, digits_bundle: Path, rounds: Rounds) -> None:
    """``vitdeploy predict`` on one image; the bundle is in the system's cache after the first run."""
    image = sorted(IMAGES.rglob("*.png"))[0]
    command = ("-m", "vitdeploy", "predict", str(digits_bundle), str(image), "--threads", "1", "--json")
    (answer,) = json.loads(run(*command))["images"]
    best = answer["predictions"][0]
    assert best["label"] == image.name.partition("_")[0], "a fast wrong answer is no result"
    benchmark.extra_info |= {"label": best["label"], "score": best["score"]}
    benchmark.pedantic(lambda: run(*command), rounds=rounds(ROUNDS), iterations=1)
