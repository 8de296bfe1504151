"""What a record bears out of our claims, and how it is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving import record, table
from benchmarks.serving.claims import FLAGSHIP, broken_claims, claims, unmeasured

RATES = {
    "vitdeploy": 10.5,
    "vitdeploy, optimize's pick": 28.0,
    "the load alone": 1000.0,
    "fastapi 1 x 2": 9.0,
    "fastapi 2 x 1": 10.0,
    "litserve 1 x 2": 8.0,
    "triton": 7.0,
}
RAW = [(1, 2, 8, 10.0), (2, 1, 1, 10.6), (2, 1, 4, 10.1)]


def visit(per_s: float) -> dict[str, Any]:
    latency = {"50": 10.0, "99": 15.0}
    figures = {"per_s": per_s, "failed": 0, "latency_ms": latency, "load_cpu": 0.1, "requests": 100}
    return {**figures, "server_cpu_ms": 190.0}


def part() -> dict[str, Any]:
    return {
        "lanes": {name: [visit(rate)] for name, rate in RATES.items()},
        "batches": [{"1": 100}],
        "raw": [
            {"sessions": n, "threads": t, "batch": size, "per_s": [rate], "seconds": [n * size / rate]}
            for n, t, size, rate in RAW
        ],
    }


def run(**more: Any) -> dict[str, Any]:
    latency = {"50": 90.0, "90": 99.0, "99": 120.0}
    return {"valid": True, "reasons": [], "per_s": 10.2, "latency_ms": latency, "load_cpu": 0.1, **more}


def flagship() -> dict[str, Any]:
    """A record that bears out everything."""
    tail = {"p50_ms": 90.0, "p99_ms": 120.0, "p99_over_p50": 1.33, "failed": 0}
    ideal = {"ideal": {"p50_ms": 84.0, "p99_ms": 110.0, "p99_over_p50": 1.0}}
    plan = {"threads": 2, "clients": 16, "rounds": 5, "image_rounds": 2, "seconds": 6.0}
    tries = [run(target_per_s=9.0, valid=False, reasons=["early stopping"]), run(target_per_s=8.0)]
    lane = {
        "accuracy": {"samples": 8, "answered": 8, "wrong": ""},
        "SingleStream": run(),
        "Offline": run(),
        "Server": tries,
    }
    return {
        "model": FLAGSHIP,
        "environment": {"cpu": {"name": "a processor"}},
        "parts": {"closed": {"settings": plan}},
        "notes": {"vitdeploy": "plan 2 x 1"},
        "skipped": [{"lane": "ovms", "reason": "no program"}],
        "closed": {"tensor": part(), "image": part()},
        "at_80_percent": {"rate": 7.8, "constant": {**tail, **ideal}, "poisson": {**tail, **ideal}},
        "highest_rate": {"bound_p99_ms": 1000, "rate": 6.0, "of_capacity": 0.6},
        "overload": {
            "requests": 400,
            "refused_429": 300,
            "refused_ms": {"p50": 3.0, "p99": 12.0, "max": 20.0},
            "other": 0,
            "recovery_s": 1.0,
            "before": visit(5.0),
            "after": visit(5.0),
        },
        "loadgen": {
            "version": "6.0",
            "settings": {
                "min_duration_s": 10,
                "mlperf_min_duration_s": 600,
                "server_bound_ms": 1000,
                "server_percentile": 0.9,
                "mlperf_server_percentile": 0.99,
            },
            "lanes": {"vitdeploy": lane},
            "skipped": {"triton": "no end"},
        },
        "limits": {
            "flops": 35e9,
            "weights_bytes": 346e6,
            "gemm": {
                "rows": 1576,
                "columns": 768,
                "outputs": 3072,
                "gflop_per_s": {"median": 385.0, "q1": 380.0, "q3": 390.0, "pairs": 15},
            },
            "copy_gb_per_s": {"median": 20.0, "q1": 19.0, "q3": 21.0, "pairs": 15},
        },
    }


def changed(path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(flagship()))
    place: Any = found
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return found


def test_a_record_that_bears_everything_out(tmp_path: Path) -> None:
    found = flagship()
    assert broken_claims(found) == unmeasured(found) == []
    assert len({claim.what for claim in claims(found)}) == len(claims(found))
    record.write(found, tmp_path / "serve.json")
    assert record.read(tmp_path / "serve.json") == found
    assert max(map(len, (tmp_path / "serve.json").read_text().splitlines())) < 220


@pytest.mark.parametrize(
    "path, value, said",
    [
        (
            ("closed", "tensor", "lanes", "fastapi 2 x 1", 0, "per_s"),
            11.0,
            "tensors served, over fastapi 2 x 1: 0.9545 x instead of at least 1 x",
        ),
        (
            ("closed", "tensor", "raw", 1, "per_s"),
            [11.0],
            "at their best: 0.9545 x instead of at least 0.97 x",
        ),
        (
            ("closed", "tensor", "lanes", "vitdeploy, optimize's pick", 0, "per_s"),
            24.0,
            "over the fastest fp32 peer: 2.4 x instead of at least 2.5 x",
        ),
        (
            ("closed", "image", "lanes", "vitdeploy", 0, "failed"),
            3,
            "as many clients as batches take: 3 instead",
        ),
        (("closed", "image", "lanes", "triton", 0, "failed"), 3, "3 image requests to triton failed"),
        (
            ("at_80_percent", "constant", "p99_over_p50"),
            1.6,
            "constant arrivals: 1.6 x instead of at most 1.5 x",
        ),
        (("at_80_percent", "poisson", "p99_ms"), 143.0, "random arrivals: 1.3 x instead of at most 1.2 x"),
        (("at_80_percent", "constant", "failed"), 1, "failed requests at 80 % load: 1 instead of at most 0"),
        (("overload", "refused_ms", "p99"), 51.0, "refusals in an overload: 51 ms instead"),
        (("overload", "other"), 2, "without an answer or a refusal: 2 instead"),
        (("overload", "recovery_s"), 6.0, "until nothing is refused: 6 s instead"),
        (("overload", "after", "latency_ms", "50"), 16.0, "over that before it: 1.6 x instead"),
        (("overload", "after", "failed"), 1, "over that before it: inf x instead"),
        (("loadgen", "lanes", "vitdeploy", "accuracy", "wrong"), "KL", "accuracy mode: 0 of all instead"),
        (("loadgen", "lanes", "vitdeploy", "Offline", "valid"), False, "Offline scenario: 0 of 1 instead"),
    ],
)
def test_a_record_that_does_not(path: tuple[str | int, ...], value: Any, said: str) -> None:
    (broken,) = broken_claims(changed(path, value))
    assert said in broken


@pytest.mark.parametrize(
    "path, value, said",
    [
        (("closed", "tensor", "raw"), [], "the sessions alone at their best: not measured"),
        (("closed", "tensor", "raw"), part()["raw"][:1], "the sessions alone at their best: not measured"),
        (("closed", "tensor", "lanes", "triton"), [], "over triton: not measured"),
        (("at_80_percent",), None, "constant arrivals: not measured"),
        (("overload",), None, "refusals in an overload: not measured"),
        (("overload", "refused_429"), 0, "refusals in an overload: not measured"),
        (("loadgen",), None, "Offline scenario: not measured"),
    ],
)
def test_what_was_not_measured_is_no_success(path: tuple[str | int, ...], value: Any, said: str) -> None:
    found = changed(path, value)
    assert broken_claims(found) == []
    assert any(said in line for line in unmeasured(found))
    assert "not yet measured" in table.text_of(found)


def test_peers_on_another_runtime_are_no_claim_of_ours_but_of_the_pick() -> None:
    found = flagship()
    found["closed"]["tensor"]["lanes"]["ovms"] = [visit(13.5)]
    assert [line.split(": ")[1] for line in broken_claims(found)] == [
        "`optimize`'s pick served, over the fastest fp32 peer"
    ]


def test_the_tiny_model_has_claims_for_tensors_and_images() -> None:
    found = {**flagship(), "model": "digits"}
    lines = [line.split(": ", 1)[1] for line in broken_claims(found)]
    assert "images served, over fastapi 1 x 2: 1.1667 x instead of at least 1.3 x" in lines
    assert "images served, over litserve 1 x 2: 1.3125 x" not in "".join(lines)
    assert "tensors served, over litserve 1 x 2: 1.3125 x instead of at least 1.5 x" in lines
    assert unmeasured(found) == []


def test_a_load_that_limits_itself_is_no_result() -> None:
    found = changed(("closed", "tensor", "lanes", "vitdeploy", 0, "load_cpu"), 0.97)
    assert broken_claims(found) == []
    found["closed"]["tensor"]["lanes"]["the load alone"][0]["per_s"] = 10.0
    assert broken_claims(found) == [f"{FLAGSHIP}: the load itself limits tensor requests"]


def test_the_tables() -> None:
    text = table.text_of(flagship())
    assert "2 processors, 16 clients, 5 rounds of 6 s, 2 with images; `plan 2 x 1`" in text
    assert "| fastapi 2 x 1 | 10.0 | 1.050 (1.050 to 1.050) | 10.0 | 15.0 | 190.00 |" in text
    assert "| sessions alone, 2 x 1, batch 1 | 10.6 | 0.991 (0.991 to 0.991) |  |  |  |" in text
    assert "| vitdeploy | 8 of 8 | 99.0 | 10.2 | 8.0 |" in text
    assert "A run takes 10 s or more; MLPerf's rules ask for 600 s and the 99th percentile." in text
    assert "| p99 over p50 at 80 % load, constant arrivals | at most 1.5 x | 1.33 x |" in text
    assert "LoadGen left out triton: no end." in text
    assert text.endswith("Left out: ovms (no program).")
    invalid = changed(
        ("loadgen", "lanes", "vitdeploy", "Offline"), run(valid=False, reasons=["min duration"])
    )
    assert "| 10.2: invalid (min duration) |" in table.text_of(invalid)


def test_where_the_limit_lies() -> None:
    text = table.limits_text([flagship()])
    assert "An image takes 35 GFLOP." in text
    assert "11 images/s were to be had" in text  # 385 GFLOP/s over 35 GFLOP
    assert "(sessions alone, 2 x 1, batch 1) reach 10.6, 96% of that; `vitdeploy serve`, 10.5, 95%." in text
    assert "read all weights from memory takes 17 ms; a run of 1 takes 189 ms, 2 at a time" in text
    assert "The sessions alone take 188.7 ms for an image" in text
    assert table.limits_text([changed(("limits",), None)]) == f"**{FLAGSHIP}**: not yet measured."
