"""What ``vitdeploy optimize`` chooses for the real model and for the digits model, and whether it is right.

Every contest is measured twice: what was chosen by the first measurement of the finalists is to be the
fastest verified one by the second. A part of ``benchmarks.quantisation``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real_model import REAL, build
from vitdeploy.benchmark.results import Results
from vitdeploy.benchmark.run import BenchPlan, run_plan
from vitdeploy.data import digits_folder
from vitdeploy.exporter.request import ExportRequest
from vitdeploy.optimiser.decision import QUANTISED_GAIN, cost, label
from vitdeploy.optimiser.record import Tried
from vitdeploy.optimiser.run import Aim, run_optimise
from vitdeploy.progress import Progress

REAL_MODEL, DIGITS = "DINOv2-S/14", "digits"
BUDGET = 60.0
"""Seconds of measuring for a contest; the finalists have most of it once more."""
LEVEL = 1.05
"""What was chosen takes at most so many times as long as the fastest when it is measured again."""


@dataclass
class Twice:
    """Measures as ``run_plan`` does, and whatever is compared with one another once more."""

    again: Results | None = None

    def __call__(self, plan: BenchPlan, *, progress: Progress | None = None) -> Results:
        results = run_plan(plan, progress=progress)
        if len({(case.backend, case.artifact) for case in plan.cases}) > 1:  # of a first look, it is one
            self.again = run_plan(plan, progress=progress)
        return results


def contests() -> Iterator[dict[str, Any]]:
    """One entry for each model: what was tried, with the chosen one first, and the finalists once more."""
    models: Mapping[str, tuple[str | Path, Path]] = {
        REAL_MODEL: (build() / "dinov2s-crops", REAL / "calibration"),
        DIGITS: ("digits", digits_folder() / "images"),
    }
    for name, (model, calibration) in models.items():
        request = ExportRequest(model, precisions=("fp32", "int8"), calibration=calibration)
        clock = Twice()
        with tempfile.TemporaryDirectory() as folder:
            found = run_optimise(request, Aim(budget=BUDGET), Path(folder, "best.bundle"), measure=clock)
        again = [] if clock.again is None else [cell for cell in clock.again.cells if cell.valid]
        yield {
            "model": name,
            "batch": found.record.batch,
            "tried": [_entry(tried) for tried in found.record.tried],
            "again": {label(cell): round(cost(cell), 4) for cell in again},
        }


def _entry(tried: Tried) -> dict[str, Any]:
    shown = tried.model_dump(include={"precision", "backend", "p50_ms", "verdict", "why"})
    return {"label": tried.label, **shown}


def broken(contests: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What of our claims does not hold of contests that were held; one line each."""
    for contest in contests:
        chosen, name, again = contest["tried"][0], contest["model"], contest["again"]
        if name == REAL_MODEL and chosen["precision"] != "int8":
            yield f"optimize, {name}: chose {chosen['label']} instead of int8"
        if name == DIGITS:
            verdicts = {
                (one["verdict"], f"the {QUANTISED_GAIN:g}x that int8 must bring" in one["why"])
                for one in contest["tried"]
                if (one["precision"], one["backend"]) == ("int8", "openvino")
                if "first look" not in one["why"]
            }
            if verdicts != {("refused", True)}:
                yield f"optimize, {name}: int8 on OpenVINO is not refused for what it gains"
        if chosen["label"] not in again:
            yield f"optimize, {name}: {chosen['label']} was wrong when it was measured again"
        elif again[chosen["label"]] > LEVEL * again[fastest := _worth_it(contest)]:
            yield f"optimize, {name}: chose {chosen['label']}, and measured again {fastest} is the fastest"


def _worth_it(contest: Mapping[str, Any]) -> str:
    """The fastest of the second measurement; of 8 bits only what gains enough."""
    again: Mapping[str, float] = contest["again"]
    precisions = {one["label"]: one["precision"] for one in contest["tried"]}
    floats = [name for name in again if precisions[name] not in ("int8", "fp8")]
    best = min(floats, key=lambda name: again[name])
    quick = [name for name in again if name not in floats and again[best] / again[name] >= QUANTISED_GAIN]
    return min([best, *quick], key=lambda name: again[name])


def unmeasured(contests: Sequence[Mapping[str, Any]]) -> list[str]:
    """Contests that were not held; one line each."""
    held = {contest["model"] for contest in contests}
    return [f"optimize, {name}" for name in (REAL_MODEL, DIGITS) if name not in held]


def table(contests: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What was chosen, and what became of int8, as it stands in the document."""
    yield "What `vitdeploy optimize` says of it, at batch 1 and without labelled images:"
    yield ""
    yield "| model | chosen | measured again | int8 |"
    yield "|---|---|---|---|"
    for contest in contests:
        chosen, again = contest["tried"][0], contest["again"]
        small = [one for one in contest["tried"] if one["precision"] == "int8"]
        said = "; ".join(
            f"{one['label']}: {one['verdict']}, {one['why']}"
            for one in small
            if one is not chosen and "first look" not in one["why"]
        )
        slower = sorted(again, key=lambda name: again[name])
        times = ", ".join(f"{name} {again[name]:.2f} ms" for name in slower[:3])
        yield f"| {contest['model']} | {chosen['label']}: {chosen['why']} | {times} | {said or 'chosen'} |"
