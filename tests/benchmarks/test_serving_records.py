"""What is said of the server's speed is what the committed records bear out."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.serving import table
from benchmarks.serving.record import FLAGSHIP, broken_claims
from benchmarks.serving.subjects import SCOPES


def record(model: str) -> Any:
    return next(one for one in table.committed() if one["model"] == model)


@pytest.mark.parametrize("model", SCOPES)
def test_nothing_that_we_claim_is_broken(model: str) -> None:
    found = record(model)
    assert found["environment"]["cpu"]["name"]
    assert not broken_claims(found)


def test_the_document_says_what_the_records_say() -> None:
    assert table.PART.read() == table.text(table.committed())


def test_throughput_of_the_flagship_is_the_raw_session_s() -> None:
    assert record(FLAGSHIP)["closed"]["tensor"]["served_over"]["raw session"]["median"] >= 0.95


def test_throughput_of_digits_is_beyond_plain_fastapi_s() -> None:
    assert record("digits")["closed"]["tensor"]["served_over"]["fastapi"]["median"] >= 1.5


def test_tail_of_the_flagship_at_80_percent_load() -> None:
    found = record(FLAGSHIP)["at_80_percent"]["constant"]
    assert found["failed"] == 0
    assert found["p99_ms"] <= 2 * found["p50_ms"]


def test_overload_is_answered_at_once_and_passes() -> None:
    flood = record(FLAGSHIP)["overload"]
    assert flood["refused_429"] > flood["requests"] / 2
    assert flood["refused_ms"]["max"] <= 50
    assert flood["other"] == 0
    assert flood["after"]["failed"] == 0
    assert flood["after"]["latency_ms"]["50"] <= 1.5 * flood["before"]["latency_ms"]["50"]
