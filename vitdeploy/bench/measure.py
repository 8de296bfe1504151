"""Host-to-host latency of everything a bundle can run here, measured in interleaved rounds.

A round runs every cell (backend, artifact, batch size) once, so that whatever disturbs the machine
disturbs all cells alike. The error against the float64 reference stands beside each speed: a fast wrong
backend shows.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vitdeploy.backends.base import Array, Options, Session
from vitdeploy.bundle import Bundle
from vitdeploy.config import Output, Size
from vitdeploy.doctor import diagnose
from vitdeploy.errors import ParityError, UsageError
from vitdeploy.parity import TOLERANCES, compare
from vitdeploy.progress import Progress
from vitdeploy.verification import runnable

SCHEMA_VERSION = 1
WARM_UP = 0.15
"""Share of the budget that goes into warming up."""
MOST_ROUNDS = 200
LEAST_ROUNDS = 3
"""Even where the budget is spent: fewer samples say nothing about spread."""


@dataclass(frozen=True)
class Cell:
    """One backend, artifact and batch size."""

    backend: str
    provider: str
    artifact: str
    precision: str
    batch: int
    image_size: Size
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    images_per_s: float
    """Of the median."""
    samples_ms: tuple[float, ...]
    parity: dict[str, float | None]
    """The relative and the absolute error against the float64 reference, at this batch size."""


@dataclass(frozen=True)
class BenchReport:
    """A measurement and the machine it was made on."""

    environment: dict[str, Any]
    cells: tuple[Cell, ...]
    rounds: int
    skipped: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON: ``schema_version``, ``environment``, ``rounds``, ``cells``, ``skipped``."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


@dataclass
class _Running:
    """A cell while it is measured."""

    session: Session
    inputs: dict[str, Array]
    batch: int
    image_size: Size
    parity: dict[str, float | None] = field(default_factory=dict)
    samples: list[float] = field(default_factory=list)

    def sample(self) -> float:
        begin = time.perf_counter()
        self.session.run(self.inputs)
        return time.perf_counter() - begin

    def result(self) -> Cell:
        facts = self.session.facts
        p50, p90, p99 = (float(value) for value in np.percentile(self.samples, (50, 90, 99)))
        return Cell(
            backend=facts.backend,
            provider=facts.provider,
            artifact=facts.artifact,
            precision=facts.precision,
            batch=self.batch,
            image_size=self.image_size,
            p50_ms=_ms(p50),
            p90_ms=_ms(p90),
            p99_ms=_ms(p99),
            mean_ms=_ms(float(np.mean(self.samples))),
            images_per_s=round(self.batch / p50, 2),
            samples_ms=tuple(_ms(sample) for sample in self.samples),
            parity=self.parity,
        )


def run_bench(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    backends: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 8, 32),
    options: Options | None = None,
    budget: float = 60.0,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure a bundle; ``vitdeploy.bench`` documents the arguments and the errors."""
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
    options, progress = options or Options(), progress or Progress()
    golden = opened.golden()
    if "pixel_values" not in golden:
        raise ParityError(f"{opened.root}: has no golden inputs to measure with")
    pairs = runnable(opened, backends, models=True)
    skipped = [f"{pair.name} on {pair.backend.name}: {pair.reason}" for pair in pairs if pair.reason]
    with ExitStack() as stack:
        cells: list[_Running] = []
        for pair in pairs:
            if pair.reason is None:
                with progress.stage(f"load {pair.name}") as stage:
                    session = stack.enter_context(pair.backend.load(opened, pair.artifact, options))
                    stage.detail = pair.backend.name
                cells += _cells(session, golden, batches, opened.manifest.output)
        if not cells:
            raise UsageError(
                f"nothing to measure: no artifact serves a batch of {', '.join(map(str, batches))} here",
                hint="; ".join(skipped) or None,
            )
        with progress.stage("measure") as stage:
            rounds = _measure(cells, budget)
            stage.detail = f"{len(cells)} cells, {rounds} rounds"
        results = tuple(cell.result() for cell in cells)
    return BenchReport(_environment(options), results, rounds, tuple(skipped))


def _cells(
    session: Session, golden: dict[str, Array], batches: Sequence[int], output: Output
) -> Iterator[_Running]:
    """One cell per batch size that the session serves, its outputs compared with the reference once."""
    facts = session.facts
    name, out = facts.inputs[0].name, facts.outputs[0].name
    pixels, reference = golden["pixel_values"], golden["reference"]
    height, width = pixels.shape[1:3] if pixels.shape[-1] == 3 else pixels.shape[2:]
    for batch in dict.fromkeys(batches):
        if facts.batch and not facts.batch.min <= batch <= facts.batch.max:
            continue
        order = np.arange(batch) % len(pixels)
        cell = _Running(session, {name: np.ascontiguousarray(pixels[order])}, batch, (height, width))
        outputs = session.run(cell.inputs)[out]
        metrics = compare(reference[order], outputs, TOLERANCES[facts.precision], output)
        cell.parity = {"relative": metrics.relative, "max_abs": metrics.max_abs}
        yield cell


def _measure(cells: Sequence[_Running], budget: float) -> int:
    """Warm up, then rounds until the budget is spent; returns how many."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < WARM_UP * budget:
        for cell in cells:
            cell.sample()
    rounds = 0
    with _no_garbage_collection():
        while rounds < MOST_ROUNDS and (rounds < LEAST_ROUNDS or time.perf_counter() - begin < budget):
            for cell in cells:
                cell.samples.append(cell.sample())
            rounds += 1
    return rounds


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Python's collector would run inside whichever sample happens to trigger it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _environment(options: Options) -> dict[str, Any]:
    found = diagnose().as_dict()
    keep = ("vitdeploy", "python", "platform", "cpu", "gpus", "libraries")
    return {key: found[key] for key in keep} | {"threads": options.threads}


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 4)
