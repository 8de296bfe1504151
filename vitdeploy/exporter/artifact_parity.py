"""The parity of what was built: run on this machine, held against the float64 reference. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from vitdeploy.backends.base import Options, get_backend
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import Artifact
from vitdeploy.bundle.proofs import ParityRecord
from vitdeploy.errors import MissingDependency, ParityError
from vitdeploy.progress import Progress
from vitdeploy.verification import parity
from vitdeploy.verification.gemms import BACKENDS, check_gemms

Golden = Mapping[str, np.ndarray[Any, Any]]


def onnx_parity(
    bundle: Bundle,
    artifact: Artifact,
    golden: Golden,
    max_abs: float | None,
    batches: Sequence[int] | None = None,
    largest_ran_on: Collection[str] = (),
) -> list[ParityRecord]:
    """Run an ONNX artifact; a quantised one on every runtime here, as each has integer kernels of its own.

    Args:
        batches: at these batch sizes; at the least, the optimal and the most when omitted.
        largest_ran_on: backends that have run the largest batch of this graph in another precision. There the
            optimal one is the most: what a size does to a graph is the same in every dtype.

    Raises:
        MissingDependency: no runtime here takes its precision.
    """
    records: list[ParityRecord] = []
    for name in ("onnxruntime", "openvino"):
        backend = get_backend(name)
        if backend.supports(bundle.manifest, artifact) is None and backend.availability().ok:
            sizes, served = batches, artifact.batch
            if batches is None and name in largest_ran_on:
                sizes = tuple(dict.fromkeys((served.min, served.opt)))
            with backend.load(bundle, artifact, Options()) as session:
                records += parity.check_session(session, golden, batches=sizes, max_abs=max_abs)
            if not artifact.is_quantised:
                break
    if not records:
        purpose = f"proving {artifact.path} on this machine"
        raise MissingDependency("openvino", extra="openvino", purpose=purpose)
    return records


def gemms_failure(
    bundle: Bundle,
    artifact: Artifact,
    inputs: np.ndarray[Any, Any],
    scales: Mapping[str, float],
    weights: Golden,
) -> str | None:
    """What is wrong with the quantised GEMMs of a file on the runtimes here, each for itself; or None.

    Args:
        inputs: a few images (K, ...) as the file reads them.
        scales: of what each site reads, as it was quantised.
        weights: of each site, (in, out), before they were rounded.
    """
    for name in BACKENDS:
        if get_backend(name).availability().ok:
            for record in check_gemms(bundle, artifact, name, inputs, scales, weights):
                if not record.passed:
                    return f"{artifact.name} on {name}: {record.site}: {record.failures[0]}"
    return None


def engines_parity(
    bundle: Bundle,
    engines: Sequence[Artifact],
    max_abs: float | None,
    progress: Progress,
) -> list[ParityRecord]:
    """Run every engine that this machine can run; note those that it cannot.

    Raises:
        ParityError: an engine is wrong.
    """
    records: list[ParityRecord] = []
    for engine in engines:
        artifact, backend = bundle.artifact(engine.name), get_backend(engine.format)
        if reason := backend.availability().reason or backend.supports(bundle.manifest, artifact):
            hint = f"vitdeploy verify --backend {backend.name}, where it runs"
            progress.note(f"{engine.name}: built, not yet run ({reason}); {hint}")
            continue
        with progress.stage(f"parity {engine.precision}") as stage:
            with backend.load(bundle, artifact, Options()) as session:
                golden = bundle.of(artifact).golden(artifact)
                measured = parity.check_session(session, golden, max_abs=max_abs)
            stage.detail = f"{engine.name}, {worst(measured)}"
        if trouble := first_failure(measured):
            raise ParityError(trouble, hint="build it from another precision")
        records += measured
    return records


def worst(records: Sequence[ParityRecord]) -> str:
    """The largest error among records, for a stage's line."""
    relative = [r.metrics.relative for r in records if r.metrics.relative is not None]
    bad = sum(r.metrics.nonfinite for r in records)
    means = [r.metrics.mean_relative for r in records if r.metrics.mean_relative is not None]
    shown = f"relative error {max(relative):.2g}" if relative else "no finite output"
    shown += f", mean {max(means):.2g}" if means else ""
    sizes = ", ".join(dict.fromkeys(str(record.batch) for record in records))
    backends = " and ".join(dict.fromkeys(record.backend for record in records))
    where = f" on {backends}, batch {sizes}" if records else ""
    return shown + (f", {bad} NaN or Inf" if bad else "") + where


def first_failure(records: Sequence[ParityRecord]) -> str | None:
    """What the first failed record says, with where; None if all passed."""
    for record in records:
        if not record.passed:
            reasons = "; ".join(record.failures) or "failed"
            return f"{record.title}: {reasons}"
    return None
