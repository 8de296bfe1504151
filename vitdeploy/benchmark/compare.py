"""Two measurements, cell by cell: what became faster or slower beyond noise, and beyond a tolerance."""

from __future__ import annotations

from collections import Counter
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from vitdeploy.benchmark.results import Cell, ControlSamples, Results

TOLERANCE = 0.05
"""Change of the latency that two runs on one machine may show without a cause worth a look."""
FLOOR = 10
"""Percentile of the rounds' medians that is compared: what a cell takes when nothing is in its way.

What gets in its way only ever adds time, and on a shared machine it comes and goes in stretches: a median
tells how long they were, a low percentile is the same with and without (Chen and Revels, Robust
benchmarking in noisy environments, 2016)."""
DRAWS = 2000
_CONFIDENCE = (2.5, 97.5)
_COMMON = 0.03
"""A change that the cells share, from which on the machine is the likelier cause than the software."""
_COMMON_CELLS = 4
_DRIFT = 0.005
"""Of the machine, that is worth a word."""

SpeedVerdict = Literal["faster", "same", "slower", "not comparable"]
Rounds = NDArray[np.float64]


class Ratio(NamedTuple):
    """A ratio of latencies with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class ComparedCell(BaseModel):
    """One cell, then and now; ratios are new over old, so that below one is faster.

    The machine's own drift is taken out of ``ratio``, ``low`` and ``high``, not of the times.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    subject: str
    label: str
    batch: int
    threads: int | None
    concurrency: int
    spin: bool = False
    old_ms: float | None
    new_ms: float | None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    verdict: SpeedVerdict
    reason: str = ""


class ResultsComparison(BaseModel):
    """All cells of two measurements."""

    model_config = ConfigDict(frozen=True)

    tolerance: float
    drift: float | None = None
    """How much longer the machine took for the control work than before; taken out of the ratios."""
    rows: tuple[ComparedCell, ...]
    summary: str

    @property
    def slower(self) -> tuple[ComparedCell, ...]:
        """The regressions."""
        return tuple(row for row in self.rows if row.verdict == "slower")


def round_medians(cell: Cell | ControlSamples) -> Rounds:
    """(R,) the median of each round's samples, in ms."""
    whole = len(cell.samples_ms) // cell.round_samples * cell.round_samples
    medians: Rounds = np.median(np.reshape(cell.samples_ms[:whole], (-1, cell.round_samples)), axis=1)
    return medians


def ratio_of(
    new: Rounds,
    old: Rounds,
    *,
    percentile: float = 50,
    control: tuple[Rounds, Rounds] | None = None,
    seed: int = 0,
) -> Ratio:
    """A percentile of ``new`` over the same of ``old``, with a percentile bootstrap over whole rounds.

    Samples of one round share what the machine did at that time, so rounds are drawn, not samples
    (a block bootstrap; Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 8).

    Args:
        new, old: (R,) times; the numbers of rounds may differ.
        percentile: of the rounds; the median by default.
        control: the control work's rounds in the new and in the old measurement, whose ratio is taken out.
        seed: of the draws.
    """
    random = np.random.default_rng(seed)

    def drawn(rounds: Rounds) -> Rounds:
        found: Rounds = np.percentile(random.choice(rounds, (DRAWS, len(rounds))), percentile, axis=1)
        return found

    value, draws = _quotient(new, old, percentile), drawn(new) / drawn(old)
    if control is not None:
        value /= _quotient(*control, percentile)
        draws /= drawn(control[0]) / drawn(control[1])
    low, high = np.percentile(draws, _CONFIDENCE)
    return Ratio(float(value), float(low), float(high))


def _quotient(new: Rounds, old: Rounds, percentile: float) -> float:
    return float(np.percentile(new, percentile) / np.percentile(old, percentile))


