"""Who wins, and in one line each why the others do not. Knows measured cells only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from vitdeploy.benchmark.ranking import Goal, pick, seconds_per_image
from vitdeploy.benchmark.results import Cell, Results
from vitdeploy.bundle.dtypes import QUANTISED
from vitdeploy.errors import ParityError
from vitdeploy.optimiser.record import Tried, Verdict, tried
from vitdeploy.predictor import EXACTNESS
from vitdeploy.verification.accuracy import judge_drop, judge_quantised

QUANTISED_GAIN: Final = 1.15
"""How many times as fast as the best float artifact a quantised one must be: it costs accuracy."""
FAR: Final = 1.5
"""A float contestant that takes so many times as long as the fastest at a first look goes no further."""
FINALISTS: Final = 5
"""Floats that are measured together, at most; besides the fastest fp32, and all that is quantised."""


class Decision(NamedTuple):
    """What a contest came to."""

    winner: Cell
    tried: tuple[Tried, ...]
    """Every cell, the winner first, then as fast as they are."""


class Sieve(NamedTuple):
    """What a quick measurement says."""

    finalists: tuple[int, ...]
    """Which cells, by their places."""
    tried: tuple[Tried, ...]
    """The others."""


def cost(cell: Cell) -> float:
    """Milliseconds for an image, all sessions at work: the median of the rounds."""
    return float(np.median(seconds_per_image(cell)))


def sieve(groups: Sequence[Sequence[Cell]]) -> Sieve:
    """The cells that are worth measuring together.

    Args:
        groups: each one artifact on one runtime, with other numbers of threads and sessions; at most one cell
            of it stays. Places count through all groups.
    """
    places = {id(cell): place for place, cell in enumerate(cell for group in groups for cell in group)}
    lost: list[Tried] = []
    best: list[Cell] = []
    for group in groups:
        right = sorted((cell for cell in group if cell.valid), key=cost)
        lost += [tried(cell, *_trouble(cell)) for cell in group if not cell.valid]
        best += right[:1]
        lost += [tried(cell, "slower", f"{_times(right[0], cell)}, in a first look") for cell in right[1:]]
    best.sort(key=cost)
    # Floats are held against floats: the best of them is what a quantised one has to beat.
    floats = [cell for cell in best if cell.precision not in QUANTISED]
    wanted = [cell for cell in floats[:FINALISTS] if cost(cell) <= FAR * cost(floats[0])]
    plain = [cell for cell in floats if cell.precision == "fp32"][:1]
    wanted += [cell for cell in plain if not _among(cell, wanted)]
    lost += [
        tried(cell, "slower", f"{_times(floats[0], cell)}, in a first look")
        for cell in floats
        if not _among(cell, wanted)
    ]
    wanted += [cell for cell in best if cell.precision in QUANTISED]
    return Sieve(tuple(places[id(cell)] for cell in wanted), tuple(lost))


def decide(results: Results, subject: str, goal: Goal, max_drop: float | None = None) -> Decision:
    """The winner of cells that were measured together at one batch size.

    The float cells are ranked as ``bench --pick`` ranks them. A quantised one wins if it is fast enough
    (``QUANTISED_GAIN``) beside the best of these.

    Args:
        subject: the bundle's name in the results.
        max_drop: points of top-1 that a cell may be below the reference; one without accuracy then loses.
            Where it is None, a quantised one must not be worse beyond doubt (``judge_quantised``).

    Raises:
        ParityError: no cell is right.
    """
    out: dict[int, tuple[Verdict, str]] = {}
    fit = []
    for index, cell in enumerate(results.cells):
        trouble = _trouble(cell) if not cell.valid else _dropped(cell, max_drop)
        if trouble is None:
            fit.append(cell)
        else:
            out[index] = trouble
    if not fit:
        why = "; ".join(f"{results.cells[i].label}: {why}" for i, (_, why) in out.items())
        raise ParityError(f"nothing to choose: {why}")
    exact = [cell for cell in fit if cell.precision not in QUANTISED]
    best = pick(results.model_copy(update={"cells": tuple(exact)}), subject, goal) if exact else None
    quick = [
        cell
        for cell in fit
        if not _among(cell, exact) and (best is None or gain(cell, best) >= QUANTISED_GAIN)
    ]
    winner = min(quick, key=cost) if quick else best
    assert winner is not None  # something fits: if it is no float, nothing refuses it
    found = [tried(winner, "chosen", _reason(winner, fit))]
    for index, cell in sorted(enumerate(results.cells), key=lambda one: _order(one[1])):
        if cell is winner:
            continue
        if index in out:
            verdict, why = out[index]
        elif best is not None and not _among(cell, exact) and not _among(cell, quick):
            verdict = "refused"
            why = f"{gain(cell, best):.2f}x of {label(best)}: less than the {QUANTISED_GAIN:g}x that "
            why += f"{cell.precision} must bring"
        elif gain(cell, winner) >= 1:
            verdict, why = "level", f"{_times(winner, cell)}: not told apart{_less_exact(cell, winner)}"
        else:
            verdict, why = "slower", _times(winner, cell)
        found.append(tried(cell, verdict, why))
    return Decision(winner, tuple(found))


def gain(cell: Cell, over: Cell) -> float:
    """How many times as fast as ``over`` a cell is."""
    return cost(over) / cost(cell)


def label(cell: Cell) -> str:
    """What it is, for a sentence."""
    return tried(cell, "chosen", "").label


def _among(cell: Cell, cells: Sequence[Cell]) -> bool:
    """Whether it is one of them itself: two cells may say the same."""
    return any(cell is other for other in cells)


def _times(winner: Cell, cell: Cell) -> str:
    return f"{gain(cell, winner):.2f}x of {label(winner)}"


def _less_exact(cell: Cell, winner: Cell) -> str:
    less = EXACTNESS.index(cell.precision) > EXACTNESS.index(winner.precision)
    return ", and less exact" if less else ""


def _order(cell: Cell) -> float:
    return cost(cell) if cell.valid else float("inf")


def _trouble(cell: Cell) -> tuple[Verdict, str]:
    """What is wrong with a cell that is not valid."""
    if cell.status == "failed":
        return "failed", cell.reason
    failures = cell.parity.failures if cell.parity else ()
    return "wrong", failures[0] if failures else "it was not held against the reference"


def _dropped(cell: Cell, max_drop: float | None) -> tuple[Verdict, str] | None:
    """Why a cell is not accurate enough; None where it is, or nothing says that it is not."""
    if cell.accuracy is None:
        why = "its accuracy could not be measured beside the reference's"
        return None if max_drop is None else ("refused", why)
    if max_drop is not None:
        held, said = judge_drop(cell.accuracy, max_drop)
    elif cell.precision in QUANTISED:
        held, said = judge_quantised(cell.accuracy)
    else:
        return None
    return None if held else ("refused", said)


def _reason(winner: Cell, fit: Sequence[Cell]) -> str:
    plain = [cell for cell in fit if cell.precision == "fp32" and cell is not winner]
    if winner.precision == "fp32" or not plain:
        return f"the fastest of {len(fit)} that were measured to the end and are right"
    return _times(min(plain, key=cost), winner)
