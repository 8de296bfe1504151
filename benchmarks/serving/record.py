"""What a measurement says: ``serve-<model>.json``, and the ratios of what it has."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import ROOT
from benchmarks.serving.servers import GENERATOR, OPTIMIZED, OURS
from benchmarks.spread import quartiles
from vitdeploy.benchmark.results import write_whole

Record = Mapping[str, Any]
RESULTS = ROOT / "benchmarks" / "results"
SCHEMA = 2
RAW = "sessions alone"


def write(record: Record, path: Path) -> None:
    """Write a record, each visit on a line of its own.

    Raises:
        UsageError: it cannot be written.
    """
    write_whole(path, "".join(_rendered(record, 0)) + "\n")


def _rendered(value: Any, depth: int) -> Iterator[str]:
    """JSON that is read and compared line by line: short things on one line."""
    flat = json.dumps(value)
    if len(flat) <= 160 or not isinstance(value, dict | list):
        yield flat
        return
    margin = "  " * (depth + 1)
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    entries = value.items() if isinstance(value, dict) else (("", entry) for entry in value)
    yield opening
    for index, (key, entry) in enumerate(entries):
        yield f"{',' if index else ''}\n{margin}"
        if isinstance(value, dict):
            yield f"{json.dumps(key)}: "
        yield from _rendered(entry, depth + 1)
    yield f"\n{'  ' * depth}{closing}"


def read(path: Path) -> Record:
    """A record that was written."""
    document: Record = json.loads(path.read_text(encoding="utf-8"))
    return document


def rates(part: Mapping[str, Any]) -> dict[str, list[float]]:
    """Images per second of every lane of one kind of requests, round by round."""
    served = {name: [visit["per_s"] for visit in visits] for name, visits in part["lanes"].items()}
    return served | {raw_name(row): row["per_s"] for row in part["raw"]}


def raw_name(row: Mapping[str, Any]) -> str:
    """What the sessions alone are called at one batch size."""
    return f"{RAW}, {row['sessions']} x {row['threads']}, batch {row['batch']}"


def best(part: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The lane among these with the largest median of its rates; None where there is none."""
    found = rates(part)
    return max((name for name in names if name in found), key=lambda name: middle(found[name]), default=None)


def best_raw(part: Mapping[str, Any]) -> str | None:
    """The fastest way to run the sessions alone."""
    return best(part, [raw_name(row) for row in part["raw"]])


def peers(part: Mapping[str, Any]) -> list[str]:
    """The lanes of other servers."""
    return [name for name in part["lanes"] if name not in (OURS, OPTIMIZED, GENERATOR)]


def family(lane: str) -> str:
    """The peer that a lane is a way to set up of."""
    return lane.partition(" ")[0]


def over(part: Mapping[str, Any], lane: str, other: str) -> dict[str, float] | None:
    """How many times another lane's images per second a lane gives, round by round; None: not measured."""
    found = rates(part)
    pairs = list(zip(found.get(lane, ()), found.get(other, ()), strict=False))
    return quartiles([a / b for a, b in pairs]) if pairs and all(b for _, b in pairs) else None


def middle(values: Sequence[float]) -> float:
    """The median; 0 of nothing."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else 0.0
