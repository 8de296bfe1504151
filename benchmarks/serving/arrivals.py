"""Open-loop: latency at 80 % of what can be served, the highest rate within a bound, and an overload."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.serving.driving import Driver, Served, Trace
from benchmarks.serving.settings import Plan
from vitdeploy.backends.base import Array
from vitdeploy.progress import Progress

LOAD = 0.8
REPEATS = 3
_STEPS = 6
"""Of the bisection: the rate is found to 2 % of the capacity."""
_CEILING = 1.2
"""Of the closed-loop throughput, where the search begins."""
_EASY, _OVERLOAD = 0.5, 3.0
"""Times what can be served: before and after an overload, and while it lasts."""
OVERLOAD_QUEUE = 16
"""Images that may wait on the server that is overloaded."""


def at_load(
    server: Served,
    capacity: float,
    ideal: Callable[[Array], Array],
    driver: Driver,
    plan: Plan,
    progress: Progress,
) -> dict[str, Any]:
    """Latencies at 80 % of the capacity, with constant arrivals and with random ones.

    Constant arrivals tell what the server adds: nothing need ever wait. Random ones come in bursts, which
    wait on any server; so beside them stands what a perfect server would have made of the very same ones.

    Args:
        ideal: milliseconds of each request on that server, from when they are due.
    """
    rate = LOAD * capacity
    traces: dict[str, list[Trace]] = {"constant": [], "poisson": []}
    for repeat in range(REPEATS):
        order = list(traces)
        random.Random(f"{plan.seed} order {repeat}").shuffle(order)
        for kind in order:
            with progress.stage(f"80 % load, {kind}, {repeat + 1} of {REPEATS}"):
                seed = plan.seed + repeat
                traces[kind].append(_steady(driver, server, rate, plan, kind, seed))
    return {
        "rate": round(rate, 3),
        **{kind: _summary(found, ideal) for kind, found in traces.items()},
    }


def _steady(driver: Driver, server: Served, rate: float, plan: Plan, kind: str, seed: int) -> Trace:
    """A visit of twice the plan's seconds, after a warm-up."""
    warm_up = 0.3 * plan.seconds
    trace = driver.open(server, "tensor", [(rate, warm_up + 2 * plan.seconds)], kind, seed)
    return trace.since(warm_up)


def _summary(traces: Sequence[Trace], ideal: Callable[[Array], Array]) -> dict[str, Any]:
    together = np.concatenate([trace.latencies(200) for trace in traces])
    perfect = np.concatenate([ideal(trace.due) for trace in traces])
    return {
        **_tail(together),
        "failed": sum(trace.failed for trace in traces),
        "ideal": _tail(perfect),
        "visits": [trace.figures() for trace in traces],
    }


def _tail(latencies: Array) -> dict[str, Any]:
    if not len(latencies):
        return {"p50_ms": None, "p99_ms": None, "p99_over_p50": None}
    p50, p99 = np.percentile(latencies, [50, 99])
    return {
        "p50_ms": round(float(p50), 3),
        "p99_ms": round(float(p99), 3),
        "p99_over_p50": round(float(p99 / p50), 3),
    }


def ideal_latencies(due: Array, seconds: Callable[[int], float], most: int, sessions: int = 1) -> Array:
    """Milliseconds of requests on a server that costs nothing but its sessions.

    It runs whatever waits, ``most`` at most, whenever a session is free.

    Args:
        due: when requests come, ascending, in seconds.
        seconds: of a run at a batch size.
    """
    found, free, first = np.empty(len(due)), [0.0] * sessions, 0
    while first < len(due):
        begin = max(heapq.heappop(free), float(due[first]))
        last = min(int(np.searchsorted(due, begin, side="right")), first + most)
        end = begin + seconds(last - first)
        heapq.heappush(free, end)
        found[first:last] = 1000 * (end - due[first:last])
        first = last
    return found


def highest_rate(
    server: Served, capacity: float, driver: Driver, plan: Plan, progress: Progress
) -> dict[str, Any]:
    """The highest rate of random arrivals at which p99 stays under the plan's bound, by bisection."""
    low, high = 0.0, _CEILING * capacity
    steps = []
    for step in range(_STEPS):
        rate = (low + high) / 2
        with progress.stage(f"p99 under {plan.bound_ms:g} ms") as stage:
            figures = _steady(driver, server, rate, plan, "poisson", plan.seed + 10 + step).figures()
            p99 = figures["latency_ms"].get("99")
            within = p99 is not None and not figures["failed"] and p99 <= plan.bound_ms
            stage.detail = f"{rate:.1f}/s: {'yes' if within else 'no'}"
        steps.append({"rate": round(rate, 3), "within": within, **figures})
        low, high = (rate, high) if within else (low, rate)
    return {
        "arrivals": "poisson",
        "bound_p99_ms": plan.bound_ms,
        "rate": round(low, 3),
        "of_capacity": round(low / capacity, 4),
        "steps": steps,
    }


def overload(server: Served, capacity: float, driver: Driver, plan: Plan) -> dict[str, Any]:
    """Half of the capacity, three times the capacity, and half of it again, without a pause."""
    length = max(plan.seconds, 2.0)
    phases = [(factor * capacity, length) for factor in (_EASY, _OVERLOAD, _EASY)]
    trace = driver.open(server, "tensor", phases, "constant", plan.seed)
    before, during = trace.since(0.2 * length, length), trace.since(length, 2 * length)
    after = trace.since(2 * length)
    refused, accepted = during.latencies(429), during.latencies(200)
    troubled = after.due[after.status != 200]
    late = after.since(2.5 * length)
    recovery = float(troubled.max() - 2 * length) if len(troubled) else 0.0
    return {
        "queue": OVERLOAD_QUEUE,
        "rates": [round(rate, 3) for rate, _ in phases],
        "seconds": length,
        "requests": len(during.due),
        "accepted": len(accepted),
        "refused_429": len(refused),
        "other": int((~np.isin(during.status, (200, 429))).sum()),
        "refused_ms": {name: _percentile(refused, p) for name, p in (("p50", 50), ("p99", 99), ("max", 100))},
        "accepted_ms": {name: _percentile(accepted, p) for name, p in (("p50", 50), ("max", 100))},
        "served_over_capacity": round(during.per_second() / capacity, 3),
        "recovery_s": round(recovery, 3),
        "before": before.figures(),
        "after": late.figures(),
        "load_cpu": trace.cpu,
    }


def _percentile(values: Array, percent: float) -> float | None:
    return round(float(np.percentile(values, percent)), 3) if len(values) else None
