"""Slow-downs that are injected through a clock are found, noise is not, and nothing else is compared."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.sample_results import cell, failed_parity, sample_results
from vitdeploy.benchmark.compare import compare_results, ratio_of, round_medians
from vitdeploy.benchmark.disturbances import ZERO
from vitdeploy.benchmark.results import Cell, ControlSamples, Results
from vitdeploy.benchmark.rounds import RoundSamples, Runner, Timing
from vitdeploy.benchmark.views import comparison_markdown

BACKENDS = ("alpha", "beta", "gamma", "delta")
BATCHES = (1, 2, 4, 8, 16)
BASE_MS = 4.0


@functools.cache
def run(seed: int, slow: str = "", factor: float = 1.0, drift: float = 0.01, machine: float = 1.0) -> Results:
    """Twenty cells through the real runner, on a clock that a random machine drives.

    Every call varies by some per cent, now and then one takes twice as long, the machine's speed wanders
    within a run, and each run has a speed of its own. ``machine`` is how slow it is on that day.
    """
    random, time = np.random.default_rng(seed), [0.0]
    own, wander = machine * (1 + drift * random.normal()), [0.0]

    def cell_of(base: float) -> Timing:
        def probe(count: int, untimed: int) -> RoundSamples:
            wander[0] = 0.98 * wander[0] + 0.003 * random.normal()
            times = base * own * (1 + wander[0]) * (1 + 0.03 * random.gamma(2.0, 0.5, count))
            times *= np.where(random.random(count) < 0.02, 2.0, 1.0)
            time[0] += float(times.sum()) + untimed * base
            return RoundSamples(tuple(times), float(times.sum()))

        return Timing(probe)

    names = [(backend, batch) for backend in BACKENDS for batch in BATCHES]
    timings = [cell_of(1e-3 * BASE_MS * n * (factor if b == slow else 1.0)) for b, n in names]
    control = cell_of(0.02)
    Runner(60.0, seed, lambda: ZERO, 2, clock=lambda: time[0]).measure([*timings, control])
    cells = tuple(_cell(b, n, timing) for (b, n), timing in zip(names, timings, strict=True))
    samples = tuple(1000 * sample for sample in control.measurement.samples)
    count = len(control.measurement.rounds[0].samples)
    metronome = ControlSamples(p50_ms=float(np.median(samples)), samples_ms=samples, round_samples=count)
    return sample_results(cells=cells, metronome=metronome)


def _cell(backend: str, batch: int, timing: Timing) -> Cell:
    samples = [1000 * sample for sample in timing.measurement.samples]
    return cell(
        backend=backend,
        batch=batch,
        samples_ms=tuple(samples),
        p50_ms=float(np.median(samples)),
        round_samples=len(timing.measurement.rounds[0].samples),
    )


def verdicts(new: Results, old: Results) -> dict[tuple[str, int], str]:
    rows = compare_results(new, old).rows
    return {(row.label.split()[0], row.batch): row.verdict for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_two_runs_are_the_same(seed: int) -> None:
    found = verdicts(run(2 * seed), run(2 * seed + 1))
    assert len(found) == 20
    assert list(found.values()).count("same") >= 19


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_ten_per_cent_of_one_backend_are_found(seed: int) -> None:
    found = verdicts(run(2 * seed, "beta", 1.10), run(2 * seed + 1))
    assert {verdict for (backend, _), verdict in found.items() if backend == "beta"} == {"slower"}
    assert list(found.values()).count("same") >= 14
    faster = verdicts(run(2 * seed + 1), run(2 * seed, "beta", 1.12))
    assert {verdict for (backend, _), verdict in faster.items() if backend == "beta"} == {"faster"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_one_per_cent_is_no_regression(seed: int) -> None:
    assert not compare_results(run(2 * seed, "beta", 1.01), run(2 * seed + 1)).slower


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.2, 0.5, 0.7])
def test_stretches_in_which_something_is_in_the_way_change_nothing(share: float) -> None:
    """For a part of the new run every cell takes a third longer, the control work as long as before."""
    old, new = run(0), run(1)

    def hindered(found: Cell) -> Cell:
        rounds = round_medians(found)
        late = np.repeat(np.arange(len(rounds)) < share * len(rounds), found.round_samples)
        samples = np.array(found.samples_ms) * np.where(late, 1.33, 1.0)
        return found.model_copy(update={"samples_ms": tuple(samples)})

    worse = new.model_copy(update={"cells": tuple(map(hindered, new.cells))})
    assert [row.verdict for row in compare_results(worse, old).rows].count("same") >= 19
    regressed = worse.model_copy(update={"cells": tuple(map(hindered, run(1, "beta", 1.10).cells))})
    found = verdicts(regressed, old)
    assert {verdict for (backend, _), verdict in found.items() if backend == "beta"} == {"slower"}


@pytest.mark.slow
def test_a_slower_machine_is_taken_out() -> None:
    slow, fast = run(0, machine=1.12), run(1)
    found = compare_results(slow, fast)
    assert [row.verdict for row in found.rows].count("same") >= 19
    assert found.drift == pytest.approx(1.12, abs=0.04)
    assert "which is taken out" in found.summary
    blind = compare_results(slow.model_copy(update={"metronome": None}), fast)
    assert blind.drift is None
    assert len(blind.slower) >= 19
    assert "the machine, perhaps" in blind.summary


@pytest.mark.slow
def test_a_slower_backend_on_a_slower_machine_is_found() -> None:
    found = verdicts(run(0, "beta", 1.10, machine=0.9), run(1))
    assert {verdict for (backend, _), verdict in found.items() if backend == "beta"} == {"slower"}


@pytest.mark.slow
@pytest.mark.parametrize("tolerance, verdict", [(0.05, "slower"), (0.2, "same")])
def test_the_tolerance_is_the_users(tolerance: float, verdict: str) -> None:
    rows = compare_results(run(0, "beta", 1.12), run(1), tolerance).rows
    assert {row.verdict for row in rows if row.label.startswith("beta")} == {verdict}


def test_what_is_not_comparable() -> None:
    old = sample_results(cells=(cell(batch=1), cell(batch=8), cell(batch=2), cell(batch=4), cell(batch=16)))
    new = sample_results(
        cells=(
            cell(batch=1, parity=failed_parity()),
            cell(batch=8, status="failed", reason="its process died of SIGSEGV"),
            cell(batch=32),
            cell(batch=4, disturbed=("other programs took 40% of the processors",)),
            cell(batch=2, threads=2),
        )
    )
    found = compare_results(new, old)
    reasons = {(row.batch, row.threads): row.reason for row in found.rows}
    assert {row.verdict for row in found.rows} == {"not comparable"}
    assert reasons == {
        (1, None): "wrong outputs now",
        (8, None): "failed now: its process died of SIGSEGV",
        (32, None): "not in the old results",
        (4, None): "disturbed now: other programs took 40% of the processors",
        (2, 2): "not in the old results",
        (2, None): "not in the new results",
        (16, None): "not in the new results",
    }
    assert not found.slower


def test_another_machine() -> None:
    old = sample_results(cells=(cell(p50_ms=1.0),))
    cpu = old.environment.cpu.model_copy(update={"name": "Another CPU"})
    new = old.model_copy(update={"environment": old.environment.model_copy(update={"cpu": cpu})})
    found = compare_results(new, old)
    assert [row.verdict for row in found.rows] == ["not comparable"]
    assert "another machine" in found.rows[0].reason
    assert "Another CPU" in found.summary


def test_a_change_of_every_cell_is_the_machines() -> None:
    old = sample_results(cells=tuple(cell(batch=n, p50_ms=10.0 * n) for n in BATCHES))
    new = sample_results(cells=tuple(cell(batch=n, p50_ms=11.0 * n) for n in BATCHES))
    assert "the machine, perhaps" in compare_results(new, old).summary
    assert "perhaps" not in compare_results(old, old).summary


def test_beyond_the_tolerance_but_within_noise() -> None:
    times = tuple(np.tile([5.0, 10.0, 20.0, 40.0, 3.0], 8))
    old = sample_results(cells=(cell(samples_ms=times, p50_ms=10.0, round_samples=1),))
    new = sample_results(
        cells=(cell(samples_ms=tuple(1.2 * t for t in times), p50_ms=12.0, round_samples=1),)
    )
    (row,) = compare_results(new, old).rows
    assert (row.verdict, row.reason) == ("same", "beyond the tolerance, but within noise: measure longer")


@pytest.mark.slow
def test_markdown() -> None:
    text = comparison_markdown(compare_results(run(0, "beta", 1.12), run(1)))
    assert text.startswith("❌ **5 slower, 15 same.** Tolerance 5%.")
    assert text.count("| slower |") == 5
    assert "<details>" in text
    calm = comparison_markdown(compare_results(run(0), run(1)))
    assert calm.startswith("✅ **20 same.**")


@pytest.mark.slow
@given(st.lists(st.floats(0.1, 1e4), min_size=1, max_size=40), st.floats(0.1, 10))
def test_the_interval_holds_the_ratio(times: list[float], factor: float) -> None:
    old = np.array(times)
    found = ratio_of(factor * old, old)
    assert found.value == pytest.approx(factor)
    assert found.low <= found.value * (1 + 1e-9)
    assert found.high >= found.value * (1 - 1e-9)


def test_rounds_stay_together() -> None:
    made = cell(samples_ms=(1.0, 2.0, 3.0, 10.0, 20.0, 30.0, 5.0), round_samples=3)
    assert round_medians(made).tolist() == [2.0, 20.0]


def test_an_unsteady_cell_warns() -> None:
    assert cell(spread=0.33).warnings == ("the rounds differ by 33%",)
    assert cell(spread=0.33, disturbed=("throttled",)).warnings == ("throttled", "the rounds differ by 33%")
    assert cell(spread=0.05).warnings == ()
