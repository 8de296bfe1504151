"""Engines of ONNX artifacts: raw bytes, and a record beside each. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from vitdeploy.bundle.files import sha256
from vitdeploy.bundle.folder import Bundle, BundleWriter
from vitdeploy.bundle.manifest import Artifact
from vitdeploy.bundle.quantisation import QuantisedGemms
from vitdeploy.bundle.sizes import named
from vitdeploy.config import BatchRange, Precision
from vitdeploy.errors import BundleError, UsageError
from vitdeploy.exporter.artifact_parity import engines_parity
from vitdeploy.exporter.request import (
    EngineRequest,
    Order,
    PlannedEngine,
    engines_of,
    orders_of,
    require_fp8,
    without_fp8,
)
from vitdeploy.progress import Progress
from vitdeploy.tensorrt.child import build_engines
from vitdeploy.tensorrt.records import BuildJob, BuildResult, BuiltEngine, EngineRecord


def write_engines(
    order: Order, source: Artifact, writer: BundleWriter, progress: Progress
) -> tuple[Artifact, ...]:
    """Build an order's engines of an ONNX artifact that lies in the writer's folder; all from one parse.

    Of fp8 there are none, and a note, where the order is for GPUs without it.

    Raises:
        UsageError: the artifact's fixed batch size and the profiles do not agree.
        PrecisionError, ExportError: an engine could not be built, or not as declared.
        MissingDependency, DeviceUnavailable: the library does not load, or the GPU is gone.
    """
    engines = _engines(order, source)
    if source.precision == "fp8" and (lacking := without_fp8(order)):
        progress.note(f"no {order.flavour.name} engine of {source.name}: {', '.join(lacking)} has no fp8")
        return ()
    job = BuildJob(
        flavour=order.flavour.name,
        onnx=str(writer.directory / source.path),
        input=source.inputs[0],
        precision=default_precision(source),
        islands=source.islands,
        quantised=QuantisedGemms.of(source.precision, source.quantisation),
        profiles=_profiles(order.request, source),
        targets=order.groups,
        outputs=tuple(str(writer.file(engine.path)) for engine in engines),
        settings=order.request.settings,
    )
    with progress.stage(f"{order.flavour.name} {source.name.removeprefix('onnx-')}") as stage:

        def report(phase: str, fraction: float) -> None:
            stage.detail = f"{phase}, {100 * fraction:.0f} %"
            progress.updated(stage)

        result = build_engines(job, report)
        stage.size = sum(engine.size for engine in result.engines)
        places = ", ".join("+".join(engine.targets) for engine in engines)
        stage.detail = (
            f"for {places}; {result.fusion.lines()[0] if result.fusion.places else 'nothing to fuse'}"
        )
    sources = {name: sha256(writer.directory / name) for name in source.files}
    return tuple(
        _keep(engine, source, job, result, built, sources, writer)
        for engine, built in zip(engines, result.engines, strict=True)
    )


def _keep(
    engine: PlannedEngine,
    source: Artifact,
    job: BuildJob,
    result: BuildResult,
    built: BuiltEngine,
    sources: dict[str, str],
    writer: BundleWriter,
) -> Artifact:
    """Write the record beside an engine, and return its artifact."""
    record = EngineRecord(
        flavour=job.flavour,
        version=result.version,
        targets=engine.targets,
        gpu=result.gpu,
        size=built.size,
        sha256=sha256(writer.directory / engine.path),
        source=source.name,
        source_sha256=sources,
        profiles=job.profiles,
        settings=job.settings,
        build_seconds=built.seconds,
        proof=result.proof,
        fusion=built.fusion or result.fusion,
    )
    writer.file(engine.record).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    largest = max(job.profiles, key=lambda batch: batch.max)
    return Artifact(
        name=engine.name,
        format=job.flavour,
        precision=source.precision,
        requested=source.requested,
        path=engine.path,
        files=(engine.path, engine.record),
        batch=BatchRange(min(batch.min for batch in job.profiles), largest.opt, largest.max),
        inputs=source.inputs,
        outputs=source.outputs,
        islands=source.islands,
        targets=engine.targets,
        image_size=source.image_size,
        fallback=source.fallback,
        proof=result.proof,
        quantisation=source.quantisation,
        build_seconds=built.seconds,
        nodes=result.layers,
    )


def add_engines(
    bundle: Bundle,
    request: EngineRequest,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Build engines of a bundle's ONNX artifacts and add them to it; it stays as it was when anything fails.

    Args:
        force: replace engines of the same name.

    Raises:
        UsageError: nothing to build, or nothing to build it from; fp8 for GPUs without it.
        BundleError: the bundle is damaged, has such an engine, or was changed by somebody else meanwhile.
        MissingDependency, DeviceUnavailable, PrecisionError, ExportError: as :func:`write_engines`.
        ParityError: an engine that runs here does not compute what the reference computes.
    """
    progress = progress or Progress()
    orders, notes = orders_of(request)
    for note in notes:
        progress.note(note)
    if not orders:
        raise UsageError("no engine can be built here", hint="vitdeploy doctor shows what is installed")
    sources = _sources(bundle, request.precisions)
    if any(source.precision == "fp8" for source in sources):
        require_fp8(orders)
    ordered = [engine.name for order in orders for source in sources for engine in _engines(order, source)]
    present = [artifact.name for artifact in bundle.manifest.artifacts if artifact.name in ordered]
    if present and not force:
        raise BundleError(f"{bundle.root}: already has {', '.join(present)}", hint="--force replaces it")
    bundle.verify_hashes(name for source in sources for name in source.files)
    manifest = bundle.manifest
    kept = tuple(artifact for artifact in manifest.artifacts if artifact.name not in ordered)
    parity = tuple(record for record in manifest.parity if record.artifact not in ordered)
    with bundle.edit() as writer:
        built = [a for order in orders for s in sources for a in write_engines(order, s, writer, progress)]
        draft = manifest.model_copy(update={"artifacts": (*kept, *built), "parity": parity})
        records = engines_parity(writer.seal(draft), built, manifest.max_abs, progress)
        writer.seal(draft.model_copy(update={"parity": (*parity, *records)}))
        return writer.commit()


