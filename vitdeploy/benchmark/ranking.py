"""Which measured cell is best, by how much, and against what; and what a bundle is to run with from then on.

Only cells that were measured and right (``Cell.valid``) take part.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal, NamedTuple

import numpy as np

from vitdeploy.benchmark.compare import Rounds, ratio_of, round_medians
from vitdeploy.benchmark.results import Cell, Results
from vitdeploy.bundle.folder import WEIGHTS
from vitdeploy.bundle.manifest import Choice
from vitdeploy.bundle.sizes import named
from vitdeploy.config import Size
from vitdeploy.errors import ParityError, UsageError
from vitdeploy.predictor import EXACTNESS

Goal = Literal["latency", "throughput"]
LEVEL: Final = 0.02
"""Cells that differ by no more than this, or by noise, are level: then the more exact one is taken."""

EAGER: Final = "torch"
"""The backend that runs the model as PyTorch does without any deployment: what a speed-up is over."""


class CellGroup(NamedTuple):
    """Cells that answer the same question: one bundle at one image size."""

    subject: str
    image_size: Size


def groups(results: Results) -> tuple[CellGroup, ...]:
    """Bundles and image sizes with at least one cell, in the order of the cells."""
    return tuple(dict.fromkeys(CellGroup(cell.subject, cell.image_size) for cell in results.cells))


def members(results: Results, group: CellGroup) -> tuple[Cell, ...]:
    """The cells of a group, in their order."""
    return tuple(c for c in results.cells if (c.subject, c.image_size) == group)


def batches(cells: Iterable[Cell]) -> tuple[int, ...]:
    """Their batch sizes, ascending."""
    return tuple(sorted({cell.batch for cell in cells}))


def ranked(cells: Iterable[Cell]) -> tuple[Cell, ...]:
    """The valid cells, lowest median latency first; equal ones keep their order."""
    timed = [(cell.p50_ms, cell) for cell in cells if cell.valid and cell.p50_ms is not None]
    return tuple(cell for _, cell in sorted(timed, key=lambda pair: pair[0]))


def fastest(results: Results, subject: str, batch: int, image_size: Size | None = None) -> Cell | None:
    """The valid cell with the lowest median latency; null where no cell was measured and right.

    Without ``image_size``, of all the sizes that the subject was measured at.
    """
    best = ranked(
        cell
        for cell in results.cells
        if cell.subject == subject and cell.batch == batch and image_size in (None, cell.image_size)
    )
    return best[0] if best else None


def eager(results: Results, cell: Cell) -> Cell | None:
    """Eager PyTorch in fp32 on the work of ``cell``, with as many threads and callers; null if absent."""
    found = ranked(
        other
        for other in results.cells
        if (other.backend, other.precision) == (EAGER, "fp32") and _work(other) == _work(cell)
    )
    return found[0] if found else None


def speedup(cell: Cell, over: Cell | None) -> float | None:
    """How many times as fast as ``over`` by median latency; null without two positive times."""
    if over is None or not cell.p50_ms or not over.p50_ms:
        return None
    return over.p50_ms / cell.p50_ms


def pareto(cells: Iterable[Cell]) -> tuple[Cell, ...]:
    """The valid cells that no other one beats in both error and latency, fastest first.

    Cells are held only against cells of the same subject, image size and batch.
    """
    best: dict[tuple[str, Size, int], float] = {}
    front = []
    for cell in sorted(ranked(cells), key=lambda c: (c.p50_ms, _error(c))):
        place = (cell.subject, cell.image_size, cell.batch)
        if _error(cell) < best.get(place, float("inf")):
            best[place] = _error(cell)
            front.append(cell)
    return tuple(front)


class BestCell(NamedTuple):
    """What to run at one batch size, and how much it gains."""

    batch: int
    cell: Cell | None
    """Null where nothing was measured and right."""
    over: Cell | None
    """Eager PyTorch on the same work."""
    factor: float | None
    """The speed-up over it."""
    runner_up: Cell | None


def best_by_batch(cells: Iterable[Cell], results: Results) -> tuple[BestCell, ...]:
    """One per batch size of ``cells``, which are a group's."""
    cells = tuple(cells)
    found = []
    for batch in batches(cells):
        order = ranked(cell for cell in cells if cell.batch == batch)
        best = order[0] if order else None
        over = eager(results, best) if best else None
        factor = speedup(best, over) if best else None
        found.append(BestCell(batch, best, over, factor, order[1] if len(order) > 1 else None))
    return tuple(found)


