"""Measurements with a stand-in clock: every case of a plan takes the time that a table says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tests.helpers.sample_results import ENVIRONMENT, cell, sample_results
from vitdeploy.benchmark.cases import Case
from vitdeploy.benchmark.results import Cell, Results
from vitdeploy.benchmark.run import BenchPlan
from vitdeploy.machine.identity import find_cpu
from vitdeploy.progress import Progress

Times = Callable[[Case], float]
"""Milliseconds of a batch."""


class StandInClock:
    """Measures plans as ``run_plan`` does, in no time; remembers them."""

    def __init__(self, times: Times, faults: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """``faults``: what else is said of the cells of a case, by its name."""
        self.times, self.faults = times, faults or {}
        self.plans: list[BenchPlan] = []

    def __call__(self, plan: BenchPlan, *, progress: Progress | None = None) -> Results:
        self.plans.append(plan)
        cpu = find_cpu()
        here = ENVIRONMENT.cpu.model_copy(update={"name": cpu.name, "threads": cpu.threads})
        return sample_results(
            cells=tuple(self._cell(case, plan.batches[0]) for case in plan.cases),
            subjects=(plan.cases[0].target.record,),
            environment=ENVIRONMENT.model_copy(update={"cpu": here}),
        )

    def _cell(self, case: Case, batch: int) -> Cell:
        time = self.times(case)
        given = {
            "subject": case.target.name,
            "backend": case.backend,
            "artifact": case.artifact,
            "precision": case.precision,
            "image_size": case.target.record.image_size,
            "batch": batch,
            "threads": case.threads,
            "concurrency": case.concurrency,
            "spin": case.spin,
            "p50_ms": time,
            "samples_ms": (time,) * 8,
            "round_samples": 1,
        }
        return cell(**{**given, **self.faults.get(case.name, {})})