def _engines(order: Order, source: Artifact) -> tuple[PlannedEngine, ...]:
    """The engines of an ONNX artifact."""
    size = source.image_size
    kind = source.name.removeprefix("onnx-").removesuffix(named("", size))
    return engines_of(order, kind, size)


def default_precision(artifact: Artifact) -> Precision:
    """The dtype of an artifact outside of its islands, and of its quantised GEMMs."""
    if artifact.quantisation is not None:
        return artifact.quantisation.rest
    every: tuple[Precision, ...] = get_args(Precision)
    stated = (artifact.precision, artifact.requested)
    return next((name for said in stated for name in every if name == said), "fp16")


def builds_engines(artifact: Artifact) -> bool:
    """Whether engines are built from it: of what is quantised, from the form whose rest is in fp16."""
    rest = artifact.quantisation.rest if artifact.quantisation else "fp16"
    return artifact.format == "onnx" and rest == "fp16"


def _sources(bundle: Bundle, precisions: Sequence[str]) -> list[Artifact]:
    onnx = [artifact for artifact in bundle.manifest.artifacts if builds_engines(artifact)]
    chosen = [a for a in onnx if not precisions or {a.precision, a.requested}.intersection(precisions)]
    if not chosen:
        what = f"in {', '.join(precisions)} " if precisions else ""
        hint = f"it has {', '.join(a.name for a in onnx)}" if onnx else "export it with --format onnx"
        raise UsageError(f"{bundle.root}: has no ONNX artifact {what}to build engines from", hint=hint)
    return chosen


def _profiles(request: EngineRequest, source: Artifact) -> tuple[BatchRange, ...]:
    profiles = request.profiles or (source.batch,)
    if source.batch.fixed and profiles != (source.batch,):
        raise UsageError(
            f"{source.path} has the fixed batch size {source.batch.min}: no other profile fits",
            hint="export with --batch MIN,OPT,MAX",
        )
    return profiles
