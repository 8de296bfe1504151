"""Before a job begins: what every actor will run, how many of them, and how the work is cut for them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vitdeploy.backends.base import Options, get_backend
from vitdeploy.bundle.folder import Bundle
from vitdeploy.errors import DeviceUnavailable, UsageError
from vitdeploy.predictor import DEFAULT_BACKEND, choice_for_this_machine, choose_artifact
from vitdeploy.ray.work import Item, Plan, Resources

_ACTORS_PER_MACHINE = 8
"""By default; more processors than that give each actor more threads, so that memory does not run out."""
_PIECES_PER_WORKER = 16
"""A job is cut into so many pieces for each actor, so that none is busy long after the others are done ..."""
_MOST_IN_A_PIECE = 128
"""... but into no larger ones than this, so that results arrive while a long job runs."""
_GPU_BACKENDS = ("tensorrt", "tensorrt-rtx", "triton")
_GPU_PROVIDERS = ("cuda", "tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class Request:
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
    part_seconds: float = 30.0
    """Results are written this often, so that a kill costs no more work than that."""


def make_plan(request: Request) -> tuple[Plan, str]:
    """What every actor will run, and one line on why, where the bundle says so.

    Raises:
        UsageError: no such backend or artifact, a batch that it does not take, no classes to predict.
        BundleError: it is no bundle.
    """
    bundle = Bundle.open(request.bundle)
    if bundle.manifest.output != "logits" or bundle.manifest.preprocess is None:
        raise UsageError(f"{bundle.root}: gives {bundle.manifest.output}, which are no classes to predict")
    if request.top_k < 1:
        raise UsageError(f"top_k must be at least 1, not {request.top_k}")
    Options(threads=request.threads)
    for name, value in (("workers", request.workers), ("batch", request.batch)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    plan = Plan(
        bundle=str(bundle.root.absolute()),
        digest=bundle.manifest.digest,
        backend=request.backend or DEFAULT_BACKEND,
        artifact=request.artifact,
        provider=request.provider,
        threads=request.threads or 1,
        batch=request.batch,
        top_k=request.top_k,
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
    if chosen is None:
        return plan, note
    if plan.batch is not None and plan.batch > chosen.batch.max:
        raise UsageError(f"--batch {plan.batch}: {chosen.name} takes at most {chosen.batch.max} images")
    return replace(plan, artifact=chosen.name, batch=plan.batch or chosen.batch.opt), note


def on_gpu(plan: Plan) -> bool:
    """Whether each session takes a GPU."""
    return plan.backend in _GPU_BACKENDS or plan.provider in _GPU_PROVIDERS


def allot(
    resources: Resources, workers: int | None, threads: int | None, *, gpu: bool, most: int
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
