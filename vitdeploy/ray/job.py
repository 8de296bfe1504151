"""A job over many images: what is left to do, who does it, and the parts that are written as it is done."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vitdeploy.errors import VitdeployError
from vitdeploy.progress import Progress, Stage
from vitdeploy.ray import data, tables
from vitdeploy.ray.folder import JobFolder
from vitdeploy.ray.inputs import Inputs, find_inputs
from vitdeploy.ray.planning import Request, allot, cut, make_plan, on_gpu
from vitdeploy.ray.work import Item, Plan, Resources

_PART_ROWS = 50_000
"""A part is written when it has so many rows, or after ``part_seconds``; a kill costs no more than that."""
_ERRORS_SHOWN = 10


@dataclass
class Summary:
    """How a job ended."""

    images: int = 0
    """Classified now."""
    earlier: int = 0
    """Found done."""
    failed: int = 0
    """Given an error instead of labels, now."""
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
        found = tables.errors_of(table)
        self.errors += found[: _ERRORS_SHOWN - len(self.errors)]
        self.failed += len(found)
        self.images += table.num_rows - len(found)


def run(request: Request, progress: Progress | None = None) -> Summary:
    """Classify images on Ray and write the results as Parquet; images that are done already are left out.

    Raises:
        UsageError: a flag, the inputs or the output folder; the bundle gives no classes.
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
    summary = Summary(missing=len(inputs.problems), errors=[error.message for error in inputs.problems])
    if not inputs.items:
        return summary
    with JobFolder(request.output, _identity(plan)) as folder:
        items = _left(inputs, folder.settle(inputs.stamps))
        todo = sum(item.left for item in items)
        summary.earlier = sum(item.rows for item in inputs.items) - todo
        if items:
            with progress.stage("classify") as stage:
                _compute(request, plan, items, folder, summary, Reporter(progress, stage, todo, summary))
    return summary


def _identity(plan: Plan) -> dict[str, Any]:
    """What all parts in a folder have in common."""
    return {
        "bundle_digest": plan.digest,
        "backend": plan.backend,
        "provider": plan.provider,
        "artifact": plan.artifact,
        "top_k": plan.top_k,
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

    def wait(self, resources: Resources) -> None:
        """Say so where others on this Ray have to end first."""
        wanted = self._summary.workers * self._summary.threads
        if wanted > resources.free:
            self._progress.note(
                f"{resources.free} of Ray's {sum(resources.cpus)} CPUs are free, the job takes {wanted}: "
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
    request: Request, plan: Plan, items: Sequence[Item], folder: JobFolder, summary: Summary, report: Reporter
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
