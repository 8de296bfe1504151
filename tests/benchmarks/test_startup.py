"""The measurement of starts: what is timed, and that it says where our claims do not hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import startup


def record(**seconds: float) -> dict[str, Any]:
    """One in which everything takes 0.2 s, but what is named."""
    found = {
        name: {key: {"median": seconds.get(name, 0.2), "q1": 0.1, "q3": 4.0} for key in keys}
        for name, keys in {
            name: ("seconds", "processor_seconds", *(("beyond_reading",) if "vit" in name else ()))
            for name in startup.TITLES
        }.items()
    }
    return {
        "starts": found,
        "rounds": 3,
        "command": "x",
        "environment": {"cpu": {"name": "a processor", "threads": 2}},
    }


def test_what_does_not_hold_is_said() -> None:
    assert startup.broken_claims(record()) == []
    assert startup.broken_claims(record(help=0.26, predict_vit=2.0, serve_vit=9.0)) == [
        "`vitdeploy --help`: 0.26 s instead of 0.25 s"
    ]
    slow = record()
    slow["starts"]["predict_vit"]["seconds"]["median"] = 9.0  # reading a large file is nobody's fault
    assert startup.broken_claims(slow) == []


def test_the_table_has_a_row_for_each() -> None:
    rows = startup.table(record()).splitlines()
    assert "| `vitdeploy --help` | 0.20 (0.10 to 4.00) |  | 0.20 |" in rows
    assert sum(line.startswith("| `vitdeploy") for line in rows) == len(startup.TITLES)


@pytest.mark.slow
def test_a_server_is_timed_until_it_is_ready_and_ends(digits_onnx: Path) -> None:
    starts = startup.starts(digits_onnx, digits_onnx)
    assert starts.keys() == startup.TITLES.keys()
    found = startup.once(starts["serve_vit"])
    assert found["beyond_reading"] == found["seconds"] - found["reading"]
    assert found["processor_seconds"] > 0


@pytest.mark.slow
def test_a_start_that_fails_is_no_figure(tmp_path: Path) -> None:
    starts = startup.starts(tmp_path / "nowhere", tmp_path / "nowhere")
    with pytest.raises(SystemExit, match="nowhere"):
        startup.once(starts["predict_digits"])


def test_the_document_says_what_the_record_says() -> None:
    committed = json.loads(startup.RESULTS.read_text(encoding="utf-8"))
    assert startup.PART.read() == startup.table(committed)
    assert startup.broken_claims(committed) == []
