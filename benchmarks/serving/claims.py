"""What we claim of the server, each claim with what a record says of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from benchmarks.serving.record import (
    Record,
    best,
    best_raw,
    family,
    middle,
    over,
    peers,
    rates,
)
from benchmarks.serving.servers import GENERATOR, OPTIMIZED, OTHER_RUNTIME, OURS

FLAGSHIP = "vit_base_patch16_224"
OVER_PEERS: Mapping[tuple[str, str], float] = MappingProxyType(
    {(FLAGSHIP, "tensor"): 1.0, ("digits", "tensor"): 1.5, ("digits", "image"): 1.3}
)
"""Times the throughput of every peer on the same runtime, what is served at least, by model and requests."""
OF_RAW = 0.97
"""Of the throughput of the sessions alone at their best, what is served of the flagship at least."""
OPTIMIZED_OVER = 2.5
"""Times the fastest fp32 peer's throughput, what is served of the flagship as ``optimize`` picks it."""
TAIL = 1.5
"""p99 over p50 at 80 % load, at most, with constant arrivals."""
OF_PERFECT = 1.2
"""Times the p99 of a perfect server, what p99 is at most at 80 % load of the flagship with random arrivals.
(The sessions of a tiny model take next to nothing, and so does a server that costs nothing else.)"""
REFUSED_MS = 50.0
"""Within which 99 % of those that are refused in an overload have their 429."""
RECOVERED_S = 5.0
"""After an overload, until nothing is refused any more."""
SLOWER = 1.5
"""Times its p50 before the overload, what it may be when the overload is over."""
BUSY_LOAD = 0.9
"""Share of a processor from which on the load itself may be what limits a lane."""
NEEDED = ("fastapi", "litserve", "triton")
"""Peers that have to be measured for a claim about all of them."""
_NO_IMAGES = ("triton",)


@dataclass(frozen=True)
class Claim:
    """Something about a model's server that is at least or at most a number."""

    what: str
    found: float | None
    """None: not measured."""
    bound: float
    at_least: bool = False
    unit: str = "x"

    @property
    def holds(self) -> bool:
        if self.found is None:
            return False
        return self.found >= self.bound if self.at_least else self.found <= self.bound

    @property
    def goal(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.bound:g} {self.unit}".strip()

    @property
    def measured(self) -> str:
        return "not yet measured" if self.found is None else f"{self.found:.5g} {self.unit}".strip()


def claims(record: Record) -> list[Claim]:
    """Everything that we claim of a model."""
    parts = (_throughput, _latency, _overload, _loadgen, _failures)
    return [claim for part in parts for claim in part(record)]


def broken_claims(record: Record) -> list[str]:
    """What of our claims a record does not bear out, or was disturbed by; one line each."""
    broken = [one for one in claims(record) if one.found is not None and not one.holds]
    lines = [f"{record['model']}: {one.what}: {one.measured} instead of {one.goal}" for one in broken]
    return [*lines, *_disturbed(record)]


def unmeasured(record: Record) -> list[str]:
    """What of our claims a record does not speak of; one line each."""
    return [f"{record['model']}: {one.what}: not measured" for one in claims(record) if one.found is None]


def _throughput(record: Record) -> Iterator[Claim]:
    model, closed = record["model"], record["closed"]
    for (of, kind), bound in OVER_PEERS.items():
        if of != model:
            continue
        part = closed.get(kind, _NOTHING)
        lanes = [name for name in peers(part) if family(name) not in OTHER_RUNTIME]
        for needed in NEEDED:
            if not (kind == "image" and needed in _NO_IMAGES):
                found = [name for name in lanes if family(name) == needed]
                for name in found or [needed]:
                    yield _ratio(part, OURS, name, f"{kind}s served, over {name}", bound)
    if model == FLAGSHIP:
        part = closed.get("tensor", _NOTHING)
        raw = best_raw(part) if len({row["sessions"] for row in part["raw"]}) > 1 else None
        yield _ratio(part, OURS, raw, "tensors served, over the sessions alone at their best", OF_RAW)
        fastest = best(part, peers(part))
        what = "`optimize`'s pick served, over the fastest fp32 peer"
        yield _ratio(part, OPTIMIZED, fastest, what, OPTIMIZED_OVER)


