"""Lanes and cells while they are measured: started, proven, timed, started again where their process died."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from vitdeploy.backends.base import Array, SessionFacts
from vitdeploy.benchmark.lanes import Lane, RemoteSession, facts_of
from vitdeploy.benchmark.machine import device_memory
from vitdeploy.benchmark.measure import CellFailure, Timing, Visit
from vitdeploy.benchmark.results import Accuracy, Parity, Startup
from vitdeploy.errors import VitdeployError
from vitdeploy.machine.child import Worker, WorkerFailure
from vitdeploy.predictor import Predictor
from vitdeploy.verification.accuracy import LabelledImages, TopClasses, top_classes
from vitdeploy.verification.parity import TOLERANCES, check_session


@dataclass(frozen=True)
class Limits:
    """Seconds that a process may take to answer, before it counts as hung."""

    load: float = 1800.0
    """A compiler's work included."""
    run: float = 600.0
    """A batch, or the first run of one, which may compile."""


class LaneRun:
    """A lane while it is measured; its process is started again where it died."""

    def __init__(self, lane: Lane, limits: Limits) -> None:
        self.lane, self._limits = lane, limits
        self.facts: SessionFacts | None = None
        self.startup: Startup | None = None
        self.accuracy: Accuracy | None = None
        self.failure = ""
        """Why it cannot be started."""
        self._session: RemoteSession | None = None
        self._worker: Worker | None = None
        self._prepared: set[int] = set()

    def start(self, first: int) -> None:
        """Start the process and run its first batch.

        Raises:
            CellFailure: it does not come up.
        """
        if self.failure:
            raise CellFailure(self.failure)
        try:
            self._worker = self.lane.start(self._limits.run)
            said = self._worker.answer(self._limits.load)
            self.facts = facts_of(self.lane, said["facts"])
            self._session = RemoteSession(self.facts, self._worker, self._limits.run)
        except (WorkerFailure, VitdeployError) as error:
            self.close()
            self.failure = str(error)
            raise CellFailure(self.failure) from error
        with self._failures():
            seconds = self._prepare(first)[0]
        if self.startup is None:
            total = time.perf_counter() - self._worker.began
            load = float(said["load"])
            self.startup = Startup(
                import_s=max(0.0, total - load - seconds), load_s=load, first_s=seconds, total_s=total
            )

    @property
    def pids(self) -> list[int]:
        return [self._worker.pid] if self._worker else []

    def session(self, batch: int) -> RemoteSession:
        """The session, its process running. Raises CellFailure."""
        if self._session is None:
            self.start(batch)
        assert self._session is not None
        return self._session

    def prove(self, batch: int) -> Parity:
        """Hold the lane against the float64 reference at a batch size.

        Raises:
            CellFailure: it fails.
        """
        target, session = self.lane.target, self.session(batch)
        with self._failures():
            bound = target.bundle.manifest.max_abs
            record = check_session(session, target.golden, batches=[batch], max_abs=bound)[0]
        metrics = record.metrics
        return Parity(
            passed=record.passed,
            failures=record.failures,
            relative=metrics.relative,
            max_abs=metrics.max_abs,
            tolerance=record.tolerance.relative,
        )

    def prepare(self, batch: int) -> tuple[int | None, int | None]:
        """Make a batch ready to be timed; returns the peak of host and device memory in bytes.

        Raises:
            CellFailure: it fails.
        """
        self.session(batch)
        with self._failures():
            peak = self._prepare(batch)[1]
        on_gpu = self.facts is not None and self.facts.device.startswith("cuda")
        return peak, device_memory(self.pids[0]) if on_gpu else None

    def _prepare(self, batch: int) -> tuple[float, int | None]:
        assert self._session is not None
        assert self._worker is not None
        path = self._session.file(self.lane.target.batch(batch))
        answer = self._worker.ask("prepare", batch=batch, inputs=path)
        self._prepared.add(batch)
        return float(answer["seconds"]), answer["peak_memory"]

    def sample(self, batch: int, count: int, untimed: int) -> Visit:
        """Time it; raises CellFailure."""
        self.session(batch)
        with self._failures():
            if batch not in self._prepared:
                self._prepare(batch)
            assert self._worker is not None
            answer = self._worker.ask("sample", batch=batch, count=count, untimed=untimed)
        return Visit(tuple(answer["samples"]), float(answer["wall"]), tuple(answer["device"]))

    def last(self, batch: int) -> Array:
        """What the last timed run gave; raises CellFailure."""
        with self._failures():
            return self.session(batch).last(batch)

    def places(self, images: LabelledImages) -> TopClasses:
        """The classes it puts first; raises CellFailure."""
        first = self.facts.batch.min if self.facts and self.facts.batch else 1
        with self._failures():
            return top_classes(Predictor(self.lane.target.bundle, self.session(first)), images)

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except WorkerFailure as error:
            if error.fatal:
                self.close()
            raise CellFailure(str(error)) from error
        except VitdeployError as error:
            raise CellFailure(error.message) from error

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.close()
        if self._session is not None:
            self._session.close()
        self._worker = self._session = None
        self._prepared.clear()


@dataclass
class CellRun:
    """A cell while it is measured."""

    lane: LaneRun
    batch: int
    timing: Timing = field(init=False)
    parity: Parity | None = None
    peak: tuple[int | None, int | None] = (None, None)

    def __post_init__(self) -> None:
        self.timing = Timing(lambda count, untimed: self.lane.sample(self.batch, count, untimed))

    @property
    def right(self) -> bool:
        """Measured, with outputs within tolerance."""
        return not self.timing.failure and self.parity is not None and self.parity.passed

    def prove(self) -> None:
        """Fill in parity and memory, or the failure."""
        try:
            self.parity = self.lane.prove(self.batch)
            self.peak = self.lane.prepare(self.batch)
        except CellFailure as error:
            self.timing.failure = str(error)

    def check_last(self) -> None:
        """What was timed must be what was proven: hold the last timed run against the reference."""
        if not self.right or self.parity is None:
            return
        golden = self.lane.lane.target.golden["reference"]
        try:
            outputs = self.lane.last(self.batch)
        except CellFailure as error:
            self.timing.failure = str(error)
            return
        expected = golden[np.arange(self.batch) % len(golden)]
        distance = _relative(outputs, expected)
        # One batch in other company than the proof's: rounding may differ, the answer may not.
        if not distance <= 2 * TOLERANCES[self.lane.lane.precision].relative:
            failure = f"the timed runs give other outputs than the proven ones: relative error {distance:.2g}"
            self.parity = self.parity.model_copy(update={"passed": False, "failures": (failure,)})


def _relative(outputs: Array, expected: Array) -> float:
    if outputs.shape != expected.shape or not np.isfinite(outputs).all():
        return float("inf")
    rows = len(expected), -1
    difference = np.linalg.norm((outputs - expected).reshape(rows), axis=1)
    return float((difference / np.linalg.norm(expected.reshape(rows), axis=1)).max())
