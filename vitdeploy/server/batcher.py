"""Dynamic batching: what waits while the session is busy runs together when it is free.

The earliest deadline goes first; among equal ones, and so wherever no request names its own, the first to
come. Nothing is kept waiting for a run that cannot begin in time: a new request is refused at once, and one
that others overtook is given up, as soon as that is certain: when it follows from the runs made so far.

Everything but the run itself happens on the event loop, so nothing here needs a lock. A request that is
cancelled leaves the queue at once; one that is running is only forgotten.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import heapq
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from vitdeploy.errors import VitdeployError
from vitdeploy.server.messages import Array, RequestError
from vitdeploy.server.pace import Pace

Arrays = Mapping[str, Array]
Run = Callable[[Arrays], Arrays]
"""Runs a session: (n, ...) arrays by name to (n, ...) arrays by name; blocks."""

_TIMER = 0.001
"""Seconds that the event loop's timers are exact to."""
_ROUNDING = 1e-6
"""Seconds that sums of times may be off by."""
_TURNS = 2
"""Of the event loop: in the first what has come is read, in the second it becomes a request that waits."""


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
    """Seconds within which a request begins to run, or is given up; it may ask for less."""
    buckets: tuple[int, ...] = ()
    """Batch sizes that the session is run at: a smaller batch is filled up to the next; empty is any."""

    def together(self, rate: float) -> int:
        """Rows that are run together at most, by a session that does so many per second when it is alone.

        Of a short run, what it costs to begin and to end is a good part; a long one has the next wait. That
        other work makes runs longer is no reason for smaller ones, which cost more of what is scarce.
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


class RequestOutputs(NamedTuple):
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


@dataclass(eq=False, slots=True)
class _Waiting:
    inputs: Arrays
    rows: int
    future: asyncio.Future[RequestOutputs]
    arrived: float
    limit: float
    """Seconds within which its run has to begin."""
    deadline: float
    queued: bool = True

    def refuse(self, error: RequestError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Batcher:
    """Runs the requests of many clients on a few sessions of one model.

    Create it on the event loop; ``close`` it when it is done.

    Args:
        runs: one callable per session; each is called from one thread at a time.
    """

    def __init__(self, runs: Sequence[Run], rules: BatchingRules, observer: Observer) -> None:
        self.rules = rules
        self._observer = observer
        self._queue: list[_Waiting] = []
        """By deadline, and by arrival where that is the same."""
        self._rows = 0
        self._arrivals = 0
        self._arrival = asyncio.Event()
        self._closing = False
        self._pace = Pace()
        self._free_at = [0.0] * len(runs)
        """When each session's run will end, at the earliest; 0 where it has none."""
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = 0.0
        self._pool = ThreadPoolExecutor(len(runs), thread_name_prefix="session")
        self._workers = [asyncio.create_task(self._work(*session)) for session in enumerate(runs)]

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
            RequestError: too many rows; the queue is full, or too long for the run to begin in time; the time
                is over; or the run failed.
        """
        rows = len(next(iter(inputs.values())))
        if rows > self.rules.max_rows:
            raise RequestError("invalid", f"a batch of {rows}, but at most {self.rules.max_rows} are served")
        if self._closing:
            raise RequestError("unavailable", "the model is being unloaded", retry_after=1.0)
        if self._rows + rows > self.rules.max_queue:
            raise RequestError("overloaded", "Exceeds maximum queue size", retry_after=self.busy_for())
        limit = self.rules.timeout if timeout is None else min(timeout, self.rules.timeout)
        now = time.perf_counter()
        future: asyncio.Future[RequestOutputs] = asyncio.get_running_loop().create_future()
        entry = _Waiting(inputs, rows, future, now, limit, now + limit)
        self._join(entry)
        try:
            self._review(now, entry)
            return await future
        finally:
            self._leave(entry)

    def busy_for(self) -> float:
        """Seconds that what waits now will take, from the pace of late; 1 where that is not known."""
        rate = self._pace.rate
        return self._rows / (len(self._workers) * rate) if rate else 1.0

    def abandon(self) -> None:
        """Refuse what waits; what runs goes on."""
        for entry in self._queue:
            entry.refuse(RequestError("unavailable", "the server is shutting down", retry_after=1.0))

    async def close(self) -> None:
        """Refuse what is new, finish what was accepted, stop."""
        self._closing = True
        self._arrival.set()
        await asyncio.gather(*self._workers)
        if self._alarm is not None:
            self._alarm.cancel()
        await asyncio.to_thread(self._pool.shutdown)

    def _count(self, rows: int) -> None:
        self._rows += rows
        self._observer.queued(self._rows)

    def _join(self, entry: _Waiting) -> None:
        if not self._queue or self._queue[-1].deadline <= entry.deadline:
            self._queue.append(entry)
        else:
            bisect.insort_right(self._queue, entry, key=lambda other: other.deadline)
        self._arrivals += 1
        self._count(entry.rows)
        self._set_alarm()
        self._arrival.set()

    def _leave(self, entry: _Waiting) -> None:
        """What runs or was given up does not keep its place in the queue."""
        if entry.queued:
            entry.queued = False
            self._queue.remove(entry)
            self._count(-entry.rows)

    def _set_alarm(self) -> None:
        """Have the first deadline kept: those behind it are later, so one timer is enough for all."""
        first = self._queue[0].deadline
        if self._alarm is not None:
            if self._alarm_at <= first:
                return
            self._alarm.cancel()
        seconds = max(_TIMER, first - time.perf_counter())
        self._alarm, self._alarm_at = asyncio.get_running_loop().call_later(seconds, self._expire), first

    def _expire(self) -> None:
        """Give up what did not begin in time."""
        self._alarm = None
        now = time.perf_counter() + _ROUNDING
        while self._queue and (entry := self._queue[0]).deadline <= now:
            self._leave(entry)
            entry.refuse(_was_late(entry))
        if self._queue:
            self._set_alarm()

    def _review(self, now: float, new: _Waiting | None = None) -> None:
        """Give up what cannot begin in time any more.

        Raises:
            RequestError: that is true of the new request.
        """
        if not self._queue:
            return
        # Each row alone, in as long a run as any: at the latest, everything has begun then.
        if self._queue[0].deadline >= now + (self._rows + 1) * self._pace.longest:
            return
        refusal = None
        for entry, begin in self._late(now):
            message = f"no session will be free within {entry.limit:g} s"
            if entry is new:
                refusal = RequestError("overloaded", message, retry_after=begin - entry.deadline)
            else:
                self._leave(entry)
                entry.refuse(RequestError("timeout", message))
        if refusal is not None:
            raise refusal

    def _late(self, now: float) -> list[tuple[_Waiting, float]]:
        """What cannot begin in time, and when it would begin at the earliest, as the queue is now."""
        most, rows = self.rules.together(self._pace.best_rate), 0
        free = [max(now, end) for end in self._free_at]
        heapq.heapify(free)
        late = []
        for entry in self._queue:
            if entry.future.done():
                continue  # cancelled: it leaves as soon as its task goes on
            if rows and rows + entry.rows > most:
                heapq.heapreplace(free, free[0] + self._pace.least(self.rules.padded(rows)))
                rows = 0
            if entry.deadline < free[0]:
                late.append((entry, free[0]))
            else:
                rows += entry.rows
        return late

    async def _work(self, number: int, run: Run) -> None:
        """One session's life."""
        loop = asyncio.get_running_loop()
        while batch := await self._next_batch():
            begin = time.perf_counter()
            rows = sum(entry.rows for entry in batch)
            padded = self.rules.padded(rows)
            self._free_at[number] = begin + self._pace.least(padded)
            self._review(begin)
            try:
                inputs = [entry.inputs for entry in batch]
                outputs, finite = await loop.run_in_executor(self._pool, _run_together, run, inputs, padded)
            except Exception as error:
                _fail(batch, error)
            else:
                seconds = time.perf_counter() - begin
                self._pace.learn(rows, padded, seconds)
                self._observer.executed(rows, padded, seconds)
                _answer(batch, outputs, finite, begin, seconds)
            self._free_at[number] = 0.0

    async def _next_batch(self) -> list[_Waiting]:
        """Wait for requests and take those that run together; empty when closed and done."""
        while True:
            while not self._queue:
                if self._closing:
                    return []
                self._arrival.clear()
                await self._arrival.wait()
            await self._let_come()
            if self._rows < self.rules.gather and self.rules.delay and not self._closing:
                await self._wait_for_company()
            if batch := list(self._taken(time.perf_counter())):
                return batch

    async def _let_come(self) -> None:
        """Have the event loop hand over what is there already, until that is a full batch.

        A loop that is behind would have little for each run, and many small runs keep it behind.
        """
        most, before = self.rules.together(self._pace.best_rate), 0
        while before < self._arrivals and self._rows < most:
            before = self._arrivals
            for _ in range(_TURNS):
                await asyncio.sleep(0)

    async def _wait_for_company(self) -> None:
        while self._queue and self._rows < self.rules.gather and not self._closing:
            until = min(entry.arrived for entry in self._queue) + self.rules.delay
            left = min(until, self._queue[0].deadline - 2 * _TIMER) - time.perf_counter()
            if left <= 0:
                return
            self._arrival.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._arrival.wait()

    def _taken(self, now: float) -> Iterator[_Waiting]:
        """Take requests from the front while they fit; the first one always does."""
        room = most = self.rules.together(self._pace.best_rate)
        while self._queue and (room == most or self._queue[0].rows <= room):
            entry = self._queue[0]
            self._leave(entry)
            if entry.deadline < now:
                entry.refuse(_was_late(entry))
            elif not entry.future.done():
                room -= entry.rows
                yield entry


def _was_late(entry: _Waiting) -> RequestError:
    return RequestError("timeout", f"no session was free within {entry.limit:g} s")


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
        entry.refuse(RequestError("internal", f"the run failed: {' '.join(message.split())}"))
