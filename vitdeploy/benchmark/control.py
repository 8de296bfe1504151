"""Control work: a fixed piece of it runs in every round, and says how fast the machine itself is meanwhile.

A shared or a hot machine is some per cent slower from one hour to the next, and so is everything on it.
Two measurements are compared after that has been taken out.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitdeploy.benchmark.cases import child_environment
from vitdeploy.benchmark.loop import Array, Caller, LoadedModel, run_process
from vitdeploy.benchmark.rounds import CellFailure, RoundSamples, Timing
from vitdeploy.machine.child import Worker, WorkerFailure

_WIDTH = 384
"""Of the square float32 matrices that are multiplied: what one core's cache holds. Memory stays out of it:
how fast it is depends on which cores a virtual machine happens to have, from minute to minute."""
_LIMIT = 60.0


@dataclass
class ControlRun:
    """Its process, and its times; ``metronome`` in the results."""

    timing: Timing
    pids: list[int]


@contextlib.contextmanager
def control_work() -> Iterator[ControlRun]:
    """Run it on every processor that is ours; where it does not come up, it fails as a cell does."""
    callers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # One thread of work per caller: a pool's threads would spin into the next cell's time.
    single = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = (sys.executable, "-P", "-m", "vitdeploy.benchmark.control")
    worker = Worker(command, {"callers": callers}, {**child_environment(), **single}, _LIMIT)

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


def open_control(job: dict[str, Any]) -> LoadedModel:
    """A caller for each processor."""
    return LoadedModel([_caller(seed) for seed in range(job["callers"])], {})


def _caller(seed: int) -> Caller:
    random = np.random.default_rng(seed)
    a, b = (random.standard_normal((_WIDTH, _WIDTH), np.float32) for _ in range(2))
    product = np.empty_like(a)

    def call(_: Array) -> tuple[Array, float | None]:
        np.matmul(a, b, out=product)
        np.matmul(b, a, out=product)
        return product[:1], None

    return call


if __name__ == "__main__":
    run_process(open_control)
