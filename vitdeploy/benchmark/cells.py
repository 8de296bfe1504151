"""Cases, cells and the control work while they are measured: started, compared, timed, started again."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from vitdeploy.backends.base import Array, Session, SessionFacts
from vitdeploy.benchmark.cases import Case
from vitdeploy.benchmark.disturbances import device_memory
from vitdeploy.benchmark.results import CellAccuracy, Parity, Startup
from vitdeploy.benchmark.rounds import CellFailure, RoundSamples, Timing
from vitdeploy.bundle.golden import reference_of
from vitdeploy.bundle.manifest import TensorSpec
from vitdeploy.bundle.proofs import ParityRecord
from vitdeploy.errors import VitdeployError
from vitdeploy.machine.child import Worker, WorkerFailure, child_environment
from vitdeploy.machine.processors import processors
from vitdeploy.predictor import Predictor
from vitdeploy.verification.accuracy import LabelledImages, TopClasses, top_classes
from vitdeploy.verification.parity import TOLERANCES, check_session

_FACTS = TypeAdapter(SessionFacts)
_CONTROL_LIMIT = 60.0
"""Seconds for an answer of the control work's process."""


@dataclass(frozen=True)
class TimeLimits:
    """Seconds that a process may take to answer, before it counts as hung."""

    load: float = 1800.0
    """A compiler's work included."""
    run: float = 600.0
    """A batch, or the first run of one, which may compile."""


class RemoteSession(Session):
    """The session in a case's process: inputs and outputs travel through files."""

    def __init__(self, facts: SessionFacts, worker: Worker, limit: float) -> None:
        super().__init__(facts)
        self._worker, self._limit = worker, limit
        self._folder = tempfile.TemporaryDirectory(prefix="vitdeploy-bench-")

    def file(self, array: Array) -> str:
        """Write an array for the other side."""
        path = Path(self._folder.name, "inputs.npy")
        np.save(path, array)
        return str(path)

    def last(self, batch: int) -> dict[str, Array]:
        """What the last timed run of a batch size gave."""
        path = Path(self._folder.name, "outputs.npz")
        self._worker.ask("last", batch=batch, outputs=str(path))
        return self._outputs(path)

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        path = Path(self._folder.name, "outputs.npz")
        pixels = inputs[self.facts.inputs[0].name]
        self._worker.ask("run", limit=self._limit, inputs=self.file(pixels), outputs=str(path))
        return self._outputs(path)

    def _outputs(self, path: Path) -> dict[str, Array]:
        with np.load(path) as arrays:
            return {spec.name: arrays[key] for spec, key in zip(self.facts.outputs, arrays, strict=True)}

    def _close(self) -> None:
        self._worker.close()
        self._folder.cleanup()


def facts_of(case: Case, said: Mapping[str, Any]) -> SessionFacts:
    """A session's facts from what its process says of it; another tool's need not say everything."""
    manifest = case.target.bundle.manifest
    pixels, reference = case.target.pixels, case.target.golden["reference"]
    inputs = TensorSpec.model_validate(
        {"name": "pixel_values", "dtype": pixels.dtype.name, "shape": ("N", *pixels.shape[1:])}
    )
    outputs = TensorSpec(name=manifest.output, dtype="float32", shape=("N", *reference.shape[1:]))
    defaults: dict[str, Any] = {
        "backend": case.backend,
        "artifact": case.artifact,
        "precision": case.precision,
        "executes": case.precision,
        "device": "cpu",
        "provider": case.provider or "cpu",
        "batch": None,
        "inputs": (inputs,),
        "outputs": (outputs,),
        "versions": {},
    }
    return _FACTS.validate_python({**defaults, **said})


