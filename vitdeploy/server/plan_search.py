"""The search for a serving plan: sessions, threads of each and images run together, as measured.

No rule serves every model: one session with all threads is best for some models and runtimes, one for each
processor for others, and batches gain much, nothing, or less than nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np

from vitdeploy.backends.base import Array, Session
from vitdeploy.errors import BundleError
from vitdeploy.machine.processors import Share

LEVEL: Final = 1.02
"""Plans are level while the best serves no more than so many times as much: then latency decides."""
_FAR: Final = 1.25
"""A plan that at a first look is behind the best one by so much goes no further."""
_HOPELESS: Final = 1.5
"""Once a batch size is behind a smaller one by so much, larger ones are not looked at."""
_LOOK: Final = 0.75
"""Share of the time for opening sessions and a first look at each plan."""
_ROUNDS: Final = 5
"""That a plan is measured in at most, the first look among them."""
_NARROWER: Final = 0.65
"""How much less a plan may be behind after each further round."""
_FINALISTS: Final = 8
_SHARES: Final = 2
"""Whose sessions stay open at the same time, besides those that are looked at."""
_SLICE: Final = 0.05
"""Seconds that a plan takes of a round at least, if ``_RUNS`` are enough for that."""
_RUNS: Final = 200

Probe = Callable[[Sequence[Session], int, int], list[tuple[float, ...]]]
"""``probe(sessions, batch, count)``: the seconds of each of ``count`` runs, for each session, all at work."""


class Sizes(NamedTuple):
    """Batch sizes that may be run together."""

    usual: tuple[int, ...]
    """Ascending; at least one."""
    larger: tuple[int, ...] = ()
    """Those beyond, ascending, which are looked at while they gain."""


@dataclass
class Cell:
    """A plan while it is measured."""

    share: Share
    batch: int
    count: int
    """Runs of each session in a round."""
    rates: list[float] = field(default_factory=list)
    """Images per second in each round."""
    seconds: list[float] = field(default_factory=list)
    """Of every run."""

    @property
    def rate(self) -> float:
        """Images per second."""
        return float(np.median(self.rates))

    @property
    def p50(self) -> float:
        """Seconds of a run."""
        return float(np.median(self.seconds))

    @property
    def p99(self) -> float:
        """Seconds of a run."""
        return float(np.percentile(self.seconds, 99))

    def add(self, runs: Sequence[Sequence[float]]) -> None:
        """A round, as a probe gives it. A session that is done before others counts for its own time."""
        self.rates.append(sum(len(own) * self.batch / max(sum(own), 1e-9) for own in runs))
        self.seconds += [seconds for own in runs for seconds in own]


@dataclass
class Search:
    """Finds the plan that serves the most images per second within a latency.

    Plans are held against one another in rounds, so that what disturbs the machine disturbs all alike; those
    that are far behind are left out, and their sessions closed, as soon as that shows.

    Args:
        open_share: opens the sessions of a share, which takes time; raises BundleError where they do not run.
        sizes_of: the batch sizes of an open session.
        probe: measures; raises BundleError where a run fails.
        seconds: for all of it. What has begun is finished; the first share is opened and looked at whatever
            it takes.
        max_latency: seconds that the 99th percentile of a run may take; None is any.
        clock: seconds.
    """

    open_share: Callable[[Share], Sequence[Session]]
    sizes_of: Callable[[Session], Sizes]
    probe: Probe
    seconds: float
    max_latency: float | None = None
    clock: Callable[[], float] = time.perf_counter
    cells: list[Cell] = field(default_factory=list)
    """That are still in the running."""
    _open: dict[Share, Sequence[Session]] = field(default_factory=dict)

    def run(self, shares: Sequence[Share]) -> tuple[Cell, Sequence[Session]]:
        """The best plan, and its sessions, open; all others are closed.

        Where no plan keeps the latency, the one that comes nearest to it.

        Raises:
            BundleError: nothing could be run; the first reason.
        """
        begin = self.clock()
        try:
            self._look(_from_the_ends(shares), begin)
            self._compare(begin + self.seconds)
            best = self._best()
            self._close(keep={best.share})
        except BaseException:
            self._close()
            raise
        return best, self._open[best.share]

    def holds(self, cell: Cell) -> bool:
        """Whether a plan keeps the latency."""
        return self.max_latency is None or cell.p99 <= self.max_latency

    def _look(self, shares: Sequence[Share], begin: float) -> None:
        """Measure every plan once, as far as there is time."""
        failure: BundleError | None = None
        opening = 0.0
        for number, share in enumerate(shares):
            now, end = self.clock(), begin + _LOOK * self.seconds
            if self.cells and now + opening >= end:
                break
            try:
                self._open[share] = self.open_share(share)
                opening = self.clock() - now
                for cell in self._first_looks(share, now + (end - now) / (len(shares) - number)):
                    self.cells.append(cell)
            except BundleError as error:  # so many sessions, or images, may be too much; others are not
                failure = failure or error
            if self.cells:
                self._drop(_FAR)
        if not self.cells:
            assert failure is not None  # what is opened is looked at
            raise failure

    def _first_looks(self, share: Share, until: float) -> Iterator[Cell]:
        """The batch sizes of a share, smallest first, while there is time for them and they are of use."""
        sizes = self.sizes_of(self._open[share][0])
        best = 0.0
        last: Cell | None = None
        cost = 0.0
        for batch in (*sizes.usual, *sizes.larger):
            begin = self.clock()
            if last is not None and begin + cost * batch / last.batch > until:
                return
            self.probe(self._open[share], batch, 1)  # the first run of a batch size makes it ready, too
            runs = self.probe(self._open[share], batch, 1)
            count = max(1, min(_RUNS, round(_SLICE / max(*runs[0], 1e-9))))
            cell = Cell(share, batch, count)
            cell.add(runs if count == 1 else self.probe(self._open[share], batch, count))
            yield cell
            cost = self.clock() - begin
            if cell.rate * _HOPELESS < best or not self.holds(cell):
                return
            if last is not None and batch in sizes.larger and cell.rate < LEVEL * last.rate:
                return
            best, last = max(best, cell.rate), cell

    def _compare(self, end: float) -> None:
        """Measure what is left in rounds, until one is left or the time is over."""
        self.cells = self._near(_FAR)[:_FINALISTS]
        margin = _FAR
        for _ in range(_ROUNDS - 1):
            for cell in self.cells:
                if self.clock() + cell.count * cell.p50 > end:
                    return
                cell.add(self.probe(self._open[cell.share], cell.batch, cell.count))
            margin = max(1 + _NARROWER * (margin - 1), 2 * LEVEL - 1)
            self._drop(margin)
            if len(self.cells) == 1:
                return

    def _near(self, margin: float) -> list[Cell]:
        """The plans that the best one does not leave that far behind, the best first; where none keeps the
        latency, by that."""
        held = [cell for cell in self.cells if self.holds(cell)]
        costs = [(1 / cell.rate, cell) for cell in held] or [(cell.p99, cell) for cell in self.cells]
        costs.sort(key=lambda pair: pair[0])
        return [cell for cost, cell in costs if cost <= margin * costs[0][0]]

    def _drop(self, margin: float) -> None:
        """Leave out what is far behind, and close what nothing in the running needs any more."""
        near = self._near(margin)
        keep = set(list(dict.fromkeys(cell.share for cell in near))[:_SHARES])
        self.cells = [cell for cell in near if cell.share in keep]
        self._close(keep)

    def _best(self) -> Cell:
        near = self._near(LEVEL)
        return min(near, key=lambda cell: (cell.p50, cell.batch)) if self.holds(near[0]) else near[0]

    def _close(self, keep: set[Share] | None = None) -> None:
        for share in [share for share in self._open if share not in (keep or ())]:
            for session in self._open.pop(share):
                session.close()


def _from_the_ends(shares: Sequence[Share]) -> list[Share]:
    """Most sessions first, then fewest, then what lies between: time may not be enough for all."""
    order = sorted(shares, key=lambda share: share.sessions)
    return [*order[-1:], *order[: len(order) - 1]]


def batch_sizes(least: int, usual: int, most: int) -> Sizes:
    """Powers of two between the least batch and the usual one, both of them, and doubled up to the most."""
    sizes = {least, usual, *(size for n in range(usual.bit_length()) if least < (size := 1 << n) < usual)}
    larger = []
    size = 2 * usual
    while size < 2 * most:
        larger.append(min(size, most))
        size *= 2
    return Sizes(tuple(sorted(sizes)), tuple(size for size in larger if size > usual))


class SideBySide:
    """Measures sessions that run at the same time, each called by a thread of its own.

    Args:
        pixels: inputs (K, ...), which fill batches by going round.
    """

    def __init__(self, pixels: Array) -> None:
        self._pixels = pixels

    def __call__(self, sessions: Sequence[Session], batch: int, count: int) -> list[tuple[float, ...]]:
        """The seconds of each of ``count`` runs, for each session."""
        inputs = {sessions[0].facts.inputs[0].name: self._pixels[np.arange(batch) % len(self._pixels)]}
        ready = threading.Barrier(len(sessions))

        def call(session: Session) -> tuple[float, ...]:
            ready.wait()
            times = [time.perf_counter()]
            for _ in range(count):
                session.run(inputs)
                times.append(time.perf_counter())
            return tuple(float(seconds) for seconds in np.diff(times))

        with ThreadPoolExecutor(len(sessions)) as pool:
            return list(pool.map(call, sessions))