def _error(cell: Cell) -> float:
    known = cell.parity.relative if cell.parity else None
    return float("inf") if known is None else known


def _work(cell: Cell) -> tuple[object, ...]:
    return (cell.subject, cell.image_size, cell.batch, cell.threads, cell.concurrency)


def pick(
    results: Results,
    subject: str,
    goal: Goal,
    max_latency_ms: float | None = None,
    image_size: Size | None = None,
) -> Cell:
    """The cell to run: the lowest median latency of the smallest batch, or the most images per second.

    Args:
        subject: the bundle's name in the results.
        max_latency_ms: what the 99th percentile of a cell may be at most.
        image_size: of which; None is of all that the subject was measured at.

    Raises:
        ParityError: no cell is right.
        UsageError: none is fast enough.
    """
    own = [c for c in results.cells if c.subject == subject and image_size in (None, c.image_size)]
    valid = [cell for cell in own if cell.valid]
    if not valid:
        wrong = sum(cell.parity is not None and not cell.parity.passed for cell in own)
        raise ParityError(
            f"nothing to pick: {wrong} of {len(own)} cells have wrong outputs, the others failed"
        )
    allowed = [c for c in valid if max_latency_ms is None or (c.p99_ms or 0.0) <= max_latency_ms]
    if not allowed:
        best = min(cell.p99_ms or 0.0 for cell in valid)
        raise UsageError(
            f"nothing to pick: no cell stays within {max_latency_ms:g} ms (99th percentile)",
            hint=f"the lowest is {best:.3g} ms",
        )
    if goal == "latency":
        smallest = min((cell.concurrency, cell.batch) for cell in allowed)
        allowed = [cell for cell in allowed if (cell.concurrency, cell.batch) == smallest]
    costs = [(seconds_per_image(cell), cell) for cell in allowed]
    best_costs = min((rounds for rounds, _ in costs), key=lambda rounds: float(np.median(rounds)))
    level = [cell for rounds, cell in costs if _level(rounds, best_costs)]
    return min(level, key=lambda cell: (EXACTNESS.index(cell.precision), -(cell.images_per_s or 0.0)))


def seconds_per_image(cell: Cell) -> Rounds:
    """(R,) what an image costs in each round in milliseconds, all callers working."""
    return round_medians(cell) / (cell.batch * cell.concurrency)


def _level(rounds: Rounds, best: Rounds) -> bool:
    if rounds is best:
        return True
    found = ratio_of(rounds, best)
    return found.value <= 1 + LEVEL or found.low <= 1


def choice_of(
    cell: Cell, results: Results, goal: Goal, max_latency_ms: float | None, place: Size | None = None
) -> Choice:
    """A cell as the record that a bundle keeps.

    Args:
        place: its image size, as the bundle's artifacts name it: None is the first.
    """
    assert cell.p50_ms is not None
    assert cell.images_per_s is not None
    return Choice(
        machine=results.environment.machine,
        goal=goal,
        max_latency_ms=max_latency_ms,
        backend=cell.backend,
        provider=cell.provider if cell.backend == "onnxruntime" else None,
        artifact=None if cell.artifact == WEIGHTS else named(cell.artifact, place),
        threads=cell.threads,
        batch=cell.batch,
        concurrency=cell.concurrency,
        spin=cell.spin,
        p50_ms=cell.p50_ms,
        p99_ms=cell.p99_ms,
        images_per_s=cell.images_per_s,
        created=results.created,
        image_size=place,
    )