class CaseRun:
    """A case while it is measured; its process is started again where it died."""

    def __init__(self, case: Case, limits: TimeLimits) -> None:
        self.case, self._limits = case, limits
        self.facts: SessionFacts | None = None
        self.startup: Startup | None = None
        self.accuracy: CellAccuracy | None = None
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
            self._worker = self.case.start(self._limits.run)
            said = self._worker.answer(self._limits.load)
            self.facts = facts_of(self.case, said["facts"])
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
        """Hold every output against the float64 reference at a batch size; the numbers are the worst one's.

        Raises:
            CellFailure: it fails.
        """
        target, session = self.case.target, self.session(batch)
        with self._failures():
            bound = target.bundle.manifest.max_abs
            records = check_session(session, self.case.golden, batches=[batch], max_abs=bound)
        worst = max(records, key=_badness)
        return Parity(
            passed=all(record.passed for record in records),
            failures=tuple(
                f"{record.output}: {reason}" if record.output else reason
                for record in records
                for reason in record.failures
            ),
            output=worst.output,
            relative=worst.metrics.relative,
            max_abs=worst.metrics.max_abs,
            tolerance=worst.tolerance.relative,
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
        path = self._session.file(self.case.inputs(batch))
        answer = self._worker.ask("prepare", batch=batch, inputs=path)
        self._prepared.add(batch)
        return float(answer["seconds"]), answer["peak_memory"]

    def sample(self, batch: int, count: int, untimed: int) -> RoundSamples:
        """Time it; raises CellFailure."""
        self.session(batch)
        with self._failures():
            if batch not in self._prepared:
                self._prepare(batch)
            assert self._worker is not None
            answer = self._worker.ask("sample", batch=batch, count=count, untimed=untimed)
        return RoundSamples(tuple(answer["samples"]), float(answer["wall"]), tuple(answer["device"]))

    def last(self, batch: int) -> dict[str, Array]:
        """What the last timed run gave; raises CellFailure."""
        with self._failures():
            return self.session(batch).last(batch)

    def places(self, images: LabelledImages) -> TopClasses:
        """The classes it puts first; raises CellFailure."""
        first = self.facts.batch.min if self.facts and self.facts.batch else 1
        with self._failures():
            return top_classes(Predictor(self.case.target.bundle, self.session(first)), images)

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

    run: CaseRun
    batch: int
    timing: Timing = field(init=False)
    parity: Parity | None = None
    peak: tuple[int | None, int | None] = (None, None)

    def __post_init__(self) -> None:
        self.timing = Timing(lambda count, untimed: self.run.sample(self.batch, count, untimed))

    @property
    def right(self) -> bool:
        """Measured, with outputs within tolerance."""
        return not self.timing.failure and self.parity is not None and self.parity.passed

    def prove(self) -> None:
        """Fill in parity and memory, or the failure."""
        try:
            self.parity = self.run.prove(self.batch)
            self.peak = self.run.prepare(self.batch)
        except CellFailure as error:
            self.timing.failure = str(error)

    def check_last(self) -> None:
        """What was timed must be what had parity: hold the last timed run against the reference."""
        if not self.right or self.parity is None:
            return
        golden = self.run.case.golden
        try:
            outputs = self.run.last(self.batch)
        except CellFailure as error:
            self.timing.failure = str(error)
            return
        rows = np.arange(self.batch) % len(golden["pixel_values"])
        distance = max(_relative(array, reference_of(golden, name)[rows]) for name, array in outputs.items())
        # One batch in other company than the proof's: rounding may differ, the answer may not.
        if not distance <= 2 * TOLERANCES[self.run.case.precision].relative:
            failure = f"the timed runs give other outputs than the first ones: relative error {distance:.2g}"
            self.parity = self.parity.model_copy(update={"passed": False, "failures": (failure,)})


@dataclass
class ControlRun:
    """Its process, and its times; ``metronome`` in the results."""

    timing: Timing
    pids: list[int]


@contextlib.contextmanager
def control_work() -> Iterator[ControlRun]:
    """Run it on every processor that is ours; where it does not come up, it fails as a cell does."""
    callers = processors()
    # One thread of work per caller: a pool's threads would spin into the next cell's time.
    single = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = (sys.executable, "-P", "-m", "vitdeploy.benchmark.control")
    worker = Worker(command, {"callers": callers}, {**child_environment(), **single}, _CONTROL_LIMIT)

    def probe(count: int, untimed: int) -> RoundSamples:
        try:
            answer = worker.ask("sample", batch=1, count=count, untimed=untimed)
        except WorkerFailure as error:
            raise CellFailure(str(error)) from error
        return RoundSamples(tuple(answer["samples"]), float(answer["wall"]))

    timing = Timing(probe)
    try:
        with tempfile.TemporaryDirectory(prefix="vitdeploy-bench-") as folder:
            nothing = Path(folder, "nothing.npy")
            np.save(nothing, np.zeros(1, np.float32))
            try:
                worker.answer()
                worker.ask("prepare", batch=1, inputs=str(nothing))
            except WorkerFailure as error:
                timing.failure = str(error)
        yield ControlRun(timing, [worker.pid])
    finally:
        worker.close()


def _badness(record: ParityRecord) -> tuple[bool, float]:
    """Orders records: failed ones are worse than all that passed, what is not finite is worst."""
    relative = record.metrics.relative
    return not record.passed, float("inf") if relative is None else relative


def _relative(outputs: Array, expected: Array) -> float:
    if outputs.shape != expected.shape or not np.isfinite(outputs).all():
        return float("inf")
    rows = len(expected), -1
    difference = np.linalg.norm((outputs - expected).reshape(rows), axis=1)
    return float((difference / np.linalg.norm(expected.reshape(rows), axis=1)).max())
