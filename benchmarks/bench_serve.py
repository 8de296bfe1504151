"""The server under load, closed-loop beside the raw session and open-loop at 80 % of what it can serve.

    pytest benchmarks/bench_serve.py --benchmark-json=serve.json

The digits model, without the peers: fit for following our own server over time. ``python -m
benchmarks.serving.run`` measures ViT-B/16, too, and other servers in the same rounds.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.serving import record
from benchmarks.serving.rounds import RAW, Plan
from benchmarks.serving.run import THREADS, measure
from benchmarks.serving.subjects import SCOPES, prepare
from vitdeploy.progress import Progress

PLAN = Plan(
    seconds=4, rounds=5, threads=THREADS, clients=32, bound_ms=SCOPES["digits"].bound_ms, overload=False
)
QUICK = dataclasses.replace(PLAN, seconds=0.2, rounds=1, clients=8)


def test_serving(benchmark: BenchmarkFixture, quick: bool, tmp_path: Path) -> None:
    """One measurement is one round of pytest-benchmark; its figures are in ``extra_info``."""
    subject, plan = prepare("digits", tmp_path), QUICK if quick else PLAN
    found = benchmark.pedantic(
        lambda: measure(subject, plan, (), "pytest benchmarks/bench_serve.py", Progress()),
        rounds=1,
        iterations=1,
    )
    record.write(found, tmp_path / "record.json")
    assert record.read(tmp_path / "record.json") == found
    for kind, part in found["closed"].items():
        assert all(visit["failed"] == 0 for visits in part["lanes"].values() for visit in visits), kind
        assert part["served_over"][RAW]["pairs"] == plan.rounds
    assert found["at_80_percent"]["constant"]["p50_ms"]
    assert RAW in record.table(found)
    wanted = ("settings", "closed", "at_80_percent", "highest_rate")
    benchmark.extra_info |= {name: found[name] for name in wanted}
