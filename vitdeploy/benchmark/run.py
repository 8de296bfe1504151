"""A whole measurement: start every case, prove every cell, time them together, say what came out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from vitdeploy.benchmark.cases import (
    DEFAULT_BATCHES,
    BenchTarget,
    Case,
    Choices,
    cases_of,
    open_targets,
    serves,
)
from vitdeploy.benchmark.cells import CaseRun, CellRun, ControlRun, TimeLimits, control_work
from vitdeploy.benchmark.disturbances import CounterReader, Counters
from vitdeploy.benchmark.environment import find_environment
from vitdeploy.benchmark.results import (
    BenchSettings,
    Cell,
    CellAccuracy,
    ControlSamples,
    Results,
    SkippedCase,
)
from vitdeploy.benchmark.rounds import CellFailure, Runner, Timing
from vitdeploy.bundle.folder import Bundle
from vitdeploy.errors import UsageError
from vitdeploy.machine.temporary import temporary_folder
from vitdeploy.progress import Progress
from vitdeploy.verification.accuracy import (
    LabelledImages,
    bundled_images,
    compare_accuracy,
    find_labelled,
    reference_top_classes,
)

_BAR = 20
"""Characters of the progress bar."""


@dataclass(frozen=True)
class BenchPlan:
    """What is measured, and for how long."""

    cases: Sequence[Case]
    batches: Sequence[int]
    budget: float = 60.0
    """Seconds of warming up and measuring; loading and proving come before."""
    seed: int = 0
    skipped: Sequence[SkippedCase] = ()
    command: str = ""
    limits: TimeLimits = field(default_factory=TimeLimits)
    images: Mapping[str, LabelledImages] = field(default_factory=dict)
    """By the targets' names: what accuracy is measured on."""


def run_bench(
    bundles: str | os.PathLike[str] | Bundle | Sequence[str | os.PathLike[str] | Bundle],
    choices: Choices | None = None,
    *,
    data: str | os.PathLike[str] | None = None,
    budget: float = 60.0,
    seed: int = 0,
    command: str = "vitdeploy.bench",
    progress: Progress | None = None,
) -> Results:
    """Measure bundles; ``vitdeploy.bench`` documents the arguments and the errors."""
    choices = choices or Choices()
    temporary_folder()  # the cells' processes need one: before anything is proven
    many = [bundles] if isinstance(bundles, str | os.PathLike | Bundle) else bundles
    opened = [b if isinstance(b, Bundle) else Bundle.open(Path(b)) for b in many]
    targets = open_targets(opened, choices.image_sizes)
    labelled = {target.name: _images(target, data) for target in targets}
    cases: list[Case] = []
    skipped: list[SkippedCase] = []
    for target in targets:
        of_target, missing = cases_of(target, choices)
        cases, skipped = cases + of_target, skipped + missing
    batches = choices.batches or DEFAULT_BATCHES
    if not any(serves(case, size) for case in cases for size in batches):
        why = "; ".join(f"{s.artifact} on {s.backend}: {s.reason}" for s in skipped)
        sizes = ", ".join(map(str, batches))
        raise UsageError(f"nothing to measure: no artifact serves a batch of {sizes} here", hint=why or None)
    images = {name: found for name, found in labelled.items() if found is not None}
    progress = progress or Progress()
    for unread in dict.fromkeys(found.unread for found in images.values() if found.unread):
        progress.note(unread)
    plan = BenchPlan(cases, batches, budget, seed, skipped, command, images=images)
    return run_plan(plan, progress=progress)


def _images(target: BenchTarget, data: str | os.PathLike[str] | None) -> LabelledImages | None:
    manifest = target.bundle.manifest
    return bundled_images(manifest) if data is None else find_labelled(Path(data), manifest)


