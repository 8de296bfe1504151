"""What a measurement says: ``serve-<model>.json``, its table, and what of our claims it bears out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import ROOT
from benchmarks.serving.rounds import RAW
from benchmarks.serving.servers import GENERATOR, OURS
from vitdeploy.benchmark.results import write_whole

Record = Mapping[str, Any]
RESULTS = ROOT / "benchmarks" / "results"

FLAGSHIP = "vit_base_patch16_224"
OF_RAW = 0.95
"""Of the raw session's throughput, what is served of the flagship at least."""
OF_FASTAPI = 1.5
"""Times plain FastAPI's throughput, what is served of the digits model at least."""
REFUSED_MS = 50.0
"""Within which 99 % of those that are refused in an overload have their 429."""
TAIL = 2.0
"""p99 over p50 at 80 % load of the flagship, at most, with constant arrivals."""
RECOVERED_S = 5.0
"""After an overload, until nothing is refused any more."""
SLOWER = 1.5
"""Times its p50 before the overload, what it may be when the overload is over."""
BUSY_LOAD = 0.9
"""Share of a processor from which on the load itself may be what limits a lane."""


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


def table(record: Record) -> str:
    """The record for people, as Markdown."""
    lines = [f"**{record['model']}**, {record['environment']['cpu']['name']}, {_settings(record)}"]
    for kind, part in record["closed"].items():
        lines += [
            "",
            f"| {kind}s | images/s | vitdeploy's over it | p50 ms | p99 ms |",
            "|---|---|---|---|---|",
        ]
        lines += [f"| {' | '.join(row)} |" for row in _rows(part)]
    lines += ["", *_open_lines(record)]
    lines += [f"skipped {one['lane']}: {one['reason']}" for one in record["skipped"]]
    return "\n".join(lines)


def _settings(record: Record) -> str:
    settings = record["settings"]
    clients, rounds = settings["clients"], settings["rounds"]
    return f"{settings['threads']} threads, {clients} clients, {rounds} rounds of {settings['seconds']:g} s"


def _rows(part: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, rates in part["per_s"].items():
        over = part["served_over"].get(name)
        ratio = "" if over is None else f"{over['median']:.3f} ({over['q1']:.3f} to {over['q3']:.3f})"
        visits = part["lanes"].get(name, [])
        tails = [_median([v["latency_ms"].get(p) for v in visits]) for p in ("50", "99")]
        yield [name, f"{_middle(rates):.1f}", ratio, *tails]


def _open_lines(record: Record) -> Iterator[str]:
    load, search, flood = record["at_80_percent"], record["highest_rate"], record["overload"]
    for kind in ("constant", "poisson"):
        found, ideal = load[kind], load[kind]["ideal"]
        yield (
            f"80 % load, {kind} arrivals: p50 {found['p50_ms']} ms, p99 {found['p99_ms']} ms "
            f"({found['p99_over_p50']} x; on a perfect server {ideal['p99_over_p50']} x)"
        )
    yield (
        f"p99 under {search['bound_p99_ms']:g} ms up to {search['rate']:.1f} random requests per second, "
        f"{search['of_capacity']:.0%} of the closed-loop throughput"
    )
    if flood is not None:
        refused = flood["refused_ms"]
        yield (
            f"overload: {flood['refused_429']} of {flood['requests']} refused with 429, "
            f"p99 {refused['p99']} ms, at most {refused['max']} ms; recovered after {flood['recovery_s']} s"
        )


def _median(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{_middle(known):.1f}" if known else ""


def _middle(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else 0.0


def broken_claims(record: Record) -> list[str]:
    """What of our claims a record does not bear out; one line each."""
    name, closed = record["model"], record["closed"]
    found = list(_disturbed(record))
    if name == FLAGSHIP:
        found += _least(name, closed["tensor"], RAW, OF_RAW)
        tail = record["at_80_percent"]["constant"]
        if tail["failed"] or not tail["p99_over_p50"] or tail["p99_over_p50"] > TAIL:
            found.append(f"{name}: at 80 % load p99 is {tail['p99_over_p50']} x p50, {tail['failed']} failed")
        found += _flood(name, record["overload"])
    if name == "digits":
        found += _least(name, closed["tensor"], "fastapi", OF_FASTAPI)
    return found


def _disturbed(record: Record) -> Iterator[str]:
    for kind, part in record["closed"].items():
        for lane, visits in part["lanes"].items():
            if failed := sum(visit["failed"] for visit in visits):
                yield f"{record['model']}: {failed} {kind} requests to {lane} failed"
        busiest = max(visit["load_cpu"] for visit in part["lanes"][OURS])
        if busiest > BUSY_LOAD and _middle(part["per_s"][OURS]) > 0.8 * _middle(part["per_s"][GENERATOR]):
            yield f"{record['model']}: the load itself limits {kind} requests"


def _least(name: str, part: Mapping[str, Any], other: str, least: float) -> Iterator[str]:
    over = part["served_over"].get(other)
    if over is None:
        yield f"{name}: {other} was not measured"
    elif over["median"] < least:
        yield f"{name}: {over['median']:.3f} x {other} instead of {least} x"


def _flood(name: str, flood: Mapping[str, Any] | None) -> Iterator[str]:
    if flood is None or not flood["refused_429"]:
        yield f"{name}: no overload was measured"
        return
    slowest = flood["refused_ms"]["p99"]
    if slowest > REFUSED_MS:
        yield f"{name}: overload is answered after {slowest} ms instead of {REFUSED_MS:g} ms"
    if flood["other"]:
        yield f"{name}: {flood['other']} requests of the overload got neither an answer nor a 429"
    before, after = flood["before"]["latency_ms"], flood["after"]["latency_ms"]
    if flood["recovery_s"] > RECOVERED_S or flood["after"]["failed"] or after["50"] > SLOWER * before["50"]:
        yield f"{name}: no recovery from overload within {RECOVERED_S:g} s"
