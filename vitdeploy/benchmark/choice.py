"""What to run on this machine, chosen among what was measured and is right, and written into the bundle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from vitdeploy.benchmark.compare import Rounds, ratio_of, round_medians
from vitdeploy.benchmark.results import Cell, Results
from vitdeploy.bundle.folder import WEIGHTS, Bundle
from vitdeploy.bundle.manifest import Choice
from vitdeploy.errors import ParityError, UsageError
from vitdeploy.predictor import EXACTNESS

Goal = Literal["latency", "throughput"]
LEVEL = 0.02
"""Cells that differ by no more than this, or by noise, are level: then the more exact one is taken."""


def pick(results: Results, subject: str, goal: Goal, max_latency_ms: float | None = None) -> Cell:
    """The cell to run: the lowest median latency of the smallest batch, or the most images per second.

    Args:
        subject: the bundle's name in the results.
        max_latency_ms: what the 99th percentile of a cell may be at most.

    Raises:
        ParityError: no cell is right.
        UsageError: none is fast enough.
    """
    own = [cell for cell in results.cells if cell.subject == subject]
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
    costs = [(_seconds_per_image(cell), cell) for cell in allowed]
    best_costs = min((rounds for rounds, _ in costs), key=lambda rounds: float(np.median(rounds)))
    level = [cell for rounds, cell in costs if _level(rounds, best_costs)]
    return min(level, key=lambda cell: (EXACTNESS.index(cell.precision), -(cell.images_per_s or 0.0)))


def _seconds_per_image(cell: Cell) -> Rounds:
    """(R,) what an image costs in each round, all callers working."""
    return round_medians(cell) / (cell.batch * cell.concurrency)


def _level(rounds: Rounds, best: Rounds) -> bool:
    if rounds is best:
        return True
    found = ratio_of(rounds, best)
    return found.value <= 1 + LEVEL or found.low <= 1


def choice_of(cell: Cell, results: Results, goal: Goal, max_latency_ms: float | None) -> Choice:
    """A cell as the record that a bundle keeps."""
    assert cell.p50_ms is not None
    assert cell.images_per_s is not None
    return Choice(
        machine=results.environment.machine,
        goal=goal,
        max_latency_ms=max_latency_ms,
        backend=cell.backend,
        provider=cell.provider if cell.backend == "onnxruntime" else None,
        artifact=None if cell.artifact == WEIGHTS else cell.artifact,
        threads=cell.threads,
        batch=cell.batch,
        concurrency=cell.concurrency,
        p50_ms=cell.p50_ms,
        images_per_s=cell.images_per_s,
        created=results.created,
    )


def write_choice(bundle: Bundle, choice: Choice) -> Bundle:
    """Put a choice into a bundle, in the place of an earlier one for the same machine.

    Raises:
        BundleError: the bundle cannot be written, or changed meanwhile.
    """
    others: Sequence[Choice] = [c for c in bundle.manifest.choices if c.machine != choice.machine]
    with bundle.edit() as writer:
        writer.seal(bundle.manifest.model_copy(update={"choices": (*others, choice)}))
        return writer.commit()
