"""A whole measurement: start every lane, prove every cell, time them together, say what came out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from vitdeploy.benchmark.cells import CellRun, LaneRun, Limits
from vitdeploy.benchmark.lanes import (
    DEFAULT_BATCHES,
    Choices,
    Lane,
    Target,
    lanes_of,
    open_targets,
    serves,
)
from vitdeploy.benchmark.machine import Moment, Watch, environment
from vitdeploy.benchmark.measure import CellFailure, Counters, Referee, Timing
from vitdeploy.benchmark.metronome import Metronome, metronome
from vitdeploy.benchmark.results import Accuracy, Beat, Cell, Results, Settings, Skipped
from vitdeploy.bundle.folder import Bundle
from vitdeploy.errors import UsageError
from vitdeploy.machine.child import child_environment
from vitdeploy.progress import Progress, Stage
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
class Plan:
    """What is measured, and for how long."""

    lanes: Sequence[Lane]
    batches: Sequence[int]
    budget: float = 60.0
    """Seconds of warming up and measuring; loading and proving come before."""
    seed: int = 0
    skipped: Sequence[Skipped] = ()
    command: str = ""
    limits: Limits = field(default_factory=Limits)
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
    many = [bundles] if isinstance(bundles, str | os.PathLike | Bundle) else bundles
    targets = open_targets([b if isinstance(b, Bundle) else Bundle.open(Path(b)) for b in many])
    labelled = {target.name: _images(target, data) for target in targets}
    lanes: list[Lane] = []
    skipped: list[Skipped] = []
    for target in targets:
        own, missing = lanes_of(target, choices)
        lanes, skipped = lanes + own, skipped + missing
    batches = choices.batches or DEFAULT_BATCHES
    if not any(serves(lane, size) for lane in lanes for size in batches):
        why = "; ".join(f"{s.artifact} on {s.backend}: {s.reason}" for s in skipped)
        sizes = ", ".join(map(str, batches))
        raise UsageError(f"nothing to measure: no artifact serves a batch of {sizes} here", hint=why or None)
    images = {name: found for name, found in labelled.items() if found is not None}
    plan = Plan(lanes, batches, budget, seed, skipped, command, images=images)
    return run_plan(plan, progress=progress)


def _images(target: Target, data: str | os.PathLike[str] | None) -> LabelledImages | None:
    manifest = target.bundle.manifest
    return bundled_images(manifest) if data is None else find_labelled(Path(data), manifest)


def run_plan(plan: Plan, *, progress: Progress | None = None, counters: Counters | None = None) -> Results:
    """Measure; Ctrl-C ends it early, and what was measured is returned, marked partial."""
    progress = progress or Progress()
    machine, watch = environment(Path.cwd()), Watch()
    runs = [LaneRun(lane, plan.limits) for lane in plan.lanes]
    cells = [CellRun(run, b) for run in runs for b in sorted(set(plan.batches)) if serves(run.lane, b)]
    beats: list[Metronome] = []

    def now() -> Moment:
        pids = [run.pids for run in runs] + [beat.pids for beat in beats]
        return watch.now([pid for own in pids for pid in own])

    referee = Referee(plan.budget, plan.seed, counters or now, machine.cpu.threads)
    partial, notes = False, list[str]()
    try:
        _prove(runs, cells, progress)
        with metronome(child_environment()) as beat:
            beats.append(beat)
            _time(referee, cells, beat, progress)
        for cell in cells:
            cell.check_last()
        notes = [note for name in plan.images for note in _score(name, runs, cells, plan, progress)]
    except KeyboardInterrupt:
        partial = True
    finally:
        for run in runs:
            run.close()
    return Results(
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=plan.command,
        environment=machine,
        settings=_settings(plan),
        subjects=tuple({lane.target.name: lane.target.subject for lane in plan.lanes}.values()),
        rounds=referee.rounds,
        partial=partial,
        cells=tuple(_result(cell, referee.processors) for cell in cells),
        metronome=_beat(beats, referee.processors),
        skipped=(*plan.skipped, *_unserved(plan)),
        notes=tuple(notes),
    )


def _prove(runs: Sequence[LaneRun], cells: Sequence[CellRun], progress: Progress) -> None:
    """Start the lanes one after the other, so that none slows another's start, and prove their cells."""
    for run in runs:
        with progress.stage(f"prove {run.lane.backend}") as stage:
            own = [cell for cell in cells if cell.lane is run]
            for cell in own:
                cell.prove()
            failed = [cell.timing.failure for cell in own if cell.timing.failure]
            wrong = [cell for cell in own if cell.parity and not cell.parity.passed]
            stage.detail = run.lane.artifact
            if failed:
                stage.detail += f", FAILED: {failed[0]}"
            if wrong:
                stage.detail += f", WRONG at batch {', '.join(str(cell.batch) for cell in wrong)}"


