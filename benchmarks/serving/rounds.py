"""Closed-loop: every lane in every round, in an order that is drawn anew, and ratios round by round."""

from __future__ import annotations

import json
import random
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.driving import Driver, Served
from benchmarks.serving.raw import Raw, per_second
from benchmarks.serving.servers import GENERATOR, OURS
from benchmarks.spread import quartiles
from vitdeploy.progress import Progress

RAW = "raw session"
_RARE = 0.05
"""Share of the images: a batch size that has less is not measured by itself."""
_LOAD_ALONE = 0.25
"""Share of a visit that finds out how fast the load itself is."""


@dataclass(frozen=True)
class Plan:
    """How long and how often."""

    seconds: float
    """Of a closed-loop visit; an open-loop one takes twice that."""
    rounds: int
    threads: int
    clients: int
    bound_ms: float
    overload: bool
    seed: int = 0


def closed_loop(
    kind: str, servers: Sequence[Served], raw: Raw, driver: Driver, plan: Plan, progress: Progress
) -> dict[str, Any]:
    """Measure one kind of requests; returns that part of the record.

    Raises:
        ServerFailure, WorkerFailure: a lane is gone.
    """
    asked = [server for server in servers if kind in server.asks]
    ours = next(server for server in asked if server.name == OURS)
    with progress.stage(f"{kind}: warm up"):
        sizes = _warm_up(kind, asked, ours, driver, plan)
        raw.prepare(sizes)
    lanes: dict[str, list[dict[str, Any]]] = {server.name: [] for server in asked}
    batches: list[dict[int, int]] = []
    alone: list[dict[int, float]] = []
    for number in range(plan.rounds):
        order: list[Served | None] = [*asked, None]
        random.Random(f"{plan.seed} {kind} {number}").shuffle(order)
        with progress.stage(f"{kind}: round {number + 1} of {plan.rounds}"):
            for server in order:
                if server is None:
                    alone.append(raw.visit(sizes, plan.seconds))
                    continue
                before = formed(ours)
                seconds = plan.seconds * (_LOAD_ALONE if server.name == GENERATOR else 1)
                lanes[server.name].append(driver.closed(server, kind, plan.clients, seconds).figures())
                if server is ours:
                    batches.append(difference(before, formed(ours)))
    rates = {name: [visit["per_s"] for visit in visits] for name, visits in lanes.items()}
    rates[RAW] = [round(per_second(b, s), 3) for b, s in zip(batches, alone, strict=True)]
    return {
        "lanes": lanes,
        "batches": [{str(size): count for size, count in sorted(one.items())} for one in batches],
        "raw_seconds": [{str(size): round(value, 7) for size, value in one.items()} for one in alone],
        "per_s": rates,
        "served_over": {
            name: quartiles([a / b for a, b in zip(rates[OURS], others, strict=True)])
            for name, others in rates.items()
            if name != OURS and all(others)
        },
    }


def _warm_up(kind: str, asked: Sequence[Served], ours: Served, driver: Driver, plan: Plan) -> list[int]:
    """A short visit to each; returns the batch sizes that our server forms."""
    before = formed(ours)
    for server in asked:
        driver.closed(server, kind, plan.clients, plan.seconds / 4)
    found = difference(before, formed(ours))
    images = sum(size * count for size, count in found.items())
    return sorted(size for size, count in found.items() if size * count >= _RARE * images)


def formed(server: Served) -> dict[int, int]:
    """How many batches of each size a vitdeploy server has run."""
    url = f"http://127.0.0.1:{server.port}/v2/models/model/stats"
    with urllib.request.urlopen(url, timeout=60) as response:
        (model,) = json.load(response)["model_stats"]
    return {row["batch_size"]: row["compute_infer"]["count"] for row in model["batch_stats"]}


def difference(before: Mapping[int, int], after: Mapping[int, int]) -> dict[int, int]:
    """What was counted in between."""
    counts = {size: count - before.get(size, 0) for size, count in after.items()}
    return {size: count for size, count in counts.items() if count}
