"""One visit to a server: the load's process is started, and what it kept becomes figures."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.environments import ROOT
from benchmarks.serving.processes import ServerFailure, processor_seconds, standing_still
from benchmarks.serving.subjects import Asked
from vitdeploy.backends.base import Array

PATIENCE = 60.0
"""Seconds that an answer may take."""
WARM_UP = 0.15
"""Share of a visit's seconds that comes before it and is not counted."""
_APART = 0.05
"""Of the median latency: answers that are further apart are of different batches."""
_MOST_OF = 0.5
"""Of the time of all answers: what the batches that are counted have to span."""
_PERCENTILES = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9, 100)


@dataclass(frozen=True)
class Served:
    """A server that runs, and how it is asked."""

    name: str
    port: int
    asks: Mapping[str, Asked]
    """By kind."""
    versions: Mapping[str, str]
    note: str = ""
    """What has to be known to read its figures."""
    session: int | None = None
    """Of the server's processes, where what they take of the processors is known."""


def alone(server: Served | None, servers: Iterable[Served]) -> contextlib.AbstractContextManager[None]:
    """Has the processors for one of the servers, or for none, until the block ends."""
    others = (one.session for one in servers if one is not server)
    return standing_still({session for session in others if session is not None})


@dataclass(frozen=True)
class Trace:
    """Every request of a visit, in the order in which they were due; seconds from its beginning."""

    due: Array
    sent: Array
    done: Array
    """NaN where there is no answer."""
    status: Array
    cpu: float
    """The load's share of one processor."""

    def since(self, begin: float, end: float = np.inf) -> Trace:
        """The requests that were due in this time."""
        chosen = (self.due >= begin) & (self.due < end)
        return Trace(self.due[chosen], self.sent[chosen], self.done[chosen], self.status[chosen], self.cpu)

    def latencies(self, *status: int) -> Array:
        """Milliseconds from when a request was due to its answer, of those with this status."""
        chosen = np.isin(self.status, status)
        return 1000 * (self.done[chosen] - self.due[chosen])

    @property
    def failed(self) -> int:
        """Requests without a right answer."""
        return int((self.status != 200).sum())

    def per_second(self) -> float:
        """Right answers per second.

        They come in batches, and a count between two moments would depend on which batches these moments
        cut off: so it is counted from the beginning of one batch to the beginning of another.
        """
        done = np.sort(self.done[self.status == 200])
        if len(done) < 3 or done[-1] == done[0]:
            return 0.0
        apart = float(np.median(self.latencies(200))) / 1000 * _APART
        begins = np.flatnonzero(np.diff(done) > apart) + 1
        first, last = (begins[0], begins[-1]) if len(begins) > 1 else (0, len(done) - 1)
        if done[last] - done[first] < _MOST_OF * (done[-1] - done[0]):  # too few batches to tell
            first, last = 0, len(done) - 1
        return float((last - first) / (done[last] - done[first]))

    def figures(self) -> dict[str, Any]:
        """As the record has them."""
        right = self.latencies(200)
        grid: Sequence[Any] | Array = np.percentile(right, _PERCENTILES) if len(right) else []
        lag = 1000 * (self.sent - self.due)
        return {
            "requests": len(self.due),
            "failed": self.failed,
            "per_s": round(self.per_second(), 3),
            "latency_ms": {str(p): round(float(v), 3) for p, v in zip(_PERCENTILES, grid, strict=False)},
            "late_p99_ms": round(float(np.percentile(lag, 99)), 3) if len(lag) else None,
            "load_cpu": self.cpu,
        }


class Driver:
    """Puts load on servers. Keeps the requests' bodies in a folder, for the load's process to read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[tuple[str, str], list[str]] = {}

    def visit(self, server: Served, kind: str, clients: int, seconds: float) -> dict[str, Any]:
        """What :meth:`closed` finds, as the record has it, and the processor time that a request takes.

        Raises:
            ServerFailure: the load's process fails.
        """
        before = server.session and processor_seconds(server.session)
        whole = self._closed(server, kind, clients, seconds)
        figures = _counted(whole, clients, seconds).figures()
        if server.session is not None and before is not None:
            spent = processor_seconds(server.session) - before
            figures["server_cpu_ms"] = round(1000 * spent / max(1, len(whole.due)), 4)
        return figures

    def closed(self, server: Served, kind: str, clients: int, seconds: float) -> Trace:
        """So many clients ask again as soon as they are answered.

        Raises:
            ServerFailure: the load's process fails.
        """
        return _counted(self._closed(server, kind, clients, seconds), clients, seconds)

    def _closed(self, server: Served, kind: str, clients: int, seconds: float) -> Trace:
        return self._drive(server, kind, {"connections": clients, "seconds": (1 + WARM_UP) * seconds})

    def open(
        self,
        server: Served,
        kind: str,
        phases: Sequence[tuple[float, float]],
        arrivals: str,
        seed: int,
    ) -> Trace:
        """Requests come when they are due, whatever the server does.

        Raises:
            ServerFailure: the load's process fails.
        """
        return self._drive(server, kind, {"phases": phases, "arrivals": arrivals, "seed": seed})

    def _drive(self, server: Served, kind: str, how: Mapping[str, Any]) -> Trace:
        asked = server.asks[kind]
        job = {
            **how,
            "host": "127.0.0.1",
            "port": server.port,
            "path": asked.path,
            "headers": dict(asked.headers),
            "bodies": self.bodies(server, kind),
            "patience": PATIENCE,
        }
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.serving.load"],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        if done.returncode:
            raise ServerFailure(f"the load on {server.name} failed: {' '.join(done.stderr.split())[-300:]}")
        return read_trace(json.loads(done.stdout))

    def bodies(self, server: Served, kind: str) -> list[str]:
        """Files with the bodies of a server's requests."""
        if (server.name, kind) not in self._files:
            paths = []
            for index, body in enumerate(server.asks[kind].bodies):
                path = self._folder / f"{server.name}-{kind}-{index}.body"
                path.write_bytes(body)
                paths.append(str(path))
            self._files[server.name, kind] = paths
        return self._files[server.name, kind]


def _counted(trace: Trace, clients: int, seconds: float) -> Trace:
    """A closed-loop visit without its warm-up."""
    return trace.since(WARM_UP * seconds if len(trace.due) > clients else 0.0)


def read_trace(answer: Mapping[str, Any]) -> Trace:
    """What the load's process printed."""
    due, sent, done = (np.array(answer[name], np.float64) for name in ("due", "sent", "done"))
    return Trace(due, sent, done, np.array(answer["status"], np.int64), answer["cpu"])
