"""Dynamic batching: what waits while the session is busy runs together when it is free.

Everything but the run itself happens on the event loop, so nothing here needs a lock. A request that is
cancelled, or whose deadline passes, leaves the queue at once; one that is running is only forgotten.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vitdeploy.errors import VitdeployError
from vitdeploy.server.messages import Array, RequestError

Arrays = Mapping[str, Array]
Run = Callable[[Arrays], Arrays]
"""Runs a session: (n, ...) arrays by name to (n, ...) arrays by name; blocks."""

_RATE_MEMORY = 0.9
"""How slowly the rate at which a session works is forgotten."""


@dataclass(frozen=True)
class BatchingRules:
    """How requests become batches."""

    gather: int
    """Rows that are usually run together at most; a longer request runs alone."""
    max_rows: int
    """Rows of one request at most."""
    short: float = 0.0
    """Seconds: while a run takes no longer, more rows than usual are run together."""
    delay: float = 0.0
    """Seconds that a free session waits for company for the oldest request."""
    max_queue: int = 256
    """Rows that wait at most."""
    timeout: float = 30.0
    """Seconds after which a request that has not begun to run is given up."""
    buckets: tuple[int, ...] = ()
    """Batch sizes that the session is run at: a smaller batch is filled up to the next; empty is any."""

    def together(self, rate: float) -> int:
        """Rows that are run together at most, by a session that does so many per second.

        Of a short run, what it costs to begin and to end is a good part; a long one has the next wait.
        """
        return max(self.gather, min(self.max_rows, int(rate * self.short)))

    def padded(self, rows: int) -> int:
        """The batch size at which ``rows`` run."""
        return min((size for size in self.buckets if size >= rows), default=rows)


class Observer(Protocol):
    """Hears what the batcher does; times in seconds."""

    def queued(self, rows: int) -> None:
        """How many rows wait now."""

    def executed(self, rows: int, padded: int, seconds: float) -> None:
        """A batch of ``rows`` was run at the size ``padded``."""


@dataclass(frozen=True)
class RequestOutputs:
    """The rows of one request, and where their time went."""

    outputs: Arrays
    waited: float
    """Seconds in the queue."""
    computed: float
    """Seconds that the batch ran."""
    batch: int
    """Rows that ran together."""
    finite: bool = True
    """Whether its rows have neither NaN nor infinity."""


@dataclass(eq=False)
class _Waiting:
    inputs: Arrays
    rows: int
    future: asyncio.Future[RequestOutputs]
    arrived: float
    queued: bool = True


class Batcher:
    """Runs the requests of many clients on a few sessions of one model.

    Create it on the event loop; ``close`` it when it is done.

    Args:
        runs: one callable per session; each is called from one thread at a time.
    """

    def __init__(self, runs: Sequence[Run], rules: BatchingRules, observer: Observer) -> None:
        self.rules = rules
        self._observer = observer
        self._queue: deque[_Waiting] = deque()
        self._rows = 0
        self._arrival = asyncio.Event()
        self._closing = False
        self._rate = 0.0
        """Rows per second of one session."""
        self._pool = ThreadPoolExecutor(len(runs), thread_name_prefix="session")
        self._workers = [asyncio.create_task(self._work(run)) for run in runs]

    @property
    def waiting(self) -> int:
        """Rows in the queue."""
        return self._rows

    async def submit(self, inputs: Arrays, timeout: float | None = None) -> RequestOutputs:
        """Run one request's rows, together with others'.

        Args:
            inputs: (n, ...) arrays by name, all of the same n, in the session's dtypes and shapes.
            timeout: seconds within which the run must begin, if that is less than the rules' own.

        Raises:
            RequestError: too many rows, the queue is full, the time is over, or the run failed.
        """
        rows = len(next(iter(inputs.values())))
        if rows > self.rules.max_rows:
            raise RequestError("invalid", f"a batch of {rows}, but at most {self.rules.max_rows} are served")
        if self._closing:
            raise RequestError("unavailable", "the model is being unloaded", retry_after=1.0)
        if self._rows + rows > self.rules.max_queue:
            raise RequestError("overloaded", "Exceeds maximum queue size", retry_after=self.busy_for())
        future: asyncio.Future[RequestOutputs] = asyncio.get_running_loop().create_future()
        entry = _Waiting(inputs, rows, future, arrived=time.perf_counter())
        self._queue.append(entry)
        self._count(rows)
        self._arrival.set()
        limit = min(self.rules.timeout, self.rules.timeout if timeout is None else timeout)
        expiry = asyncio.get_running_loop().call_later(limit, self._expire, entry, limit)
        try:
            return await entry.future
        finally:
            expiry.cancel()
            self._leave(entry)

    def busy_for(self) -> float:
        """Seconds that what waits now will take, from the pace of late; 1 where that is not known."""
        return self._rows / (len(self._workers) * self._rate) if self._rate else 1.0

    def abandon(self) -> None:
        """Refuse what waits; what runs goes on."""
        for entry in self._queue:
            if not entry.future.done():
                entry.future.set_exception(
                    RequestError("unavailable", "the server is shutting down", retry_after=1.0)
                )

    async def close(self) -> None:
        """Refuse what is new, finish what was accepted, stop."""
        self._closing = True
        self._arrival.set()
        await asyncio.gather(*self._workers)
        await asyncio.to_thread(self._pool.shutdown)

    def _count(self, rows: int) -> None:
        self._rows += rows
        self._observer.queued(self._rows)

    def _leave(self, entry: _Waiting) -> None:
        """A request that was given up does not keep its place in the queue."""
        if entry.queued:
            entry.queued = False
            self._queue.remove(entry)
            self._count(-entry.rows)

    def _expire(self, entry: _Waiting, limit: float) -> None:
        if entry.queued and not entry.future.done():
            entry.future.set_exception(RequestError("timeout", f"no session was free within {limit:g} s"))

    async def _work(self, run: Run) -> None:
        """One session's life."""
        loop = asyncio.get_running_loop()
        while batch := await self._next_batch():
            begin = time.perf_counter()
            rows = sum(entry.rows for entry in batch)
            try:
                inputs = [entry.inputs for entry in batch]
                padded = self.rules.padded(rows)
                outputs, finite = await loop.run_in_executor(self._pool, _run_together, run, inputs, padded)
            except Exception as error:
                _fail(batch, error)
            else:
                seconds = time.perf_counter() - begin
                self._remember(rows, seconds)
                self._observer.executed(rows, padded, seconds)
                _answer(batch, outputs, finite, begin, seconds)

    async def _next_batch(self) -> list[_Waiting]:
        """Wait for requests and take those that run together; empty when closed and done."""
        while True:
            while not self._queue:
                if self._closing:
                    return []
                self._arrival.clear()
                await self._arrival.wait()
            if self._rows < self.rules.gather and self.rules.delay and not self._closing:
                await self._wait_for_company()
            if batch := list(self._taken()):
                return batch

    async def _wait_for_company(self) -> None:
        while self._queue and self._rows < self.rules.gather and not self._closing:
            left = self._queue[0].arrived + self.rules.delay - time.perf_counter()
            if left <= 0:
                return
            self._arrival.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._arrival.wait()

    def _taken(self) -> Iterator[_Waiting]:
        """Take requests from the front while they fit; the first one always does."""
        room = most = self.rules.together(self._rate)
        while self._queue and (room == most or self._queue[0].rows <= room):
            entry = self._queue.popleft()
            entry.queued = False
            self._count(-entry.rows)
            if not entry.future.done():
                room -= entry.rows
                yield entry

    def _remember(self, rows: int, seconds: float) -> None:
        rate = rows / max(seconds, 1e-9)
        self._rate = rate if not self._rate else _RATE_MEMORY * self._rate + (1 - _RATE_MEMORY) * rate


