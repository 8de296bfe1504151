"""A job over many images: how it is planned, what is left to do, and the parts written as it is done."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vitdeploy.backends.base import Options, get_backend
from vitdeploy.bundle.folder import Bundle
from vitdeploy.errors import DeviceUnavailable, UsageError, VitdeployError
from vitdeploy.images.fitting import DEFAULT_RULE, Rule, require_size, rule_name
from vitdeploy.predictor import (
    DEFAULT_BACKEND,
    choice_for_this_machine,
    choose_artifact,
    quantised_note,
)
from vitdeploy.progress import Progress, Stage
from vitdeploy.ray import data, tables
from vitdeploy.ray.folder import JobFolder
from vitdeploy.ray.tables import Inputs, find_inputs
from vitdeploy.ray.work import ActorPlan, Item, RayResources

_PART_ROWS = 50_000
"""A part is written when it has so many rows, or after ``part_seconds``; a kill costs no more than that."""
_ERRORS_SHOWN = 10
_ACTORS_PER_MACHINE = 8
"""By default; more processors than that give each actor more threads, so that memory does not run out."""
_PIECES_PER_WORKER = 16
"""A job is cut into so many pieces for each actor, so that none is busy long after the others are done ..."""
_MOST_IN_A_PIECE = 128
"""... but into no larger ones than this, so that results arrive while a long job runs."""


@dataclass(frozen=True)
class JobRequest:
    """What to classify, with what, and where the results go."""

    bundle: Path
    inputs: tuple[str, ...]
    """Image files and folders; or Parquet files and folders of them."""
    output: Path
    column: str | None = None
    """Where the Parquet files have their images; found where omitted."""
    backend: str | None = None
    artifact: str | None = None
    provider: str | None = None
    top_k: int = 5
    threads: int | None = None
    """Of each session."""
    workers: int | None = None
    """Sessions, each in a process of its own."""
    batch: int | None = None
    """Images at a time."""
    fit: Rule = DEFAULT_RULE
    """How an image gets one of several image sizes."""
    part_seconds: float = 30.0
    """Results are written this often, so that a kill costs no more work than that."""


@dataclass
class Summary:
    """How a job ended."""

    images: int = 0
    """Classified, or embedded, now."""
    earlier: int = 0
    """Found done."""
    failed: int = 0
    """Given an error instead, now."""
    missing: int = 0
    """Paths that name nothing."""
    seconds: float = 0.0
    """Without Ray's start, with that of the sessions."""
    workers: int = 0
    threads: int = 0
    parts: int = 0
    """Files written now."""
    errors: list[str] = field(default_factory=list)
    """The first of them."""

    @property
    def images_per_s(self) -> float:
        return (self.images + self.failed) / self.seconds if self.seconds else 0.0

    def count(self, table: tables.Table) -> None:
        errors = tables.errors_of(table)
        self.errors += errors[: _ERRORS_SHOWN - len(self.errors)]
        self.failed += len(errors)
        self.images += table.num_rows - len(errors)


