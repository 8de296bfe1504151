"""The session without a server: what serving is held against.

A plan is so many sessions, each with so many threads, which run batch after batch of one size at the same
time, in a process that does nothing else; for image files, batches that a pool decodes beside them, as a
server's does. What a server adds is the network, the protocol, and putting batches together.

    python -m benchmarks.serving.raw        # the second of the two, as a process of vitdeploy.benchmark.loop
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.subjects import Subject
from vitdeploy.backends.base import Options
from vitdeploy.benchmark.backend_process import job_of
from vitdeploy.benchmark.loop import Array, Caller, LoadedModel, run_process
from vitdeploy.machine.child import Worker, child_environment

_LIMIT = 300.0
_LEAST = 2
"""Runs of a batch size in a visit."""


@dataclass(frozen=True)
class Sessions:
    """So many sessions at once, each with so many threads."""

    count: int
    threads: int

    @property
    def name(self) -> str:
        return f"{self.count} x {self.threads}"


def plans(threads: int) -> tuple[Sessions, ...]:
    """One session that has all the threads, and as many as there are threads."""
    return tuple(dict.fromkeys((Sessions(1, threads), Sessions(threads, 1))))


@dataclass(frozen=True)
class Visit:
    """What a visit found."""

    per_s: float
    """Images, of all sessions together."""
    seconds: float
    """Of a run, on average, while the other sessions run, too."""


class Raw:
    """The sessions of a plan, in a process of their own."""

    def __init__(self, sessions: Sessions, worker: Worker, subject: Subject, folder: Path) -> None:
        self.sessions = sessions
        self._worker, self._subject, self._folder = worker, subject, folder
        self._each: dict[int, float] = {}

    def visit(self, size: int, seconds: float) -> Visit:
        """Run batches of a size for about so many seconds."""
        self.prepare(size)
        count = max(_LEAST, round(seconds / self._each[size]))
        answer = self._worker.ask("sample", batch=size, count=count, untimed=1)
        samples = answer["samples"]
        return Visit(len(samples) * size / answer["wall"], sum(samples) / len(samples))

    def prepare(self, size: int) -> None:
        """Have a batch ready, and find out how long it takes, roughly."""
        if size in self._each:
            return
        path = self._folder / f"raw-{size}.npy"
        pixels = self._subject.pixels
        np.save(path, np.ascontiguousarray(pixels[np.arange(size) % len(pixels)]))
        self._worker.ask("prepare", batch=size, inputs=str(path))
        self._each[size] = self._worker.ask("sample", batch=size, count=1, untimed=0)["wall"]


@contextlib.contextmanager
def raw_sessions(subject: Subject, kind: str, sessions: Sessions, folder: Path) -> Iterator[Raw]:
    """The sessions alone for tensors, with a decoding pool beside them for images.

    Raises:
        WorkerFailure: their process fails.
    """
    job = job_of(
        subject.bundle,
        "onnxruntime",
        subject.artifact.name,
        Options(threads=sessions.threads),
        concurrency=sessions.count,
    )
    module = "vitdeploy.benchmark.backend_process"
    if kind == "image":
        module, job["images"] = "benchmarks.serving.raw", []
        for index, data in enumerate(subject.images):
            path = folder / f"raw-{index}.jpg"
            path.write_bytes(data)
            job["images"].append(str(path))
    worker = Worker((sys.executable, "-P", "-m", module), job, child_environment(), _LIMIT)
    try:
        worker.answer()
        yield Raw(sessions, worker, subject, folder)
    finally:
        worker.close()


def run_seconds(size: int, seconds: Mapping[int, float]) -> float:
    """Seconds of a run at a batch size, from those of some sizes.

    Between them it is interpolated; below the smallest and beyond the largest it is in proportion, as on a
    CPU.
    """
    sizes = sorted(seconds)
    if size > sizes[-1]:
        return size * seconds[sizes[-1]] / sizes[-1]
    return float(np.interp(size, [0, *sizes], [0.0, *(seconds[known] for known in sizes)]))


def load(job: dict[str, Any]) -> LoadedModel:
    """Open the sessions and keep a pool decoding for them; of a batch's pixels only their number counts."""
    import vitdeploy

    files = itertools.cycle([Path(path).read_bytes() for path in job["images"]])
    pool = ThreadPoolExecutor(os.cpu_count())

    def caller() -> Caller:
        predictor = vitdeploy.load(job["bundle"], backend=job["backend"], threads=job["threads"])
        ahead: deque[Future[Array]] = deque()
        name, output = predictor.session.facts.inputs[0].name, predictor.session.facts.outputs[0].name

        def call(pixels: Array) -> tuple[Array, float | None]:
            count = len(pixels)
            while len(ahead) < 2 * count:
                ahead.append(pool.submit(predictor.preprocess, next(files)))
            tensors = [ahead.popleft().result() for _ in range(count)]
            # The next batch is decoded while this one runs.
            ahead.extend(pool.submit(predictor.preprocess, next(files)) for _ in range(count))
            return predictor.session.run({name: np.stack(tensors)})[output], None

        return call

    return LoadedModel([caller() for _ in range(job["concurrency"])], {})


if __name__ == "__main__":
    run_process(load)