def _run_together(run: Run, inputs: Sequence[Arrays], padded: int) -> tuple[Arrays, Array]:
    """Stack the requests' rows, fill up to ``padded`` with the last row, run.

    Returns:
        The outputs, and which of the ``padded`` rows are finite in all of them.
    """
    names = inputs[0].keys()
    stacked = {}
    for name in names:
        parts = [arrays[name] for arrays in inputs]
        missing = padded - sum(len(part) for part in parts)
        parts += [parts[-1][-1:]] * missing
        stacked[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
    outputs = run(stacked)
    finite = [np.isfinite(array).reshape(padded, -1).all(axis=1) for array in outputs.values()]
    return outputs, np.logical_and.reduce(finite)


def _answer(batch: Sequence[_Waiting], outputs: Arrays, finite: Array, begin: float, seconds: float) -> None:
    """Give each request its own rows, copied: a view would keep everybody's alive."""
    first, rows, all_finite = 0, sum(entry.rows for entry in batch), bool(finite.all())
    for entry in batch:
        good = all_finite or bool(finite[first : first + entry.rows].all())
        copied = {name: array[first : first + entry.rows].copy() for name, array in outputs.items()}
        first += entry.rows
        if not entry.future.done():
            entry.future.set_result(RequestOutputs(copied, begin - entry.arrived, seconds, rows, good))


def _fail(batch: Sequence[_Waiting], error: Exception) -> None:
    message = error.message if isinstance(error, VitdeployError) else f"{type(error).__name__}: {error}"
    for entry in batch:
        if not entry.future.done():
            entry.future.set_exception(
                RequestError("internal", f"the run failed: {' '.join(message.split())}")
            )