def run_plan(
    plan: BenchPlan, *, progress: Progress | None = None, counters: Callable[[], Counters] | None = None
) -> Results:
    """Measure; Ctrl-C ends it early, and what was measured is returned, marked partial."""
    progress = progress or Progress()
    environment = find_environment(Path.cwd(), {case.backend for case in plan.cases})
    reader = CounterReader()
    runs = [CaseRun(case, plan.limits) for case in plan.cases]
    cells = [CellRun(run, b) for run in runs for b in sorted(set(plan.batches)) if serves(run.case, b)]
    control: ControlRun | None = None

    def read_counters() -> Counters:
        ours = [pid for run in runs for pid in run.pids]
        return reader.read([*ours, *(control.pids if control else ())])

    runner = Runner(plan.budget, plan.seed, counters or read_counters, environment.cpu.threads)
    partial, notes = False, list[str]()
    progress.note(
        f"{len(cells)} cell{'s' * (len(cells) != 1)} to prove first; the budget of {plan.budget:g} s begins "
        "behind that"
    )
    try:
        _check_parity(runs, cells, progress)
        with control_work() as control:
            _time(runner, cells, control, progress)
        for cell in cells:
            cell.check_last()
        targets = {id(run.case.target): run.case.target for run in runs}.values()
        notes = [note for target in targets for note in _score(target, runs, cells, plan, progress)]
    except KeyboardInterrupt:
        partial = True
    finally:
        for run in runs:
            run.close()
    return Results(
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=plan.command,
        environment=environment,
        settings=_settings(plan),
        subjects=tuple({id(case.target): case.target.record for case in plan.cases}.values()),
        rounds=runner.rounds,
        partial=partial,
        cells=tuple(_cell(cell, runner.processors) for cell in cells),
        metronome=_control_samples(control, runner.processors),
        skipped=(*plan.skipped, *_unserved(plan)),
        notes=tuple(notes),
    )


def _check_parity(runs: Sequence[CaseRun], cells: Sequence[CellRun], progress: Progress) -> None:
    """Start the cases one after the other, so that none slows another's start, and prove their cells."""
    for run in runs:
        with progress.stage(f"prove {run.case.backend}") as stage:
            of_run = [cell for cell in cells if cell.run is run]
            for cell in of_run:
                cell.prove()
            failed = [cell.timing.failure for cell in of_run if cell.timing.failure]
            wrong = [cell for cell in of_run if cell.parity and not cell.parity.passed]
            stage.detail = run.case.artifact
            if failed:
                stage.detail += f", FAILED: {failed[0]}"
            if wrong:
                stage.detail += f", WRONG at batch {', '.join(str(cell.batch) for cell in wrong)}"


def _time(runner: Runner, cells: Sequence[CellRun], control: ControlRun, progress: Progress) -> None:
    with progress.stage("measure") as stage:

        def report(phase: str, share: float) -> None:
            full = round(_BAR * share)
            stage.detail = f"{'━' * full}{'╌' * (_BAR - full)} {share:4.0%}  {phase}"
            progress.updated(stage)

        runner.report = report
        timings = [cell.timing for cell in cells if not cell.timing.failure]
        if timings:
            runner.measure([*timings, *([] if control.timing.failure else [control.timing])])
        stage.detail = f"{len(timings)} cells, {runner.rounds} rounds"


def _score(
    target: BenchTarget,
    runs: Sequence[CaseRun],
    cells: Sequence[CellRun],
    plan: BenchPlan,
    progress: Progress,
) -> list[str]:
    """Accuracy of the cases of a target that gave right outputs, beside the float64 reference's."""
    right = [
        run
        for run in runs
        if run.case.target is target and any(cell.right for cell in cells if cell.run is run)
    ]
    images, name, notes = plan.images.get(target.name), target.name, list[str]()
    if not right or images is None:
        return []
    with progress.stage("accuracy") as stage:
        reference = reference_top_classes(target.bundle, images)
        if reference is None:
            return [
                f"{name}: no accuracy, because the float64 reference needs PyTorch and the model's weights"
            ]
        for run in right:
            try:
                found = compare_accuracy(run.places(images), reference, images.labels)
                run.accuracy = CellAccuracy.model_validate(asdict(found))
            except CellFailure as error:
                notes.append(f"{run.case.name}: no accuracy: {error}")
        stage.detail = f"{name}, {len(images.labels)} images"
    return notes


