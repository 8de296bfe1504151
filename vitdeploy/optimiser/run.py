"""The contest: build what could win here, prove it, measure it, keep the winner and what was tried."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, get_args

from vitdeploy.backends.base import get_backend
from vitdeploy.benchmark.cases import BenchTarget, Case, open_targets
from vitdeploy.benchmark.ranking import Goal, choice_of
from vitdeploy.benchmark.results import Results, SkippedCase
from vitdeploy.benchmark.run import BenchPlan, run_plan
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.bundle.folder import CALIBRATION, HELD_OUT, Bundle, BundleWriter
from vitdeploy.bundle.manifest import Choice
from vitdeploy.config import BatchRange
from vitdeploy.errors import ImageError, ParityError, UsageError, did_you_mean
from vitdeploy.exporter.request import ExportRequest
from vitdeploy.exporter.run import run_export
from vitdeploy.machine.gpus import find_gpus
from vitdeploy.machine.identity import find_cpu
from vitdeploy.machine.processors import processors
from vitdeploy.machine.temporary import temporary_folder
from vitdeploy.optimiser.contestants import contestants, precisions_here
from vitdeploy.optimiser.decision import Decision, decide, sieve
from vitdeploy.optimiser.record import OPTIMISATION, Optimisation, Tried, Verdict
from vitdeploy.progress import Progress, Stage
from vitdeploy.quantisation.calibration import WANTED
from vitdeploy.verification.accuracy import LabelledImages, check_max_drop, find_labelled

GOALS: tuple[Goal, ...] = get_args(Goal)
BATCHES: Final[Mapping[Goal, int]] = {"latency": 1, "throughput": 8}
"""Images that are computed together, where nobody says how many."""
_LARGEST: Final = 32
"""The batch size that artifacts serve at least."""
_LOOK: Final = 0.3
"""Share of the budget for a first look at every contestant."""
_TRIAL = "trial"
PLAIN: Final = "onnx-fp32"
"""The artifact that stays, whatever wins: what others are made of, and compared with."""

Measure = Callable[..., Results]
"""As ``run_plan``: measures a plan, telling a ``progress``."""


@dataclass(frozen=True)
class Aim:
    """What the winner is to be best at, and how much may be spent on finding it.

    Raises:
        UsageError: an unknown goal, a batch size or budget below its least, a drop without images.
        ImageError: the labelled images are no folder.
    """

    goal: Goal = "latency"
    batch: int | None = None
    """Images computed together; None is 1 for latency and 8 for throughput."""
    data: Path | None = None
    """Labelled images."""
    max_drop: float | None = None
    """Points of top-1 on ``data`` that a contestant may lose."""
    budget: float = 120.0
    """Seconds of measuring; building, loading and proving come on top."""
    backends: tuple[str, ...] | None = None
    """Names; those that could win here when None."""
    seed: int = 0
    """Of the order of measurements."""

    def __post_init__(self) -> None:
        if self.goal not in GOALS:
            message = f"unknown goal {self.goal!r}{did_you_mean(self.goal, GOALS)}"
            raise UsageError(message, hint=f"known: {', '.join(GOALS)}")
        if self.images < 1:
            raise UsageError(f"the batch must be at least 1 image, not {self.batch}")
        if not self.budget > 0:
            raise UsageError(f"the budget must be positive, not {self.budget:g} s")
        check_max_drop(self.max_drop, self.data)
        if self.data is not None and not self.data.is_dir():
            raise ImageError(f"{self.data}: is not a folder of labelled images", hint="--data DIR")
        for name in self.backends or ():
            get_backend(name)

    @property
    def images(self) -> int:
        """How many are computed together."""
        return BATCHES[self.goal] if self.batch is None else self.batch


@dataclass(frozen=True)
class Optimised:
    """What an optimisation leaves."""

    bundle: Bundle
    choice: Choice
    record: Optimisation


def run_optimise(
    request: ExportRequest,
    aim: Aim,
    folder: Path | None = None,
    *,
    force: bool = False,
    measure: Measure = run_plan,
    progress: Progress | None = None,
) -> Optimised:
    """Make a bundle of the fp32 artifact and of what is fastest and right on this machine, all or nothing.

    Args:
        request: the model, with int8 among its precisions if it has calibration images; its other precisions,
            formats and batch sizes follow from the machine and the aim.

    Raises:
        UsageError, CheckpointError, ImageError, BundleError: bad input, or a folder that cannot be written.
        MissingDependency, DeviceUnavailable: as of an export.
        ExportError: the fp32 artifact could not be built.
        ParityError: nothing that runs here is right.
    """
    progress = progress or Progress()
    if request.further_sizes:
        raise UsageError("one image size is optimised at a time", hint="name one --image-size")
    temporary_folder()  # measured processes need one: before anything is built
    gpus = find_gpus()
    floats, missing = precisions_here(find_cpu().flags, gpus)
    if not request.quantised:
        missing["int8"] = f"ranges are taken from images: {WANTED}"
    wanted = replace(
        request,
        precisions=(*floats, *request.quantised),
        formats=("auto",) if gpus else ("onnx",),
        batch=BatchRange(1, aim.images, max(_LARGEST, aim.images)),
    )
    with BundleWriter(folder or request.default_folder, force=force) as writer:
        failures: dict[ArtifactPrecision, str] = {}
        trial = run_export(wanted, writer.directory / _TRIAL, failures=failures, progress=progress)
        (target,) = open_targets([trial])
        groups, skipped = contestants(
            target, aim.goal, aim.images, processors=processors(), gpus=gpus, backends=aim.backends
        )
        contest = _Contest(target, aim, request.command, measure, progress)
        decision, results, early = contest.hold(groups)
        record = Optimisation(
            created=results.created,
            machine=results.environment.machine,
            goal=aim.goal,
            batch=aim.images,
            max_drop=aim.max_drop,
            budget_s=aim.budget,
            rounds=results.rounds,
            tried=(
                *decision.tried,
                *early,
                *_not_run(skipped, trial),
                *_not_built(failures, "failed"),
                *_not_built(missing, "not built"),
            ),
        )
        choice = choice_of(decision.winner, results, aim.goal, None)
        draft = trial.manifest.only({PLAIN, decision.winner.artifact})
        for name in draft.files.keys() - ({HELD_OUT, CALIBRATION} if draft.calibration is None else set()):
            (trial.root / name).rename(writer.file(name))
        shutil.rmtree(trial.root)
        writer.file(OPTIMISATION).write_text(record.text(), encoding="utf-8")
        writer.seal(draft.model_copy(update={"choices": (choice,)}))
        return Optimised(writer.commit(), choice, record)


@dataclass(frozen=True)
class _Contest:
    """How contestants are measured."""

    target: BenchTarget
    aim: Aim
    command: str
    measure: Measure
    progress: Progress

    def hold(self, groups: Sequence[Sequence[Case]]) -> tuple[Decision, Results, tuple[Tried, ...]]:
        """A first look at each group of contestants alone, then the best of all together.

        Returns:
            The decision, the measurement that it was taken by, and who was not in it.

        Raises:
            UsageError: there are no contestants.
            ParityError: none is right.
        """
        if not groups:
            raise UsageError(
                f"nothing here runs {self.target.bundle.manifest.name} at batch {self.aim.images}",
                hint="`vitdeploy doctor` says what the runtimes need",
            )
        share = _LOOK * self.aim.budget / len(groups)
        looks = [self._run(group, share) for group in groups]
        found = sieve([look.cells for look in looks])
        if not found.finalists:
            why = "; ".join(f"{one.label}: {one.why}" for one in found.tried)
            raise ParityError(f"nothing that runs here is right: {why}")
        cases = [case for group in groups for case in group]
        finals = [cases[place] for place in found.finalists]
        manifest, data = self.target.bundle.manifest, self.aim.data
        images = None if data is None else find_labelled(data, manifest)
        results = self._run(finals, (1 - _LOOK) * self.aim.budget, images)
        return decide(results, self.target.name, self.aim.goal, self.aim.max_drop), results, found.tried

    def _run(self, cases: Sequence[Case], budget: float, images: LabelledImages | None = None) -> Results:
        plan = BenchPlan(
            cases,
            (self.aim.images,),
            budget,
            self.aim.seed,
            command=self.command,
            images={} if images is None else {self.target.name: images},
        )
        results = self.measure(plan, progress=_Stages(self.progress))
        if results.partial:
            raise KeyboardInterrupt
        return results


class _Stages(Progress):
    """The stages of one of several measurements, without what each of them notes."""

    def __init__(self, whole: Progress) -> None:
        self._whole = whole

    def started(self, stage: Stage) -> None:
        self._whole.started(stage)

    def updated(self, stage: Stage) -> None:
        self._whole.updated(stage)

    def finished(self, stage: Stage) -> None:
        self._whole.finished(stage)


def _not_run(skipped: Sequence[SkippedCase], bundle: Bundle) -> Iterator[Tried]:
    """What a runtime of this machine cannot run; a runtime that does not work here at all, once."""
    precisions = {artifact.name: artifact.precision for artifact in bundle.manifest.artifacts}
    for one in skipped:
        precision = precisions[one.artifact]
        yield Tried(
            precision=precision,
            artifact=one.artifact,
            backend=one.backend,
            verdict="not run",
            why=one.reason,
        )


def _not_built(reasons: Mapping[ArtifactPrecision, str], verdict: Verdict) -> Iterator[Tried]:
    for precision, why in reasons.items():
        yield Tried(precision=precision, verdict=verdict, why=why)