def _time(referee: Referee, cells: Sequence[CellRun], beat: Metronome, progress: Progress) -> None:
    with progress.stage("measure") as stage:
        referee.report = _reporter(progress, stage)
        timings = [cell.timing for cell in cells if not cell.timing.failure]
        if timings:
            referee.measure([*timings, *([] if beat.timing.failure else [beat.timing])])
        stage.detail = f"{len(timings)} cells, {referee.rounds} rounds"


def _score(
    name: str, runs: Sequence[LaneRun], cells: Sequence[CellRun], plan: Plan, progress: Progress
) -> list[str]:
    """Accuracy of the lanes of a target that gave right outputs, beside the float64 reference's."""
    own = [run for run in runs if run.lane.target.name == name]
    right = [run for run in own if any(cell.right for cell in cells if cell.lane is run)]
    if not right:
        return []
    images, notes = plan.images[name], list[str]()
    with progress.stage("accuracy") as stage:
        reference = reference_top_classes(own[0].lane.target.bundle, images)
        if reference is None:
            return [
                f"{name}: no accuracy, because the float64 reference needs PyTorch and the model's weights"
            ]
        for run in right:
            try:
                found = compare_accuracy(run.places(images), reference, images.labels)
                run.accuracy = Accuracy.model_validate(asdict(found))
            except CellFailure as error:
                notes.append(f"{run.lane.name}: no accuracy: {error}")
        stage.detail = f"{name}, {len(images.labels)} images"
    return notes


def _reporter(progress: Progress, stage: Stage) -> Callable[[str, float], None]:
    def report(phase: str, share: float) -> None:
        full = round(_BAR * share)
        stage.detail = f"{'━' * full}{'╌' * (_BAR - full)} {share:4.0%}  {phase}"
        progress.updated(stage)

    return report


def _beat(beats: Sequence[Metronome], processors: int) -> Beat | None:
    takes = [beat.timing.take for beat in beats if not beat.timing.failure and beat.timing.take.visits]
    if not takes or takes[0].disturbances(processors):
        return None
    samples = takes[0].samples
    return Beat(
        p50_ms=_ms(float(np.median(samples))),
        samples_ms=tuple(_ms(sample) for sample in samples),
        round_samples=len(takes[0].visits[0].samples),
    )


def _settings(plan: Plan) -> Settings:
    return Settings(
        budget_s=plan.budget,
        seed=plan.seed,
        batches=tuple(plan.batches),
        threads=tuple(dict.fromkeys(lane.threads for lane in plan.lanes)),
        concurrency=tuple(dict.fromkeys(lane.concurrency for lane in plan.lanes)),
    )


def _unserved(plan: Plan) -> list[Skipped]:
    found = []
    for lane in plan.lanes:
        sizes = [str(size) for size in plan.batches if not serves(lane, size)]
        if sizes and lane.batch:
            reason = f"batch {', '.join(sizes)}: it serves {lane.batch.min} to {lane.batch.max}"
            name = lane.target.name
            found.append(Skipped(subject=name, backend=lane.backend, artifact=lane.artifact, reason=reason))
    return list(dict.fromkeys(found))


def _result(cell: CellRun, processors: int) -> Cell:
    """What the cell's record says."""
    lane, run, timing = cell.lane.lane, cell.lane, cell.timing
    facts = run.facts
    failure = timing.failure or ("" if timing.take.visits else "interrupted before it was measured")
    return Cell(
        subject=lane.target.name,
        backend=lane.backend,
        provider=facts.provider if facts else lane.provider,
        artifact=lane.artifact,
        precision=lane.precision,
        executes=facts.executes if facts else lane.precision,
        batch=cell.batch,
        image_size=lane.target.subject.image_size,
        threads=lane.threads,
        concurrency=lane.concurrency,
        status="failed" if failure else "ok",
        reason=failure,
        **({} if failure else _numbers(timing, cell)),
        disturbed=() if failure else tuple(timing.take.disturbances(processors)),
        repeats=timing.repeats,
        parity=cell.parity,
        accuracy=run.accuracy if cell.right else None,
        startup=run.startup,
        peak_memory_bytes=cell.peak[0],
        peak_device_bytes=cell.peak[1],
        size_bytes=lane.size_bytes,
    )


def _numbers(timing: Timing, cell: CellRun) -> dict[str, object]:
    visits, samples = timing.take.visits, timing.take.samples
    device = [sample for visit in visits for sample in visit.device]
    p50, p90, p99 = (float(value) for value in np.percentile(samples, (50, 90, 99)))
    rates = [len(visit.samples) * cell.batch / visit.wall for visit in visits]
    alone = cell.lane.lane.concurrency == 1
    return {
        "p50_ms": _ms(p50),
        "p90_ms": _ms(p90),
        "p99_ms": _ms(p99),
        "mean_ms": _ms(float(np.mean(samples))),
        "spread": round(timing.take.spread(), 4),
        "images_per_s": round(cell.batch / p50 if alone else float(np.median(rates)), 2),
        "samples_ms": tuple(_ms(sample) for sample in samples),
        "round_samples": len(visits[0].samples),
        "device_p50_ms": _ms(float(np.median(device))) if device else None,
        "device_samples_ms": tuple(_ms(sample) for sample in device),
    }


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 4)
