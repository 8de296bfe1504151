"""Timing like a referee: every cell in every round, in a new order each time, until the budget is spent.

What disturbs the machine disturbs all cells alike; a cell beside which something else was at work is
measured again, in the same company. Nothing here knows what a cell is: see ``run.py``.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from vitdeploy.benchmark.machine import NO_TIME, Moment

WARM_UP = 0.15
"""Share of the budget that goes into warming up, at most."""
RESERVE = 0.2
"""Share that is kept for measuring again what was disturbed."""
SETTLED = 0.03
"""Relative change of the median from one visit to the next, at which a cell is warm."""
MOST_WARM_VISITS = 12
MOST_ROUNDS = 200
LEAST_ROUNDS = 3
"""Even where the budget is spent: fewer say nothing about spread."""
SLICE = 0.05
"""Seconds that a visit takes at least, if ``MOST_SAMPLES`` are enough for that."""
SHARE = 0.25
"""Of the mean visit, what the visit of a shorter cell takes, if ``MOST_SAMPLES`` are enough for that."""
MOST_SAMPLES = 20


@dataclass(frozen=True)
class Visit:
    """What a cell did when its turn came."""

    samples: tuple[float, ...]
    """Seconds of each timed run, of every caller."""
    wall: float
    """Seconds from the first run's begin to the last one's end."""
    device: tuple[float, ...] = ()


class CellFailure(Exception):
    """A cell cannot go on; says why."""


class Probe(Protocol):
    """Runs what is timed."""

    def __call__(self, count: int, untimed: int) -> Visit:
        """Run ``untimed`` times for nothing, then ``count`` times.

        Raises:
            CellFailure: it cannot.
        """


class Counters(Protocol):
    """Reads the machine's counters."""

    def __call__(self) -> Moment: ...


@dataclass
class Take:
    """One measurement of a cell."""

    visits: list[Visit] = field(default_factory=list)
    around: Moment = NO_TIME
    """What the machine did while the cell ran."""

    @property
    def samples(self) -> list[float]:
        """Of all rounds, in the order of time."""
        return [sample for visit in self.visits for sample in visit.samples]

    @property
    def medians(self) -> list[float]:
        """Of each round."""
        return [statistics.median(visit.samples) for visit in self.visits]

    def spread(self) -> float:
        """Half the distance between the 10th and 90th percentile of the rounds' medians, over the median."""
        if not self.visits:
            return 0.0
        low, middle, high = np.percentile(self.medians, (10, 50, 90))
        return float((high - low) / 2 / middle)

    def disturbances(self, processors: int) -> list[str]:
        """Why the numbers are not to be trusted."""
        return self.around.disturbances(processors)


@dataclass
class Timing:
    """A cell while it is measured."""

    probe: Probe
    count: int = 1
    """Timed runs of a visit."""
    untimed: int = 0
    seconds: float = 0.0
    """Of a run, when it was warm."""
    take: Take = field(default_factory=Take)
    repeats: int = 0
    failure: str = ""


@dataclass
class Referee:
    """Measures cells within a budget.

    Args:
        budget: seconds for warming up, measuring and measuring again.
        seed: of the order within rounds.
        counters: of the machine; see ``machine.Watch``.
        processors: how many the cells share.
        report: hears what goes on: a phase and how much of the budget is spent (0 to 1).
        clock: seconds.
    """

    budget: float
    seed: int
    counters: Counters
    processors: int
    report: Callable[[str, float], None] = lambda phase, share: None
    clock: Callable[[], float] = time.perf_counter
    rounds: int = 0
    begin: float = field(init=False, default=0.0)

    def measure(self, cells: Sequence[Timing]) -> None:
        """Fill in the cells' takes; a cell that fails is left out from then on."""
        order = random.Random(self.seed)
        self.begin = self.clock()
        for number, cell in enumerate(cells, 1):
            self._tell(f"warm up {number} of {len(cells)}")
            self._try(self._warm_up, cell, WARM_UP * self.budget / len(cells))
        self._share_out(cells)
        self.rounds = self._rounds(cells, order, 1 - RESERVE, least=LEAST_ROUNDS)
        noisy = self._noisy(cells)
        earlier = [cell.take for cell in noisy]
        for cell in noisy:
            cell.take, cell.repeats = Take(), 1
        most = MOST_ROUNDS - (0 if noisy else self.rounds)
        try:
            self.rounds += self._rounds(cells, order, 1.0, most=most)
        finally:  # Ctrl-C loses no take that was whole
            for cell, before in zip(noisy, earlier, strict=True):
                fresh = not cell.failure and len(cell.take.visits) >= LEAST_ROUNDS
                cell.take = min(cell.take, before, key=self._trouble) if fresh else before

    def _noisy(self, cells: Sequence[Timing]) -> list[Timing]:
        """The disturbed cells, if the rest of the budget is enough to measure them anew."""
        alive = [cell for cell in cells if cell.take.visits and not cell.failure]
        once = sum(statistics.median(visit.wall for visit in cell.take.visits) for cell in alive)
        if (1 - self._spent()) * self.budget < LEAST_ROUNDS * once:
            return []
        return [cell for cell in alive if cell.take.disturbances(self.processors)]

    def _warm_up(self, cell: Timing, limit: float) -> None:
        """Run until the median stays where it is; find out how many runs make a visit."""
        until = self.clock() + limit
        before = statistics.median(cell.probe(1, 0).samples)
        for visit in range(MOST_WARM_VISITS):
            cell.count = max(1, min(MOST_SAMPLES, round(SLICE / max(before, 1e-9))))
            # After other models ran, the first run finds cold caches; a long one hardly notices.
            cell.untimed = 1 if cell.count > 1 else 0
            now = statistics.median(cell.probe(cell.count, 0).samples)
            settled = abs(now - before) <= SETTLED * before
            before = now
            if (settled and visit) or self.clock() > until:
                break
        cell.seconds = before

    def _share_out(self, cells: Sequence[Timing]) -> None:
        """Let short cells run more often beside long ones: it costs little, and a round says more of them."""
        warm = [cell for cell in cells if cell.seconds and not cell.failure]
        if not warm:
            return
        visit = SHARE * statistics.mean(cell.count * cell.seconds for cell in warm)
        for cell in warm:
            cell.count = max(cell.count, min(MOST_SAMPLES, round(visit / cell.seconds)))

    def _rounds(
        self,
        cells: Sequence[Timing],
        order: random.Random,
        share: float,
        *,
        least: int = 0,
        most: int = MOST_ROUNDS,
    ) -> int:
        """Whole rounds until this share of the budget is spent; returns how many."""
        done = 0
        while done < most and (done < least or self._spent() < share):
            turn = [cell for cell in cells if not cell.failure]
            if not turn:
                break
            self._tell(f"round {done + 1} of {len(turn)} cells")
            order.shuffle(turn)
            for cell in turn:
                self._try(self._visit, cell)
            done += 1
        return done

    def _visit(self, cell: Timing) -> None:
        before = self.counters()
        visit = cell.probe(cell.count, cell.untimed)
        cell.take.around += self.counters() - before
        cell.take.visits.append(visit)

    def _trouble(self, take: Take) -> tuple[int, float]:
        return len(take.disturbances(self.processors)), take.spread()

    def _try(self, act: Callable[..., None], cell: Timing, *arguments: float) -> None:
        try:
            act(cell, *arguments)
        except CellFailure as error:
            cell.failure = str(error)

    def _spent(self) -> float:
        return (self.clock() - self.begin) / self.budget

    def _tell(self, what: str) -> None:
        self.report(what, min(1.0, self._spent()))