def _control_samples(control: ControlRun | None, processors: int) -> ControlSamples | None:
    if control is None or control.timing.failure or not control.timing.measurement.rounds:
        return None
    measurement = control.timing.measurement
    if measurement.disturbances(processors):
        return None
    return ControlSamples(
        p50_ms=_ms(float(np.median(measurement.samples))),
        samples_ms=tuple(_ms(sample) for sample in measurement.samples),
        round_samples=len(measurement.rounds[0].samples),
    )


def _settings(plan: BenchPlan) -> BenchSettings:
    return BenchSettings(
        budget_s=plan.budget,
        seed=plan.seed,
        batches=tuple(plan.batches),
        threads=tuple(dict.fromkeys(case.threads for case in plan.cases)),
        concurrency=tuple(dict.fromkeys(case.concurrency for case in plan.cases)),
        spin=tuple(dict.fromkeys(case.spin for case in plan.cases)),
    )


def _unserved(plan: BenchPlan) -> list[SkippedCase]:
    skipped = []
    for case in plan.cases:
        sizes = [str(size) for size in plan.batches if not serves(case, size)]
        if sizes and case.batch:
            reason = f"batch {', '.join(sizes)}: it serves {case.batch.min} to {case.batch.max}"
            name = case.target.name
            skipped.append(
                SkippedCase(subject=name, backend=case.backend, artifact=case.artifact, reason=reason)
            )
    return list(dict.fromkeys(skipped))


def _cell(cell: CellRun, processors: int) -> Cell:
    """The cell's record."""
    run, case, timing = cell.run, cell.run.case, cell.timing
    facts = run.facts
    failure = timing.failure or ("" if timing.measurement.rounds else "interrupted before it was measured")
    return Cell(
        subject=case.target.name,
        backend=case.backend,
        provider=facts.provider if facts else case.provider,
        artifact=case.artifact,
        precision=case.precision,
        executes=facts.executes if facts else case.precision,
        batch=cell.batch,
        image_size=case.target.record.image_size,
        threads=case.threads,
        concurrency=case.concurrency,
        spin=case.spin,
        status="failed" if failure else "ok",
        reason=failure,
        **({} if failure else _numbers(timing, cell.batch, case.concurrency)),
        disturbed=() if failure else tuple(timing.measurement.disturbances(processors)),
        repeats=timing.repeats,
        parity=cell.parity,
        accuracy=run.accuracy if cell.right else None,
        startup=run.startup,
        peak_memory_bytes=cell.peak[0],
        peak_device_bytes=cell.peak[1],
        size_bytes=case.size_bytes,
    )


def _numbers(timing: Timing, batch: int, concurrency: int) -> dict[str, object]:
    rounds, samples = timing.measurement.rounds, timing.measurement.samples
    device = [seconds for one in rounds for seconds in one.device]
    p50, p90, p99 = (float(value) for value in np.percentile(samples, (50, 90, 99)))
    rates = [len(one.samples) * batch / one.wall for one in rounds]
    return {
        "p50_ms": _ms(p50),
        "p90_ms": _ms(p90),
        "p99_ms": _ms(p99),
        "mean_ms": _ms(float(np.mean(samples))),
        "spread": round(timing.measurement.spread(), 4),
        "images_per_s": round(batch / p50 if concurrency == 1 else float(np.median(rates)), 2),
        "samples_ms": tuple(_ms(sample) for sample in samples),
        "round_samples": len(rounds[0].samples),
        "device_p50_ms": _ms(float(np.median(device))) if device else None,
        "device_samples_ms": tuple(_ms(seconds) for seconds in device),
    }


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 4)