def make_plan(request: JobRequest) -> tuple[ActorPlan, str]:
    """What every actor will run, and one line on why, where the bundle says so.

    Raises:
        UsageError: no such backend or artifact, a batch that it does not take, neither classes nor vectors.
        BundleError: it is no bundle.
    """
    bundle = Bundle.open(request.bundle)
    classes = bundle.manifest.classifies
    vectors = None if classes else bundle.manifest.vectors
    if not classes and vectors is None:
        raise UsageError(
            f"{bundle.root}: gives {bundle.manifest.gives}, neither classes nor a vector of each image",
            hint="export with --output logits or --output embedding",
        )
    if bundle.manifest.refuses_images:
        raise UsageError(f"{bundle.root}: {bundle.manifest.refuses_images}, so it cannot take images")
    if request.top_k < 1:
        raise UsageError(f"top_k must be at least 1, not {request.top_k}")
    if bundle.sizes and not isinstance(request.fit, str):
        require_size(request.fit, bundle.sizes)
    Options(threads=request.threads)
    for name, value in (("workers", request.workers), ("batch", request.batch)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    plan = ActorPlan(
        bundle=str(bundle.root.absolute()),
        digest=bundle.manifest.digest,
        backend=request.backend or DEFAULT_BACKEND,
        artifact=request.artifact,
        provider=request.provider,
        threads=request.threads or 1,
        batch=request.batch,
        top_k=request.top_k,
        vector=None if vectors is None else int(vectors.shape[1]),
        fit=request.fit if len(bundle.sizes) > 1 else None,
    )
    note = ""
    if request.backend is None and request.artifact is None and request.provider is None:
        choice, note = choice_for_this_machine(bundle)
        if choice is not None:
            batch = request.batch or choice.batch
            backend, artifact, provider = choice.backend, choice.artifact, choice.provider
            return replace(plan, backend=backend, artifact=artifact, provider=provider, batch=batch), note
    runtime = get_backend(plan.backend)
    chosen = bundle.artifact(plan.artifact) if plan.artifact else choose_artifact(bundle, runtime)
    if not plan.artifact:
        note = note or quantised_note(chosen, runtime)
    if chosen is None:
        return plan, note
    if plan.batch is not None and plan.batch > chosen.batch.max:
        raise UsageError(f"--batch {plan.batch}: {chosen.name} takes at most {chosen.batch.max} images")
    return replace(plan, artifact=chosen.name, batch=plan.batch or chosen.batch.opt), note


def on_gpu(plan: ActorPlan) -> bool:
    """Whether each session takes a GPU."""
    return get_backend(plan.backend).traits.uses_gpu(plan.provider)


def allot(
    resources: RayResources, workers: int | None, threads: int | None, *, gpu: bool, most: int
) -> tuple[int, int]:
    """How many sessions, and how many threads for each, so that together they take each processor once.

    Args:
        most: more sessions than this have nothing to do.

    Raises:
        UsageError: Ray has not enough processors or GPUs; it would wait for them for ever.
    """
    if not resources.cpus:
        raise UsageError("Ray has no CPU to run on")
    if gpu and not resources.gpus:
        raise DeviceUnavailable("Ray has no GPU to run on")
    ours = resources.cpus
    if len(ours) == 1 and resources.free:  # of several machines, Ray does not say which are busy
        ours = (min(ours[0], resources.free),)
    if workers is None and gpu:
        workers = resources.gpus
    elif workers is None and threads is None:
        workers = sum(min(cpus, _ACTORS_PER_MACHINE) for cpus in ours)
    elif workers is None and threads is not None:
        workers = max(1, sum(cpus // threads for cpus in ours))
    assert workers is not None
    workers = max(1, min(workers, most))
    shared = max(1, sum(ours) // workers)
    for each in [threads] if threads else range(shared, 0, -1):
        room = sum(cpus // each for cpus in resources.cpus)
        if workers <= (min(room, resources.gpus) if gpu else room):
            return workers, each
    raise UsageError(
        f"{workers} workers{f' with {threads} threads each' if threads else ''} do not fit: Ray has "
        f"{' + '.join(map(str, resources.cpus))} CPUs and {resources.gpus} GPUs",
        hint="give fewer --workers or --threads",
    )


def cut(items: Sequence[Item], workers: int, batch: int) -> Iterator[list[Item]]:
    """Pieces of work, one task each: full batches of files, or a row group."""
    files = [item for item in items if item.group < 0]
    fair = min(math.ceil(len(files) / (workers * _PIECES_PER_WORKER)), _MOST_IN_A_PIECE)
    size = max(1, math.ceil(fair / batch)) * batch
    for start in range(0, len(files), size):
        yield files[start : start + size]
    yield from ([item] for item in items if item.group >= 0)


def run_job(request: JobRequest, progress: Progress | None = None) -> Summary:
    """Classify or embed images on Ray and write Parquet; images that are done already are left out.

    Raises:
        UsageError: a flag, the inputs or the output folder; the bundle gives neither classes nor vectors.
        BundleError: the bundle cannot be opened, or its runtime fails.
        MissingDependency: Ray is not installed.
        VitdeployError: what the backend says on the machine where it runs.
    """
    progress = progress or Progress()
    plan, note = make_plan(request)
    if note:
        progress.note(note)
    with progress.stage("look") as stage:
        inputs = find_inputs(request.inputs, request.column)
        plan = replace(plan, column=inputs.column)
        stage.detail = f"{sum(item.rows for item in inputs.items)} images"
    if inputs.unread:
        progress.note(inputs.unread)
    summary = Summary(missing=len(inputs.problems), errors=[error.message for error in inputs.problems])
    if not inputs.items:
        return summary
    with JobFolder(request.output, _identity(plan)) as folder:
        items = _left(inputs, folder.settle(inputs.stamps))
        todo = sum(item.left for item in items)
        summary.earlier = sum(item.rows for item in inputs.items) - todo
        if items:
            with progress.stage("classify" if plan.vector is None else "embed") as stage:
                _compute(request, plan, items, folder, summary, Reporter(progress, stage, todo, summary))
    return summary


def _identity(plan: ActorPlan) -> dict[str, Any]:
    """What all parts in a folder have in common."""
    return {
        "bundle_digest": plan.digest,
        "backend": plan.backend,
        "provider": plan.provider,
        "artifact": plan.artifact,
        "top_k": plan.top_k,
        **({} if plan.fit is None else {"fit": rule_name(plan.fit)}),
    }


def _left(inputs: Inputs, done: Mapping[str, set[int]]) -> list[Item]:
    """The items that have something to do, each with what is done of it."""
    items = []
    for item in inputs.items:
        finished = done.get(item.source, set())
        if item.group < 0:
            rows: tuple[int, ...] = tuple(finished)
        else:
            rows = tuple(sorted(finished.intersection(range(item.first, item.first + item.rows))))
        if len(rows) < item.rows:
            items.append(replace(item, done=rows))
    return items


class Reporter:
    """Says how far the job is."""

    def __init__(self, progress: Progress, stage: Stage, todo: int, summary: Summary) -> None:
        self._progress, self._stage, self._todo, self._summary = progress, stage, todo, summary

    def wait(self, resources: RayResources) -> None:
        """Say so where others on this Ray have to end first."""
        needed = self._summary.workers * self._summary.threads
        if needed > resources.free:
            self._progress.note(
                f"{resources.free} of Ray's {sum(resources.cpus)} CPUs are free, the job takes {needed}: "
                "it goes on as others end"
            )

    def tell(self) -> None:
        summary = self._summary
        bad = f", {summary.failed} failed" if summary.failed else ""
        self._stage.detail = (
            f"{summary.images + summary.failed}/{self._todo} images{bad}, "
            f"{summary.images_per_s:.1f} images/s, {summary.workers} x {summary.threads} threads"
        )
        self._progress.updated(self._stage)


def _compute(
    request: JobRequest,
    plan: ActorPlan,
    items: Sequence[Item],
    folder: JobFolder,
    summary: Summary,
    report: Reporter,
) -> None:
    gpu, batch = on_gpu(plan), plan.batch or 8
    with data.connected() as resources:
        most = sum(1 for _ in cut(items, 10**6, batch))  # in the smallest pieces
        workers, threads = allot(resources, request.workers, request.threads, gpu=gpu, most=most)
        summary.workers, summary.threads = workers, threads
        report.wait(resources)
        begin = time.perf_counter()
        results = data.classify(
            [tables.pieces(piece) for piece in cut(items, workers, batch)],
            replace(plan, threads=threads),
            workers=workers,
            threads=threads,
            gpus=1 if gpu else 0,
        )
        with contextlib.closing(results), Parts(folder, summary, request.part_seconds) as parts:
            for table in results:
                answers, failure = tables.split(table)
                parts.add(answers)
                if failure is not None:
                    raise VitdeployError.from_dict(json.loads(failure))
                summary.seconds = time.perf_counter() - begin
                report.tell()


class Parts:
    """Collects results and writes a part now and then, and the rest at the end, however that comes."""

    def __init__(self, folder: JobFolder, summary: Summary, seconds: float) -> None:
        self._folder, self._summary, self._seconds = folder, summary, seconds
        self._waiting: list[tables.Table] = []
        self._since = time.monotonic()

    def add(self, table: tables.Table) -> None:
        if not table.num_rows:
            return
        self._summary.count(table)
        self._waiting.append(table)
        rows = sum(waiting.num_rows for waiting in self._waiting)
        if rows >= _PART_ROWS or time.monotonic() - self._since >= self._seconds:
            self._write()

    def _write(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._since = time.monotonic()
        if waiting:
            self._folder.write(waiting)
            self._summary.parts += 1

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *_: object) -> None:
        self._write()
