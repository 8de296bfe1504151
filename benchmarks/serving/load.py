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

Needs the standard library only. The parts of a request are put together beforehand, and an answer is not
looked at beyond its status and length: what the load itself costs has to stay small beside the server.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import selectors
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_MOST_CONNECTIONS = 512
"""Open-loop. What is due beyond them waits here, its time running."""
_BEFORE_FIRST = 0.05
"""Seconds until the first request is due."""


class _Connection(asyncio.Protocol):
    """A connection with one request in flight at most."""

    def __init__(self, load: _Load) -> None:
        self._load = load
        self._buffer = bytearray()
        self._end = 0
        self._status = 0
        self.request: int | None = None
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._load.free(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._end:
            head = self._buffer.find(b"\r\n\r\n")
            if head < 0:
                return
            length = _LENGTH.search(self._buffer, 0, head + 2)
            if length is None:
                raise ValueError(f"an answer without a length: {bytes(self._buffer[:head])!r}")
            self._status = int(self._buffer[9:12])
            self._end = head + 4 + int(length[1])
        if len(self._buffer) >= self._end:
            self._buffer.clear()
            self._end = 0
            self._load.answered(self, self._status)

    def connection_lost(self, error: Exception | None) -> None:
        self._load.lost(self)


class _Load:
    """All requests of a job, and the connections they take."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._where = (job["host"], job["port"])
        self._bodies = [_request(job, Path(path).read_bytes()) for path in job["bodies"]]
        self._idle: list[_Connection] = []
        self._waiting: deque[int] = deque()
        self._connections = 0
        self._most = job.get("connections") or _MOST_CONNECTIONS
        self._closed_until: float | None = None
        self._opening: set[asyncio.Task[Any]] = set()
        self._missing = 0
        self._all_done = asyncio.Event()
        self.due: list[float] = []
        self.sent: list[float] = []
        self.done: list[float] = []
        self.status: list[int] = []

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
        request = len(self.due)
        self._missing += 1
        self.due.append(due)
        self.sent.append(0.0)
        self.done.append(0.0)
        self.status.append(0)
        if self._idle:
            self._send(self._idle.pop(), request)
        else:
            self._waiting.append(request)
            self._open_another()

    def _open_another(self) -> None:
        if self._connections < self._most:
            self._connections += 1
            loop = asyncio.get_running_loop()
            task = loop.create_task(loop.create_connection(lambda: _Connection(self), *self._where))
            self._opening.add(task)
            task.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task[Any]) -> None:
        self._opening.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._connections -= 1
            if self._waiting:  # refused: that is an answer, too
                self._finish(self._waiting.popleft(), 0)

    def _send(self, connection: _Connection, request: int) -> None:
        connection.request = request
        self.sent[request] = time.monotonic()
        connection.transport.write(self._bodies[request % len(self._bodies)])

    def free(self, connection: _Connection) -> None:
        """A connection can take a request."""
        if self._waiting:
            self._send(connection, self._waiting.popleft())
        else:
            self._idle.append(connection)

    def answered(self, connection: _Connection, status: int) -> None:
        """A connection's request has its answer."""
        request, connection.request = connection.request, None
        assert request is not None, "an answer that nobody asked for"
        self._finish(request, status)
        self.free(connection)

    def lost(self, connection: _Connection) -> None:
        """A connection is gone, perhaps with its request."""
        self._connections -= 1
        if connection in self._idle:
            self._idle.remove(connection)
        if connection.request is not None:
            self._finish(connection.request, 0)
        if self._waiting:
            self._open_another()

    def _finish(self, request: int, status: int) -> None:
        now = time.monotonic()
        self.done[request], self.status[request] = now, status
        self._missing -= 1
        if self._closed_until is not None and now < self._closed_until:
            self._ask(now)
        if not self._missing:
            self._all_done.set()


def _request(job: dict[str, Any], body: bytes) -> bytes:
    """A whole request."""
    headers = {"Host": f"{job['host']}:{job['port']}", **job["headers"], "Content-Length": str(len(body))}
    lines = [f"POST {job['path']} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


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
    times = {
        name: [round(moment - begin, 6) if moment else None for moment in moments]
        for name, moments in (("due", load.due), ("sent", load.sent), ("done", load.done))
    }
    share = (time.process_time() - cpu) / (time.monotonic() - begin)
    return {**times, "status": load.status, "cpu": round(share, 4)}


def main() -> int:
    """Read the job, put the load on, print what came of it."""
    job = json.load(sys.stdin)
    # epoll's timeouts are whole milliseconds, select's are not: requests go out when they are due.
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    try:
        answer = loop.run_until_complete(_run(job))
    finally:
        loop.close()
    json.dump(answer, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
