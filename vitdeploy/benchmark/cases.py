"""What is measured: cases, each a model on a runtime in a process of its own, a cell for each batch size."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np

from vitdeploy.backends.base import Array, Backend, Options
from vitdeploy.benchmark.backend_process import job_of
from vitdeploy.benchmark.results import MeasuredBundle, SkippedCase
from vitdeploy.bundle.dtypes import ArtifactPrecision, Quantised
from vitdeploy.bundle.folder import HELD_OUT, WEIGHTS, Bundle
from vitdeploy.bundle.sizes import named, unsized
from vitdeploy.config import BatchRange, Size
from vitdeploy.errors import ParityError, UsageError
from vitdeploy.images.fitting import require_size
from vitdeploy.machine.child import Worker, child_environment
from vitdeploy.machine.processors import Share
from vitdeploy.verification.local import Pair, runnable


@dataclass(frozen=True)
class BenchTarget:
    """A bundle that is measured at one image size, under a name of its own."""

    bundle: Bundle
    """At that size."""
    name: str
    """The same at every size."""
    golden: Mapping[str, Array] = field(repr=False)
    held_out: Mapping[str, Array] = field(repr=False, default_factory=dict)
    """What stands for the golden inputs where an artifact is quantised; empty where none is."""

    @property
    def pixels(self) -> Array:
        """Golden inputs (K, ...), as the model takes them."""
        return self.golden["pixel_values"]

    @property
    def record(self) -> MeasuredBundle:
        """What the results say of it."""
        manifest, shape = self.bundle.manifest, self.pixels.shape
        size = (shape[1], shape[2]) if manifest.input == "uint8" else (shape[-2], shape[-1])
        return MeasuredBundle(
            name=self.name,
            model=manifest.name,
            digest=manifest.digest,
            image_size=manifest.model.image_size if manifest.model else size,
            parameters=manifest.parameters,
            flops=manifest.flops,
        )

    def artifact_name(self, plain: str) -> str:
        """What the bundle calls an artifact of this size that has a name as those of the first size have."""
        return named(plain, self.bundle.place)


@dataclass(frozen=True)
class Case:
    """A model on a runtime with so many threads and callers: one process, a cell for each batch size."""

    target: BenchTarget
    backend: str
    artifact: str
    precision: ArtifactPrecision
    threads: int | None
    concurrency: int
    command: tuple[str, ...]
    job: Mapping[str, Any]
    provider: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    batch: BatchRange | None = None
    """Batch sizes it takes; None is any."""
    size_bytes: int | None = None
    spin: bool = False
    """Whether its threads spin while they wait."""

    @property
    def golden(self) -> Mapping[str, Array]:
        """What it is timed with and held against."""
        quantised = self.precision in get_args(Quantised)  # of another tool, too, whose bundle has none
        return (self.target.held_out if quantised else None) or self.target.golden

    def inputs(self, batch: int) -> Array:
        """Golden inputs, filled up by going round."""
        pixels = self.golden["pixel_values"]
        return np.ascontiguousarray(pixels[np.arange(batch) % len(pixels)])

    @property
    def name(self) -> str:
        parts = [self.backend, self.artifact]
        parts += [f"{self.threads} threads"] if self.threads else []
        parts += [f"{self.concurrency} callers"] if self.concurrency > 1 else []
        parts += ["spinning"] if self.spin else []
        return " ".join(parts)

    def start(self, limit: float) -> Worker:
        """Start its process; the first answer is what it loaded."""
        return Worker(self.command, self.job, self.environment, limit)


@dataclass(frozen=True)
class Choices:
    """What of a bundle is measured, and how."""

    backends: tuple[str, ...] | None = None
    """Names; None is all that run here."""
    artifacts: tuple[str, ...] | None = None
    """Names or precisions; None is all."""
    image_sizes: tuple[Size, ...] | None = None
    """Among those of the bundles; None is all."""
    batches: tuple[int, ...] | None = None
    threads: tuple[int | None, ...] = (None,)
    concurrency: tuple[int, ...] = (1,)
    shares: tuple[Share, ...] = ()
    """Of the processors, in the place of every number of threads with every one of callers; a GPU has one."""
    provider: str | None = None
    device: str | None = None
    spin: tuple[bool, ...] = (False,)
    """As ``Options.spin``, of backends that have the choice; others are measured once."""

    def __post_init__(self) -> None:
        for name, values in (("threads", self.threads), ("concurrency", self.concurrency)):
            if any(value is not None and value < 1 for value in values):
                raise UsageError(f"{name} must be at least 1, not {min(v for v in values if v is not None)}")

    def ways(self, backend: Backend) -> list[tuple[int | None, int]]:
        """Threads of each caller, and callers."""
        if not self.shares:
            return [*itertools.product(self.threads, self.concurrency)]
        on_gpu = backend.traits.uses_gpu(self.provider) or (self.device or "cpu") != "cpu"
        return [(share.threads, share.sessions) for share in self.shares if share.sessions == 1 or not on_gpu]


DEFAULT_BATCHES = (1, 8, 32)


def open_targets(bundles: Sequence[Bundle], image_sizes: Sequence[Size] | None = None) -> list[BenchTarget]:
    """Bundles with names to tell them apart by, one for each of their image sizes.

    Args:
        image_sizes: those to measure; None is all of every bundle.

    Raises:
        ParityError: one without golden inputs: nothing to measure with, nothing to prove it by.
        UsageError: one twice; an image size that no bundle has, or a bundle that has none of them.
    """
    if len({bundle.root for bundle in bundles}) < len(bundles):
        raise UsageError("a bundle is named twice")
    for size in image_sizes or ():
        require_size(size, list(dict.fromkeys(size for bundle in bundles for size in bundle.sizes)))
    targets = []
    for bundle, name in zip(bundles, _unique_names(bundles), strict=True):
        for view in _views(bundle, image_sizes):
            golden = view.golden()
            if "pixel_values" not in golden or "reference" not in golden:
                raise ParityError(f"{bundle.root}: has no golden inputs to measure with")
            targets.append(BenchTarget(view, name, golden, view.tensors(HELD_OUT)))
    return targets


def _views(bundle: Bundle, wanted: Sequence[Size] | None) -> list[Bundle]:
    """The bundle at each of the sizes that are wanted and that it has."""
    if wanted is None:
        return [bundle.at_size(size) for size in bundle.sizes] or [bundle]
    sizes = [size for size in wanted if size in bundle.sizes]
    return [bundle.at_size(size) for size in sizes or wanted[:1]]


def _unique_names(bundles: Sequence[Bundle]) -> list[str]:
    """Models' names; with the folder's where one is not enough; paths where that is not enough either."""
    models = [bundle.manifest.name for bundle in bundles]
    names = [
        model if models.count(model) == 1 else f"{model} ({bundle.root.name})"
        for model, bundle in zip(models, bundles, strict=True)
    ]
    return names if len(set(names)) == len(names) else [str(bundle.root) for bundle in bundles]


def cases_of(target: BenchTarget, choices: Choices) -> tuple[list[Case], list[SkippedCase]]:
    """Every case of a bundle that runs here, and why the others do not.

    Raises:
        UsageError: an unknown backend or artifact, or a batch size that nothing of this bundle serves.
        DeviceUnavailable: a backend asked for by name does not work here.
    """
    bundle = target.bundle
    names = choices.artifacts and {bundle.artifact(name).name for name in choices.artifacts}
    cases, skipped = [], []
    for pair in runnable(bundle, choices.backends, models=True):
        if names and pair.name not in names:
            continue
        if pair.reason is not None:
            skipped.append(
                SkippedCase(
                    subject=target.name, backend=pair.backend.name, artifact=pair.name, reason=pair.reason
                )
            )
            continue
        spins = choices.spin if pair.backend.traits.spins else (False,)
        for (threads, n), spin in itertools.product(choices.ways(pair.backend), spins):
            cases.append(_case(target, pair, threads, n, choices, spin=spin))
    _require_batches(target, cases, choices.batches or ())
    return cases, skipped


def _case(
    target: BenchTarget,
    pair: Pair,
    threads: int | None,
    concurrency: int,
    choices: Choices,
    *,
    spin: bool,
) -> Case:
    artifact, files = pair.artifact, target.bundle.manifest.files
    reads = artifact is not None and artifact.format in pair.backend.formats
    weights = files[WEIGHTS].size if WEIGHTS in files else None
    return Case(
        target=target,
        backend=pair.backend.name,
        artifact=unsized(pair.name, target.bundle.place),
        precision=artifact.precision if artifact else "fp32",
        threads=threads,
        concurrency=concurrency,
        command=(sys.executable, "-P", "-m", "vitdeploy.benchmark.backend_process"),
        job=job_of(
            target.bundle,
            pair.backend.name,
            artifact.name if artifact else None,
            Options(threads=threads, provider=choices.provider, device=choices.device, spin=spin),
            concurrency,
        ),
        spin=spin,
        provider=choices.provider or "",
        environment=child_environment(),
        batch=artifact.batch if artifact else None,
        size_bytes=artifact.size if artifact is not None and reads else weights,
    )


def _require_batches(target: BenchTarget, cases: Sequence[Case], batches: Sequence[int]) -> None:
    for size in batches:
        if cases and not any(serves(case, size) for case in cases):
            ranges = ", ".join(sorted({f"{b.min} to {b.max}" for case in cases if (b := case.batch)}))
            raise UsageError(
                f"--batch {size}: nothing of {target.bundle.root} serves it, only {ranges}",
                hint=f"export the model again with --batch 1,8,{size}",
            )


def serves(case: Case, size: int) -> bool:
    """Whether a case takes batches of this size."""
    return case.batch is None or case.batch.min <= size <= case.batch.max
