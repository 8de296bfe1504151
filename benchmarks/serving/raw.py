"""The session without a server: what serving is held against.

Alone in a process it runs batch after batch of one size; or, for image files, batches that a pool decodes
beside it, as a server's does. What a server adds is the network, the protocol, and putting batches together.

    python -m benchmarks.serving.raw        # the second of the two, as a process of vitdeploy.benchmark.loop
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.subjects import Subject
from vitdeploy.backends.base import Options
from vitdeploy.benchmark.backend_process import job_of
from vitdeploy.benchmark.loop import Array, Caller, LoadedModel, run_process
from vitdeploy.machine.child import Worker, child_environment

_LIMIT = 300.0
_LEAST = 3
"""Runs of a batch size in a visit."""


class Raw:
    """A session in a process of its own."""

    def __init__(self, worker: Worker, subject: Subject, folder: Path) -> None:
        self._worker, self._subject, self._folder = worker, subject, folder
        self._each: dict[int, float] = {}

    def visit(self, sizes: Sequence[int], seconds: float) -> dict[int, float]:
        """Mean seconds of a run at each batch size, in so many seconds altogether."""
        found = {}
        self.prepare(sizes)
        for size in sizes:
            count = max(_LEAST, round(seconds / len(sizes) / self._each[size]))
            samples = self._worker.ask("sample", batch=size, count=count, untimed=1)["samples"]
            found[size] = sum(samples) / len(samples)
        return found

    def prepare(self, sizes: Sequence[int]) -> None:
        """Have the batches ready, and find out how long each takes, roughly."""
        for size in sizes:
            if size not in self._each:
                self._prepare(size)

    def _prepare(self, size: int) -> None:
        path = self._folder / f"raw-{size}.npy"
        pixels = self._subject.pixels
        np.save(path, np.ascontiguousarray(pixels[np.arange(size) % len(pixels)]))
        self._worker.ask("prepare", batch=size, inputs=str(path))
        self._each[size] = self._worker.ask("sample", batch=size, count=1, untimed=0)["wall"]


@contextlib.contextmanager
def raw_session(subject: Subject, kind: str, threads: int, folder: Path) -> Iterator[Raw]:
    """The session alone for tensors, with a decoding pool beside it for images.

    Raises:
        WorkerFailure: its process fails.
    """
    (artifact,) = subject.bundle.manifest.artifacts
    job = job_of(subject.bundle, "onnxruntime", artifact.name, Options(threads=threads), concurrency=1)
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
        yield Raw(worker, subject, folder)
    finally:
        worker.close()


def run_seconds(size: int, seconds: Mapping[int, float]) -> float:
    """Seconds of a run at a batch size, from those of some sizes.

    Between them it is interpolated; below the smallest it is in proportion, as on a CPU.
    """
    sizes = sorted(seconds)
    return float(np.interp(size, [0, *sizes], [0.0, *(seconds[known] for known in sizes)]))


def per_second(batches: Mapping[int, int], seconds: Mapping[int, float]) -> float:
    """Images per second of a session that runs these batches one after the other.

    Args:
        batches: how many of each size.
        seconds: of a run at some sizes.
    """
    total = sum(count * run_seconds(size, seconds) for size, count in batches.items())
    return sum(size * count for size, count in batches.items()) / total


def load(job: dict[str, Any]) -> LoadedModel:
    """Open a session and keep a pool decoding for it; a batch's pixels only say how many images it has."""
    import vitdeploy

    predictor = vitdeploy.load(job["bundle"], backend=job["backend"], threads=job["threads"])
    files = itertools.cycle([Path(path).read_bytes() for path in job["images"]])
    pool = ThreadPoolExecutor(os.cpu_count())
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

    callers: list[Caller] = [call]
    return LoadedModel(callers, {})


if __name__ == "__main__":
    run_process(load)
