"""What is measured: lanes, each a process with one loaded model, and their sessions as seen from here."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from vitdeploy.backends.base import Array, Session, SessionFacts
from vitdeploy.benchmark.results import Skipped, Subject
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.bundle.folder import WEIGHTS, Bundle
from vitdeploy.bundle.manifest import Artifact, TensorSpec
from vitdeploy.config import BatchRange
from vitdeploy.errors import ParityError, UsageError
from vitdeploy.machine.child import Worker, child_environment
from vitdeploy.verification.local import Pair, runnable

_FACTS = TypeAdapter(SessionFacts)


@dataclass(frozen=True)
class Target:
    """A bundle that is measured, under a name of its own."""

    bundle: Bundle
    name: str
    golden: Mapping[str, Array] = field(repr=False)

    @property
    def pixels(self) -> Array:
        """Golden inputs (K, ...), as the model takes them."""
        return self.golden["pixel_values"]

    def batch(self, size: int) -> Array:
        """Golden inputs, filled up by going round."""
        return np.ascontiguousarray(self.pixels[np.arange(size) % len(self.pixels)])

    @property
    def subject(self) -> Subject:
        manifest, shape = self.bundle.manifest, self.pixels.shape
        return Subject(
            name=self.name,
            model=manifest.name,
            digest=manifest.digest,
            image_size=(shape[1], shape[2]) if shape[-1] == 3 else (shape[2], shape[3]),
            parameters=manifest.parameters,
        )


@dataclass(frozen=True)
class Lane:
    """A model on a runtime with so many threads and callers: one process, a cell for each batch size."""

    target: Target
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

    @property
    def name(self) -> str:
        parts = [self.backend, self.artifact]
        parts += [f"{self.threads} threads"] if self.threads else []
        parts += [f"{self.concurrency} callers"] if self.concurrency > 1 else []
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
    batches: tuple[int, ...] | None = None
    threads: tuple[int | None, ...] = (None,)
    concurrency: tuple[int, ...] = (1,)
    provider: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for name, values in (("threads", self.threads), ("concurrency", self.concurrency)):
            if any(value is not None and value < 1 for value in values):
                raise UsageError(f"{name} must be at least 1, not {min(v for v in values if v is not None)}")


DEFAULT_BATCHES = (1, 8, 32)


def open_targets(bundles: Sequence[Bundle]) -> list[Target]:
    """Bundles with names to tell them apart by.

    Raises:
        ParityError: one without golden inputs: nothing to measure with, nothing to prove it by.
        UsageError: one twice.
    """
    if len({bundle.root for bundle in bundles}) < len(bundles):
        raise UsageError("a bundle is named twice")
    names = [bundle.manifest.name for bundle in bundles]
    found = []
    for bundle, name in zip(bundles, names, strict=True):
        golden = bundle.golden()
        if "pixel_values" not in golden or "reference" not in golden:
            raise ParityError(f"{bundle.root}: has no golden inputs to measure with")
        own = name if names.count(name) == 1 else f"{name} ({bundle.root.name})"
        found.append(Target(bundle, own, golden))
    if len({target.name for target in found}) < len(found):
        return [Target(t.bundle, str(t.bundle.root), t.golden) for t in found]
    return found


def lanes_of(target: Target, choices: Choices) -> tuple[list[Lane], list[Skipped]]:
    """Every lane of a bundle that runs here, and why the others do not.

    Raises:
        UsageError: an unknown backend or artifact, or a batch size that nothing of this bundle serves.
        DeviceUnavailable: a backend asked for by name does not work here.
    """
    bundle = target.bundle
    wanted = choices.artifacts and {bundle.artifact(name).name for name in choices.artifacts}
    lanes, skipped = [], []
    for pair in runnable(bundle, choices.backends, models=True):
        if wanted and pair.name not in wanted:
            continue
        if pair.reason is not None:
            skipped.append(_skipped(target, pair, pair.reason))
            continue
        for threads in choices.threads:
            lanes += [_lane(target, pair, threads, n, choices) for n in choices.concurrency]
    _require_batches(target, lanes, choices.batches or ())
    return lanes, skipped


def _skipped(target: Target, pair: Pair, reason: str) -> Skipped:
    return Skipped(subject=target.name, backend=pair.backend.name, artifact=pair.name, reason=reason)


def _lane(target: Target, pair: Pair, threads: int | None, concurrency: int, choices: Choices) -> Lane:
    artifact, files = pair.artifact, target.bundle.manifest.files
    reads = artifact is not None and artifact.format in pair.backend.formats
    weights = files[WEIGHTS].size if WEIGHTS in files else None
    return Lane(
        target=target,
        backend=pair.backend.name,
        artifact=pair.name,
        precision=artifact.precision if artifact else "fp32",
        threads=threads,
        concurrency=concurrency,
        command=(sys.executable, "-P", "-m", "vitdeploy.benchmark.lane"),
        job={
            "bundle": str(target.bundle.root),
            "backend": pair.backend.name,
            "artifact": artifact.name if artifact else None,
            "threads": threads,
            "provider": choices.provider,
            "device": choices.device,
            "concurrency": concurrency,
        },
        provider=choices.provider or "",
        environment=child_environment(),
        batch=artifact.batch if artifact else None,
        size_bytes=_size(artifact, reads=reads, weights=weights),
    )


def _size(artifact: Artifact | None, *, reads: bool, weights: int | None) -> int | None:
    return artifact.size if artifact is not None and reads else weights


def _require_batches(target: Target, lanes: Sequence[Lane], batches: Sequence[int]) -> None:
    for size in batches:
        if lanes and not any(serves(lane, size) for lane in lanes):
            ranges = ", ".join(sorted({f"{b.min} to {b.max}" for lane in lanes if (b := lane.batch)}))
            raise UsageError(
                f"--batch {size}: nothing of {target.bundle.root} serves it, only {ranges}",
                hint=f"vitdeploy export --batch 1,8,{size}",
            )


def serves(lane: Lane, size: int) -> bool:
    """Whether a lane takes batches of this size."""
    return lane.batch is None or lane.batch.min <= size <= lane.batch.max


class RemoteSession(Session):
    """A lane's session: inputs and outputs travel through files."""

    def __init__(self, facts: SessionFacts, worker: Worker, limit: float) -> None:
        super().__init__(facts)
        self._worker, self._limit = worker, limit
        self._folder = tempfile.TemporaryDirectory(prefix="vitdeploy-bench-")

    def file(self, array: Array) -> str:
        """Write an array for the other side."""
        path = Path(self._folder.name, "inputs.npy")
        np.save(path, array)
        return str(path)

    def last(self, batch: int) -> Array:
        """What the last timed run of a batch size gave."""
        path = Path(self._folder.name, "outputs.npy")
        self._worker.ask("last", batch=batch, outputs=str(path))
        outputs: Array = np.load(path)
        return outputs

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        path = Path(self._folder.name, "outputs.npy")
        pixels = inputs[self.facts.inputs[0].name]
        self._worker.ask("run", limit=self._limit, inputs=self.file(pixels), outputs=str(path))
        return {self.facts.outputs[0].name: np.load(path)}

    def _close(self) -> None:
        self._worker.close()
        self._folder.cleanup()


def facts_of(lane: Lane, said: Mapping[str, Any]) -> SessionFacts:
    """A session's facts from what its process says of it; another tool's need not say everything."""
    manifest = lane.target.bundle.manifest
    pixels, reference = lane.target.pixels, lane.target.golden["reference"]
    inputs = TensorSpec.model_validate(
        {"name": "pixel_values", "dtype": pixels.dtype.name, "shape": ("N", *pixels.shape[1:])}
    )
    outputs = TensorSpec(name=manifest.output, dtype="float32", shape=("N", *reference.shape[1:]))
    defaults: dict[str, Any] = {
        "backend": lane.backend,
        "artifact": lane.artifact,
        "precision": lane.precision,
        "executes": lane.precision,
        "device": "cpu",
        "provider": lane.provider or "cpu",
        "batch": None,
        "inputs": (inputs,),
        "outputs": (outputs,),
        "versions": {},
    }
    return _FACTS.validate_python({**defaults, **said})
