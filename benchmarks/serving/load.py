"""The load: requests from a process of their own, closed-loop or open-loop, with every time kept.

    python -m benchmarks.serving.load < job.json

Closed-loop, so many clients ask again as soon as they are answered: what the server can do at most.
Open-loop, requests are due at times that were drawn before, whatever the server does, and a latency counts
from when its request was due: a server that stalls cannot hold back the very requests that would show it
(what Gil Tene calls coordinated omission, "How NOT to Measure Latency").

The job is a JSON object on standard input:

    host, port, path, headers   where to ask; HTTP/1.1, connections are kept
    bodies                      files that are sent in turn
    connections                 closed-loop: how many clients
    phases                      open-loop: [requests per second, seconds], one after the other
    arrivals, seed              open-loop: "poisson" or "constant"
    seconds                     closed-loop: how long
    patience                    seconds after which what is not answered is given up

The answer is one JSON object: ``due``, ``sent``, ``done`` in seconds from the beginning, ``status`` (0 where
there is no answer) of each request in the order in which they were due; ``cpu``, this process's share of one
processor meanwhile.

Needs the standard library only.
"""

from __future__ import annotations

import asyncio
import json
import random
import selectors
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving.connections import Connections, Exchange, whole_requests

_MOST_CONNECTIONS = 512
"""Open-loop. What is due beyond them waits here, its time running."""
_BEFORE_FIRST = 0.05
"""Seconds until the first request is due."""


class _Load:
    """All requests of a job."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._requests = whole_requests(job, [Path(path).read_bytes() for path in job["bodies"]])
        most = job.get("connections") or _MOST_CONNECTIONS
        self._connections = Connections(job["host"], job["port"], most, self._finished)
        self._closed_until: float | None = None
        self._missing = 0
        self._all_done = asyncio.Event()
        self.exchanges: list[Exchange] = []

    async def closed(self, connections: int, seconds: float, patience: float) -> None:
        self._closed_until = time.monotonic() + seconds
        for _ in range(connections):
            self._ask(time.monotonic())
        await self._wait(seconds + patience)

    async def open(self, due: Sequence[float], patience: float) -> None:
        begin = time.monotonic() + _BEFORE_FIRST
        for offset in due:
            moment = begin + offset
            left = moment - time.monotonic()
            if left > 0:
                await asyncio.sleep(left)
            self._ask(moment)
        await self._wait(patience)

    async def _wait(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                while self._missing:
                    self._all_done.clear()
                    await self._all_done.wait()
        except TimeoutError:
            pass

    def _ask(self, due: float) -> None:
        exchange = Exchange(self._requests[len(self.exchanges) % len(self._requests)], due)
        self._missing += 1
        self.exchanges.append(exchange)
        self._connections.ask(exchange)

    def _finished(self, exchange: Exchange) -> None:
        self._missing -= 1
        if self._closed_until is not None and exchange.done < self._closed_until:
            self._ask(exchange.done)
        if not self._missing:
            self._all_done.set()


def arrivals(kind: str, phases: Sequence[tuple[float, float]], seed: int) -> Iterator[float]:
    """When requests are due, in seconds from the beginning.

    Args:
        kind: ``poisson``, as from many clients that know nothing of each other, or ``constant``.
        phases: requests per second, and for how many seconds.
    """
    draw, begin = random.Random(seed), 0.0
    for rate, seconds in phases:
        moment = begin
        while True:
            moment += draw.expovariate(rate) if kind == "poisson" else 1 / rate
            if moment >= begin + seconds:
                break
            yield moment
        begin += seconds


async def _run(job: dict[str, Any]) -> dict[str, Any]:
    load, begin, cpu = _Load(job), time.monotonic(), time.process_time()
    if "phases" in job:
        begin += _BEFORE_FIRST
        await load.open([*arrivals(job["arrivals"], job["phases"], job["seed"])], job["patience"])
    else:
        await load.closed(job["connections"], job["seconds"], job["patience"])
    share = (time.process_time() - cpu) / (time.monotonic() - begin)
    times = {
        name: [round(moment - begin, 6) if (moment := getattr(one, name)) else None for one in load.exchanges]
        for name in ("due", "sent", "done")
    }
    return {**times, "status": [one.status for one in load.exchanges], "cpu": round(share, 4)}


def exact_loop() -> asyncio.AbstractEventLoop:
    """epoll's timeouts are whole milliseconds, select's are not: requests go out when they are due."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


def main() -> int:
    """Read the job, put the load on, print what came of it."""
    job = json.load(sys.stdin)
    loop = exact_loop()
    try:
        answer = loop.run_until_complete(_run(job))
    finally:
        loop.close()
    json.dump(answer, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
