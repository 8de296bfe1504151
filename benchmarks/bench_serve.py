"""The server under load: beside the sessions alone, at 80 % of what it can serve, and driven by LoadGen.

    pytest benchmarks/bench_serve.py --benchmark-json=serve.json

The digits model, without the peers: fit for following our own server over time. ``python -m
benchmarks.serving.run`` measures ViT-B/16, too, and other servers in the same rounds.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.serving import record, table
from benchmarks.serving.measuring import Measurement
from benchmarks.serving.servers import OURS
from benchmarks.serving.settings import PARTS, PLANS
from benchmarks.serving.subjects import prepare
from vitdeploy.progress import Progress

PLAN = dataclasses.replace(PLANS["digits"], seconds=4, clients=32)
QUICK = dataclasses.replace(PLAN.with_rounds(1), seconds=0.2, clients=8, loadgen_seconds=0.2)


def test_serving(benchmark: BenchmarkFixture, quick: bool, tmp_path: Path) -> None:
    """One measurement is one round of pytest-benchmark; its figures are in ``extra_info``."""
    subject, plan = prepare("digits", tmp_path), QUICK if quick else PLAN
    measurement = Measurement(subject, plan, (), Progress())
    found = benchmark.pedantic(
        lambda: measurement.measure(PARTS, {}, "pytest benchmarks/bench_serve.py"), rounds=1, iterations=1
    )
    record.write(found, tmp_path / "record.json")
    assert record.read(tmp_path / "record.json") == found
    for kind, part in found["closed"].items():
        assert all(visit["failed"] == 0 for visits in part["lanes"].values() for visit in visits), kind
        alone = record.best_raw(part)
        ratio = alone and record.over(part, OURS, alone)
        assert ratio, kind
        assert ratio["pairs"] == plan.rounds
    assert found["at_80_percent"]["constant"]["p50_ms"]
    if not any(one["lane"] == "loadgen" for one in found["skipped"]):
        lane = found["loadgen"]["lanes"][OURS]
        assert lane["accuracy"] == {"samples": 8, "answered": 8, "wrong": ""}
        assert lane["Offline"]["per_s"] > 0
    assert "GFLOP/s" in table.limits_text([found])
    assert record.RAW in table.text_of(found)
    wanted = ("parts", "closed", "at_80_percent", "highest_rate", "loadgen", "limits")
    benchmark.extra_info |= {name: found[name] for name in wanted}
