"""The runner, with a clock and cells of the test's own making."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from vitdeploy.benchmark.disturbances import ZERO, Counters
from vitdeploy.benchmark.rounds import (
    LEAST_ROUNDS,
    MOST_ROUNDS,
    MOST_SAMPLES,
    CellFailure,
    RoundSamples,
    Runner,
    Timing,
)


class World:
    """Time that passes only where something runs, and who ran when."""

    def __init__(self) -> None:
        self.time = 0.0
        self.log: list[str] = []
        self.stolen = 0.0

    def counters(self) -> Counters:
        return Counters(self.time, self.time, self.stolen, self.time, 0)

    def cell(self, name: str, seconds: Callable[[int], float]) -> Timing:
        """A cell whose ``n``-th run takes ``seconds(n)``."""
        runs = 0

        def probe(count: int, untimed: int) -> RoundSamples:
            nonlocal runs
            self.log.append(name)
            samples = []
            for number in range(untimed + count):
                runs += 1
                took = seconds(runs)
                self.time += took
                samples += [took] if number >= untimed else []
            return RoundSamples(tuple(samples), sum(samples))

        return Timing(probe)

    def measure(self, cells: list[Timing], budget: float = 60.0, seed: int = 0) -> Runner:
        runner = Runner(budget, seed, self.counters, 2, clock=lambda: self.time)
        runner.measure(cells)
        return runner


def test_rounds_hold_every_cell_once_in_changing_order() -> None:
    world = World()
    cells = [world.cell(name, lambda _: 0.1) for name in "abcd"]
    runner = world.measure(cells)
    turns = world.log[-4 * runner.rounds :]
    rounds = [tuple(turns[i : i + 4]) for i in range(0, len(turns), 4)]
    assert all(sorted(turn) == list("abcd") for turn in rounds)
    assert len(set(rounds)) > 5
    assert all(len(cell.measurement.rounds) == runner.rounds for cell in cells)
    again = World()
    again.measure([again.cell(name, lambda _: 0.1) for name in "abcd"])
    assert again.log == world.log, "the seed decides the order"


def test_the_budget_is_kept() -> None:
    world = World()
    world.measure([world.cell(name, lambda _: 0.5) for name in "abc"], budget=60)
    assert 55 < world.time < 65
    slow = World()
    runner = slow.measure([slow.cell("a", lambda _: 50.0)], budget=60)
    assert runner.rounds == LEAST_ROUNDS, "fewer say nothing about spread"
    fast = World()
    assert fast.measure([fast.cell("a", lambda _: 1e-4)], budget=600).rounds == MOST_ROUNDS


def test_warming_up_goes_on_until_the_median_stays() -> None:
    world = World()
    slow_start = world.cell("a", lambda run: 0.1 * (1 + 0.7**run))
    world.measure([slow_start])
    assert slow_start.measurement.rounds[0].samples[0] < 0.106
    never = World()
    never.measure([never.cell("a", lambda run: 1.0 + run)], budget=1000)
    assert never.log, "a cell that never settles is bounded"


@pytest.mark.parametrize("seconds, count, untimed", [(1e-4, MOST_SAMPLES, 1), (0.01, 5, 1), (0.4, 1, 0)])
def test_a_visit_is_long_enough(seconds: float, count: int, untimed: int) -> None:
    world = World()
    cell = world.cell("a", lambda _: seconds)
    world.measure([cell], budget=10)
    assert (cell.count, cell.untimed) == (count, untimed)
    assert {len(one.samples) for one in cell.measurement.rounds} == {count}


def test_short_cells_run_more_often_beside_long_ones() -> None:
    world = World()
    short, long = world.cell("a", lambda _: 0.1), world.cell("b", lambda _: 6.0)
    world.measure([short, long], budget=200)
    assert (short.count, long.count) == (8, 1)


def test_a_cell_that_fails_is_left_out() -> None:
    world = World()

    def dies(run: int) -> float:
        if run > 30:
            raise CellFailure("gone")
        return 0.1

    dead, alive = world.cell("a", dies), world.cell("b", lambda _: 0.1)
    runner = world.measure([dead, alive])
    assert dead.failure == "gone"
    assert len(alive.measurement.rounds) == runner.rounds > 100


def test_a_disturbed_cell_is_measured_again_and_the_calmer_take_kept() -> None:
    world = World()

    def robbed(run: int) -> float:
        """Disturbed for the first part of the measurement."""
        world.stolen += 0.02 if run < 150 else 0.0
        return 0.15 if run < 150 else 0.1

    first, second = world.cell("a", robbed), world.cell("b", lambda _: 0.1)
    world.measure([first, second])
    assert (first.repeats, second.repeats) == (1, 0)
    assert len(second.measurement.rounds) > len(first.measurement.rounds), "the calm one keeps all its rounds"
    assert not first.measurement.disturbances(2)
    assert first.measurement.spread() < 0.01


@pytest.mark.parametrize("budget, repeats", [(60, 0), (600, 1)])
def test_measuring_again_keeps_the_budget(budget: float, repeats: int) -> None:
    world = World()

    def robbed(_: int) -> float:
        world.stolen += 1.0
        return 3.5

    cells = [world.cell(name, robbed) for name in "abcdef"]
    runner = world.measure(cells, budget=budget)
    assert runner.rounds >= LEAST_ROUNDS
    assert {cell.repeats for cell in cells} == {repeats}, "only where whole rounds are affordable"
    assert world.time < budget + (3 + LEAST_ROUNDS) * 6 * 4


def test_ctrl_c_while_measuring_again_loses_nothing() -> None:
    world, cells = World(), list[Timing]()

    def robbed(_: int) -> float:
        if cells[0].repeats and len(cells[0].measurement.rounds) == LEAST_ROUNDS - 1:
            raise KeyboardInterrupt
        world.stolen += 0.02
        return 0.1

    cells.append(world.cell("a", robbed))
    with pytest.raises(KeyboardInterrupt):
        world.measure(cells, budget=60)
    assert cells[0].repeats == 1
    assert len(cells[0].measurement.rounds) > 100, "the first take is kept"


def test_a_cell_that_stays_disturbed_says_so() -> None:
    world = World()
    random = np.random.default_rng(0)

    def robbed(_: int) -> float:
        world.stolen += 0.02
        return float(0.1 * (1 + random.random()))

    cell = world.cell("a", robbed)
    world.measure([cell])
    assert cell.repeats == 1
    assert "the hypervisor took" in cell.measurement.disturbances(2)[0]


def test_an_unsteady_cell_keeps_all_its_rounds() -> None:
    world = World()
    random = np.random.default_rng(0)
    cell = world.cell("a", lambda _: float(0.1 * (1 + 2 * random.random())))
    runner = world.measure([cell])
    assert cell.repeats == 0
    assert cell.measurement.disturbances(2) == []
    assert cell.measurement.spread() > 0.2
    assert len(cell.measurement.rounds) == runner.rounds


def test_steal_time_is_a_disturbance() -> None:
    world = World()

    def robbed(_: int) -> float:
        world.stolen += 0.02
        return 0.1

    cell = world.cell("a", robbed)
    world.measure([cell])
    assert cell.measurement.disturbances(2) == ["the hypervisor took 10% of the processors"]
    assert Timing(cell.probe).measurement.disturbances(2) == []
    assert ZERO.disturbances(2) == []


def test_no_cells() -> None:
    assert World().measure([]).rounds == 0
