"""Compiles candidates ahead of a tuner in processes of their own; Triton's cache brings it the binaries."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from types import TracebackType
from typing import Any

import torch

from vitdeploy_kernels.config import Config, Table
from vitdeploy_kernels.launch import Launch
from vitdeploy_kernels.plans import Shape, launches
from vitdeploy_kernels.problems import build
from vitdeploy_kernels.specs import Spec
from vitdeploy_kernels.support import interpreted

META = torch.device("meta")


class Warmer:
    """Compiles what it is told in the background, each distinct binary once.

    What does not compile is no error here: whoever launches it finds out.
    """

    def __init__(self, dtype: torch.dtype, processes: int) -> None:
        self._dtype = dtype
        # Spawned: a forked process could not use the GPU.
        self._pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
        self._known: dict[object, Future[None]] = {}
        self._needed: dict[Spec, list[Future[None]]] = {}

    def submit(self, wanted: Mapping[Spec, Sequence[Config]]) -> None:
        """Compile these in this order."""
        for spec, configs in wanted.items():
            problem = build(spec, self._dtype, META)
            self._needed[spec] = []
            for config in configs:
                key = binary(problem.launch(config))
                if key not in self._known:
                    self._known[key] = self._pool.submit(compile_one, spec, self._dtype, config)
                self._needed[spec].append(self._known[key])

    def submit_plan(self, shape: Shape, batch: int, table: Table) -> None:
        """Compile what a model's plan launches; :meth:`finish` waits for it."""
        for place, (_, launch) in enumerate(launches(shape, self._dtype, batch, table)):
            key = binary(launch)
            if key not in self._known:
                job = self._pool.submit(compile_plan, shape, self._dtype, batch, table, place)
                self._known[key] = job

    @property
    def count(self) -> int:
        """Distinct binaries that it was told of."""
        return len(self._known)

    def finish(self, seconds: float) -> int:
        """Wait for everything, not longer than this; how many are not done then."""
        return len(wait(self._known.values(), timeout=max(seconds, 0.0)).not_done)

    def ready(self, spec: Spec, seconds: float) -> None:
        """Wait for what a spec needs, not longer than this."""
        wait(self._needed.get(spec, ()), timeout=max(seconds, 0.0))

    def __enter__(self) -> Warmer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def binary(launch: Launch) -> object:
    """What tells the binaries of launches apart; row counts do not, one binary serves every batch."""
    return launch.name, tuple(launch.constants.items()), launch.warps, launch.stages


def compile_one(spec: Spec, dtype: torch.dtype, config: Config) -> None:
    """Compile one candidate for the GPU of this machine, without running it."""
    warm(build(spec, dtype, META).launch(config))


def compile_plan(shape: Shape, dtype: torch.dtype, batch: int, table: Table, place: int) -> None:
    """Compile one launch of a model's plan, as :func:`compile_one` does."""
    warm(launches(shape, dtype, batch, table)[place][1])


def warm(launch: Launch) -> None:
    """Compile a launch, whose tensors may be meta tensors, and the stub that Python launches it through.

    Triton builds the stub with a C compiler when ``run`` is read first, and keeps it on disk like the binary:
    left out here, stubs would be built one after the other in the process that measures. The interpreter has
    nothing to compile.
    """
    if interpreted():
        return
    warmup: Callable[..., Any] = launch.kernel.warmup
    with contextlib.redirect_stdout(None):  # Triton prints a failing kernel's whole assembly
        compiled = warmup(grid=launch.grid, **launch.arguments, **launch.constants, **launch.options)
        _ = compiled.run
