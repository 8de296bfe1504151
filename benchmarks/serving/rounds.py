"""Closed-loop: every lane in every round, in an order that is drawn anew, so that ratios are of one round."""

from __future__ import annotations

import json
import random
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.serving.driving import Driver, Served, alone
from benchmarks.serving.raw import Raw, Visit
from benchmarks.serving.servers import GENERATOR, OURS
from benchmarks.serving.settings import Plan
from vitdeploy.progress import Progress

_ALONE = 0.25
"""Share of a visit's seconds that the load alone takes, and each batch size of the sessions alone."""

RawLane = tuple[Raw, int]
"""Sessions and the batch size that they run."""


def closed_loop(
    kind: str, servers: Sequence[Served], raws: Sequence[Raw], driver: Driver, plan: Plan, progress: Progress
) -> dict[str, Any]:
    """Measure one kind of requests; returns that part of the record.

    Raises:
        ServerFailure, WorkerFailure: a lane is gone.
    """
    asked = [server for server in servers if kind in server.asks]
    ours = next(server for server in asked if server.name == OURS)
    sessions: list[RawLane] = [(raw, size) for raw in raws for size in plan.batches]
    with progress.stage(f"{kind}: warm up"):
        for server in asked:
            driver.closed(server, kind, plan.clients, plan.seconds / 4)
        for raw, size in sessions:
            raw.prepare(size)
    lanes: dict[str, list[dict[str, Any]]] = {server.name: [] for server in asked}
    visits: dict[RawLane, list[Visit]] = {lane: [] for lane in sessions}
    batches: list[dict[int, int]] = []
    rounds = plan.rounds_of(kind)
    for number in range(rounds):
        order: list[Served | RawLane] = [*asked, *sessions]
        random.Random(f"{plan.seed} {kind} {number}").shuffle(order)
        with progress.stage(f"{kind}: round {number + 1} of {rounds}"):
            for lane in order:
                if isinstance(lane, tuple):
                    raw, size = lane
                    with alone(None, servers):
                        visits[lane].append(raw.visit(size, _ALONE * plan.seconds))
                    continue
                before = formed(ours)
                seconds = plan.seconds * (_ALONE if lane.name == GENERATOR else 1)
                with alone(lane, servers):
                    lanes[lane.name].append(driver.visit(lane, kind, plan.clients, seconds))
                if lane is ours:
                    batches.append(difference(before, formed(ours)))
    return {
        "lanes": lanes,
        "batches": [{str(size): count for size, count in sorted(one.items())} for one in batches],
        "raw": [_row(lane, found) for lane, found in visits.items()],
    }


def _row(lane: RawLane, found: Sequence[Visit]) -> dict[str, Any]:
    raw, size = lane
    return {
        "sessions": raw.sessions.count,
        "threads": raw.sessions.threads,
        "batch": size,
        "per_s": [round(visit.per_s, 3) for visit in found],
        "seconds": [round(visit.seconds, 7) for visit in found],
    }


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
