"""From a model to a bundle on disk: reference, artifacts, parity, manifest, in that order, all or nothing."""

from __future__ import annotations

import platform
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from vitdeploy.bundle import golden
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.bundle.folder import WEIGHTS, Bundle, BundleWriter
from vitdeploy.bundle.manifest import Provenance
from vitdeploy.checkpoint.opening import Checkpoint, UserModule
from vitdeploy.checkpoint.stated import check_labels
from vitdeploy.exporter.assembly import Assembly
from vitdeploy.exporter.job import golden_arrays
from vitdeploy.exporter.onnx import INPUT
from vitdeploy.exporter.plan import engines_note
from vitdeploy.exporter.quantised import open_calibration, require_same_model
from vitdeploy.exporter.request import ExportRequest, orders_of
from vitdeploy.exporter.subject import further_subjects, open_subject
from vitdeploy.machine.temporary import temporary_folder
from vitdeploy.progress import Progress
from vitdeploy.verification.accuracy import find_labelled


def run_export(
    request: ExportRequest,
    folder: Path | None = None,
    *,
    force: bool = False,
    failures: dict[ArtifactPrecision, str] | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Export a model into a new bundle and prove every artifact; nothing is left behind when it fails.

    Args:
        failures: receives the precisions beside the first that cannot be built or are not right, and why; the
            bundle is then made without them. When omitted, one that fails is the end of the export.

    Raises:
        UsageError, CheckpointError, BundleError: bad input (exit code 2).
        MissingDependency: a library this export needs is not installed.
        DeviceUnavailable: no temporary file can be written.
        ExportError: an artifact could not be built.
        ParityError: an artifact does not compute what the reference computes, and no fallback helps.
    """
    progress = progress or Progress()
    target = folder or request.default_folder
    temporary_folder()  # PyTorch's tracer needs one, and says something else where there is none
    orders, impossible = orders_of(request.engines)
    with BundleWriter(target, force=force) as writer:
        with progress.stage("load") as stage:
            opened, subject = open_subject(request, failures)
            if failures:
                request = replace(request, precisions=request.floats, calibration=None)
            subjects = (subject, *further_subjects(opened, request))
            stage.detail = f"{opened.source}, {subject.parameters / 1e6:.1f} M parameters"
            images = open_calibration(request, subject) if request.quantised else None
            if images is not None:
                counts = f"{len(images.images)} images to calibrate with, {len(images.held_out)} held out"
                stage.detail = f"{stage.detail}, {counts}"
        for note in (*opened.notes, *subject.notes, *([images.note] if images and images.note else [])):
            progress.note(note)
        provenance = _provenance(request, opened)
        del opened  # and its weights, once they are in the bundle
        assembly = Assembly(request, provenance, writer, progress, subjects, images, failures)
        for job in assembly.jobs:
            with progress.stage(job.titled("reference")) as stage:
                job.golden = golden_arrays(job.subject, None if job.place is None else golden.FEWER_NAMES)
                noun = "images" if len(job.golden[INPUT]) > 1 else "image"
                stage.detail = f"{len(job.golden[INPUT])} golden {noun} in float64"
        if subject.labels is not None:
            check_labels(subject.labels, assembly.classes)
        with progress.stage("weights") as stage:
            stage.size = sum(job.write_tensors() for job in assembly.jobs)
        if request.calibration is not None:
            require_same_model(request.calibration, writer.directory / WEIGHTS)
        if request.data is not None:
            assembly.labelled = find_labelled(request.data, assembly.manifest())
        del subjects, subject
        for job in assembly.jobs:
            job.reload()
        assembly.build(orders, engines_note(orders, impossible))
        return writer.commit()


def _provenance(request: ExportRequest, opened: Checkpoint | UserModule) -> Provenance:
    libraries = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy", "pillow", "safetensors")
    return Provenance(
        source=opened.source,
        family=opened.family,
        seed=opened.seed,
        source_files=dict(opened.provenance),
        versions={name: metadata.version(name) for name in libraries},
        platform=f"{platform.system()} {platform.machine()}, Python {sys.version.split()[0]}",
        command=request.command,
        notes=opened.notes,
        facts=dict(opened.facts),
    )
