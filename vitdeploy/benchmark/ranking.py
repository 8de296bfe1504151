"""Which measured cell is best, by how much, and against what: the choice that every view shows.

Only cells that were measured and right (``Cell.valid``) take part.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from vitdeploy.benchmark.results import Cell, Results
from vitdeploy.config import Size

EAGER: Final = "torch"
"""The backend that runs the model as PyTorch does without any deployment: what a speed-up is over."""


class Group(NamedTuple):
    """Cells that answer the same question: one bundle at one image size."""

    subject: str
    image_size: Size


def groups(results: Results) -> tuple[Group, ...]:
    """Bundles and image sizes with at least one cell, in the order of the cells."""
    return tuple(dict.fromkeys(Group(cell.subject, cell.image_size) for cell in results.cells))


def members(results: Results, group: Group) -> tuple[Cell, ...]:
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


class Answer(NamedTuple):
    """What to run at one batch size, and how much it gains."""

    batch: int
    cell: Cell | None
    """Null where nothing was measured and right."""
    over: Cell | None
    """Eager PyTorch on the same work."""
    factor: float | None
    """The speed-up over it."""
    runner_up: Cell | None


def answers(cells: Iterable[Cell], results: Results) -> tuple[Answer, ...]:
    """One per batch size of ``cells``, which are a group's."""
    cells = tuple(cells)
    found = []
    for batch in batches(cells):
        order = ranked(cell for cell in cells if cell.batch == batch)
        best = order[0] if order else None
        over = eager(results, best) if best else None
        factor = speedup(best, over) if best else None
        found.append(Answer(batch, best, over, factor, order[1] if len(order) > 1 else None))
    return tuple(found)


def _error(cell: Cell) -> float:
    known = cell.parity.relative if cell.parity else None
    return float("inf") if known is None else known


def _work(cell: Cell) -> tuple[object, ...]:
    return (cell.subject, cell.image_size, cell.batch, cell.threads, cell.concurrency)
