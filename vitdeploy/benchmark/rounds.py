"""Interleaved rounds: every cell in every round, in a new order each time, until the budget is spent.

What disturbs the machine disturbs all cells alike; a cell beside which something else was at work is
measured again, in the same company. Nothing here knows what a cell is: see ``run.py``.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vitdeploy.benchmark.disturbances import ZERO, Counters

WARM_UP = 0.15
"""Share of the budget that goes into warming up, at most."""
RESERVE = 0.2
"""Share that is kept for measuring again what was disturbed."""
SETTLED = 0.03
"""Relative change of the median from one warm-up to the next, at which a cell is warm."""
MOST_WARM_UPS = 12
MOST_ROUNDS = 200
LEAST_ROUNDS = 3
"""Even where the budget is spent: fewer say nothing about spread."""
SLICE = 0.05
"""Seconds that a cell takes of a round at least, if ``MOST_SAMPLES`` are enough for that."""
SHARE = 0.25
"""Of the mean seconds of a cell in a round, what a shorter cell takes, if ``MOST_SAMPLES`` are enough."""
MOST_SAMPLES = 20


@dataclass(frozen=True)
class RoundSamples:
    """What a cell did in one round."""

    samples: tuple[float, ...]
    """Seconds of each timed run, of every caller."""
    wall: float
    """Seconds from the first run's begin to the last one's end."""
    device: tuple[float, ...] = ()


class CellFailure(Exception):
    """A cell cannot go on; says why."""


Probe = Callable[[int, int], RoundSamples]
"""``probe(count, untimed)`` runs a cell ``untimed`` times for nothing, then ``count`` times.

Raises CellFailure where it cannot."""


@dataclass
class Measurement:
    """A cell, measured once."""

    rounds: list[RoundSamples] = field(default_factory=list)
    counters: Counters = ZERO
    """What the machine did while the cell ran."""

    @property
    def samples(self) -> list[float]:
        """Of all rounds, in the order of time."""
        return [sample for one in self.rounds for sample in one.samples]

    @property
    def medians(self) -> list[float]:
        """Of each round."""
        return [statistics.median(one.samples) for one in self.rounds]

    def spread(self) -> float:
        """Half the distance between the 10th and 90th percentile of the rounds' medians, over the median."""
        if not self.rounds:
            return 0.0
        low, middle, high = np.percentile(self.medians, (10, 50, 90))
        return float((high - low) / 2 / middle)

    def disturbances(self, processors: int) -> list[str]:
        """Why the numbers are not to be trusted."""
        return self.counters.disturbances(processors)


@dataclass
class Timing:
    """A cell while it is measured."""

    probe: Probe
    count: int = 1
    """Timed runs in a round."""
    untimed: int = 0
    seconds: float = 0.0
    """Of a run, when it was warm."""
    measurement: Measurement = field(default_factory=Measurement)
    repeats: int = 0
    failure: str = ""


@dataclass
class Runner:
    """Runs cells in rounds, within a budget.

    Args:
        budget: seconds for warming up, measuring and measuring again.
        seed: of the order within rounds.
        counters: reads the machine's; see ``disturbances.CounterReader``.
        processors: how many the cells share.
        report: hears what goes on: a phase and how much of the budget is spent (0 to 1).
        clock: seconds.
    """

    budget: float
    seed: int
    counters: Callable[[], Counters]
    processors: int
    report: Callable[[str, float], None] = lambda phase, share: None
    clock: Callable[[], float] = time.perf_counter
    rounds: int = 0
    begin: float = field(init=False, default=0.0)

    def measure(self, cells: Sequence[Timing]) -> None:
        """Fill in the cells' measurements; a cell that fails is left out from then on."""
        order = random.Random(self.seed)
        self.begin = self.clock()
        for number, cell in enumerate(cells, 1):
            self._tell(f"warm up {number} of {len(cells)}")
            self._try(self._warm_up, cell, WARM_UP * self.budget / len(cells))
        self._share_out(cells)
        self.rounds = self._rounds(cells, order, 1 - RESERVE, least=LEAST_ROUNDS)
        noisy = self._noisy(cells)
        earlier = [cell.measurement for cell in noisy]
        for cell in noisy:
            cell.measurement, cell.repeats = Measurement(), 1
        most = MOST_ROUNDS - (0 if noisy else self.rounds)
        try:
            self.rounds += self._rounds(cells, order, 1.0, most=most)
        finally:  # Ctrl-C loses no measurement that was whole
            for cell, before in zip(noisy, earlier, strict=True):
                fresh = not cell.failure and len(cell.measurement.rounds) >= LEAST_ROUNDS
                cell.measurement = min(cell.measurement, before, key=self._trouble) if fresh else before

    def _noisy(self, cells: Sequence[Timing]) -> list[Timing]:
        """The disturbed cells, if the rest of the budget is enough to measure them anew."""
        alive = [cell for cell in cells if cell.measurement.rounds and not cell.failure]
        once = sum(statistics.median(one.wall for one in cell.measurement.rounds) for cell in alive)
        if (1 - self._spent()) * self.budget < LEAST_ROUNDS * once:
            return []
        return [cell for cell in alive if cell.measurement.disturbances(self.processors)]

    def _warm_up(self, cell: Timing, limit: float) -> None:
        """Run until the median stays where it is; find out how many runs it takes in a round."""
        until = self.clock() + limit
        before = statistics.median(cell.probe(1, 0).samples)
        for number in range(MOST_WARM_UPS):
            cell.count = max(1, min(MOST_SAMPLES, round(SLICE / max(before, 1e-9))))
            # After other models ran, the first run finds cold caches; a long one hardly notices.
            cell.untimed = 1 if cell.count > 1 else 0
            now = statistics.median(cell.probe(cell.count, 0).samples)
            settled = abs(now - before) <= SETTLED * before
            before = now
            if (settled and number) or self.clock() > until:
                break
        cell.seconds = before

    def _share_out(self, cells: Sequence[Timing]) -> None:
        """Let short cells run more often beside long ones: it costs little, and a round says more of them."""
        warm = [cell for cell in cells if cell.seconds and not cell.failure]
        if not warm:
            return
        share = SHARE * statistics.mean(cell.count * cell.seconds for cell in warm)
        for cell in warm:
            cell.count = max(cell.count, min(MOST_SAMPLES, round(share / cell.seconds)))

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
            running = [cell for cell in cells if not cell.failure]
            if not running:
                break
            self._tell(f"round {done + 1} of {len(running)} cells")
            order.shuffle(running)
            for cell in running:
                self._try(self._sample, cell)
            done += 1
        return done

    def _sample(self, cell: Timing) -> None:
        before = self.counters()
        samples = cell.probe(cell.count, cell.untimed)
        cell.measurement.counters += self.counters() - before
        cell.measurement.rounds.append(samples)

    def _trouble(self, found: Measurement) -> tuple[int, float]:
        return len(found.disturbances(self.processors)), found.spread()

    def _try(self, act: Callable[..., None], cell: Timing, *arguments: float) -> None:
        try:
            act(cell, *arguments)
        except CellFailure as error:
            cell.failure = str(error)

    def _spent(self) -> float:
        return (self.clock() - self.begin) / self.budget

    def _tell(self, what: str) -> None:
        self.report(what, min(1.0, self._spent()))