_NOTHING: Mapping[str, Any] = MappingProxyType({"lanes": {}, "raw": ()})


def _ratio(part: Mapping[str, Any], lane: str, other: str | None, what: str, bound: float) -> Claim:
    ratio = None if other is None else over(part, lane, other)
    return Claim(what, None if ratio is None else ratio["median"], bound, at_least=True)


def _latency(record: Record) -> Iterator[Claim]:
    load: Mapping[str, Any] = record.get("at_80_percent") or {}
    constant, random = load.get("constant") or {}, load.get("poisson") or {}
    yield Claim("p99 over p50 at 80 % load, constant arrivals", constant.get("p99_over_p50"), TAIL)
    if record["model"] == FLAGSHIP:
        perfect = (random.get("ideal") or {}).get("p99_ms")
        ratio = random["p99_ms"] / perfect if perfect and random.get("p99_ms") else None
        yield Claim("p99 over a perfect server's at 80 % load, random arrivals", ratio, OF_PERFECT)


def _overload(record: Record) -> Iterator[Claim]:
    if record["model"] != FLAGSHIP:
        return
    flood: Mapping[str, Any] = record.get("overload") or {}
    refused = flood if flood.get("refused_429") else {}
    slowest = refused["refused_ms"]["p99"] if refused else None
    yield Claim("p99 of the refusals in an overload", slowest, REFUSED_MS, unit="ms")
    other = refused.get("other")
    yield Claim("requests of an overload without an answer or a refusal", other, 0, unit="")
    recovery = flood.get("recovery_s")
    yield Claim("the time after an overload until nothing is refused", recovery, RECOVERED_S, unit="s")
    slower = None
    if flood and flood["after"]["failed"]:
        slower = math.inf
    elif flood:
        slower = flood["after"]["latency_ms"]["50"] / flood["before"]["latency_ms"]["50"]
    yield Claim("p50 after an overload, over that before it", slower, SLOWER)


def _loadgen(record: Record) -> Iterator[Claim]:
    ours = ((record.get("loadgen") or {}).get("lanes") or {}).get(OURS)
    right = None
    if ours is not None:
        accuracy = ours["accuracy"]
        right = 0.0 if accuracy["wrong"] else accuracy["answered"] / accuracy["samples"]
    yield Claim("right answers in LoadGen's accuracy mode", right, 1.0, at_least=True, unit="of all")
    for scenario in ("SingleStream", "Offline"):
        valid = None if ours is None else float(ours[scenario]["valid"])
        yield Claim(f"valid runs of LoadGen's {scenario} scenario", valid, 1.0, at_least=True, unit="of 1")


def _failures(record: Record) -> Iterator[Claim]:
    visits = [visit for part in record["closed"].values() for visit in part["lanes"].get(OURS, ())]
    failed = sum(visit["failed"] for visit in visits) if visits else None
    yield Claim("failed requests, as many clients as batches take", failed, 0, unit="")
    load: Mapping[str, Any] = record.get("at_80_percent") or {}
    steady = sum(load[kind]["failed"] for kind in ("constant", "poisson")) if load else None
    yield Claim("failed requests at 80 % load", steady, 0, unit="")


def _disturbed(record: Record) -> Iterator[str]:
    for kind, part in record["closed"].items():
        for lane, visits in part["lanes"].items():
            failed = sum(visit["failed"] for visit in visits)
            if failed and lane != OURS:
                yield f"{record['model']}: {failed} {kind} requests to {lane} failed"
        speeds, busiest = rates(part), max(visit["load_cpu"] for visit in part["lanes"][OURS])
        if busiest > BUSY_LOAD and middle(speeds[OURS]) > 0.8 * middle(speeds[GENERATOR]):
            yield f"{record['model']}: the load itself limits {kind} requests"