def compare_results(new: Results, old: Results, tolerance: float = TOLERANCE) -> ResultsComparison:
    """Match the cells of two measurements and judge each.

    Slower and faster are said only where the whole interval lies beyond the tolerance.
    """
    machine, control = _other_machine(new, old), None
    if new.metronome and old.metronome:
        control = round_medians(new.metronome), round_medians(old.metronome)
    before = {old.key(cell): cell for cell in old.cells}
    rows = []
    for cell in new.cells:
        earlier = before.pop(new.key(cell), None)
        reason = machine or (_unfit(cell, earlier) if earlier else "not in the old results")
        rows.append(_row(cell, earlier, tolerance, reason, control))
    for cell in before.values():
        gone = _row(cell, cell, tolerance, "not in the new results", control)
        rows.append(gone.model_copy(update={"new_ms": None}))
    drift = None if control is None or machine else _quotient(*control, FLOOR)
    summary = _summary(rows, machine, drift)
    return ResultsComparison(tolerance=tolerance, drift=drift, rows=tuple(rows), summary=summary)


def _other_machine(new: Results, old: Results) -> str:
    here, there = new.environment.machine, old.environment.machine
    if here == there:
        return ""
    return f"another machine: {', '.join(filter(None, there))}; here {', '.join(filter(None, here))}"


def _unfit(new: Cell, old: Cell) -> str:
    """Why the times of two cells say nothing about each other; empty if they do."""
    for cell, when in ((new, "now"), (old, "then")):
        if cell.status == "failed":
            return f"failed {when}: {cell.reason}"
        if cell.parity is None or not cell.parity.passed:
            return f"wrong outputs {when}"
        if cell.disturbed:
            return f"disturbed {when}: {cell.disturbed[0]}"
    return ""


def _row(
    new: Cell, old: Cell | None, tolerance: float, reason: str, control: tuple[Rounds, Rounds] | None
) -> ComparedCell:
    found = None
    if old is not None and not reason:
        found = ratio_of(round_medians(new), round_medians(old), percentile=FLOOR, control=control)
    verdict: SpeedVerdict = "not comparable"
    if found:
        verdict = "slower" if found.low > 1 + tolerance else "same"
        verdict = "faster" if found.high < 1 / (1 + tolerance) else verdict
        if verdict == "same" and not 1 / (1 + tolerance) <= found.value <= 1 + tolerance:
            reason = "beyond the tolerance, but within noise: measure longer"
    return ComparedCell(
        subject=new.subject,
        label=new.label,
        batch=new.batch,
        threads=new.threads,
        concurrency=new.concurrency,
        spin=new.spin,
        old_ms=old.p50_ms if old else None,
        new_ms=new.p50_ms,
        ratio=found.value if found else None,
        low=found.low if found else None,
        high=found.high if found else None,
        verdict=verdict,
        reason=reason,
    )


def _summary(rows: list[ComparedCell], machine: str, drift: float | None) -> str:
    """One sentence to three."""
    if machine:
        return f"Not comparable: {machine}."
    counts = Counter(row.verdict for row in rows)
    order: tuple[SpeedVerdict, ...] = ("slower", "faster", "same", "not comparable")
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in order if counts[verdict]) or "nothing"
    if drift is not None and abs(drift - 1) >= _DRIFT:
        said += f". The machine itself was {abs(drift - 1):.0%} {_way(drift)}, which is taken out"
    ratios = [row.ratio for row in rows if row.ratio is not None]
    middle = float(np.median(ratios)) if ratios else 1.0
    alike = sum((ratio > 1) == (middle > 1) for ratio in ratios)
    if len(ratios) >= _COMMON_CELLS and abs(middle - 1) > _COMMON and alike >= 0.9 * len(ratios):
        change = f"{abs(middle - 1):.0%}"
        return (
            f"{said}. Nearly all cells are {_way(middle)}, by {change} in the middle: the machine, perhaps?"
        )
    return f"{said}."


def _way(ratio: float) -> str:
    return "slower" if ratio > 1 else "faster"
