"""ONNX artifacts with our kernels as operators: what an engine with plugins is built from.

The operators are ONNX functions, whose bodies are the nodes they replace: the artifact runs, and is proven,
on any runtime; TensorRT is given it without the bodies, and takes the kernels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from vitdeploy.bundle.folder import BundleWriter
from vitdeploy.bundle.manifest import Artifact, Manifest, ParityRecord
from vitdeploy.config import ViTConfig
from vitdeploy.errors import ParityError, UsageError
from vitdeploy.exporter.engine_request import PLUGINS
from vitdeploy.exporter.proving import Golden, first_failure, prove_onnx, worst
from vitdeploy.progress import Progress
from vitdeploy.tensorrt.plugin_graph import FILE_SUFFIX, mark_plugins, with_plugins
from vitdeploy.tensorrt.plugin_kernels import refusal


def require_known(config: ViTConfig | None) -> ViTConfig:
    """The model's configuration.

    Raises:
        UsageError: it is a module of the user's own.
    """
    if config is None:
        raise UsageError("plugins are for ViTs that vitdeploy knows, not for modules of your own")
    return config


def add_twins(
    sources: Sequence[Artifact], manifest: Manifest, writer: BundleWriter, golden: Golden, progress: Progress
) -> tuple[list[Artifact], list[ParityRecord]]:
    """Every half-precision artifact once more, with our kernels as operators, and its proof.

    Args:
        sources: ONNX artifacts; those that have a twin already get no second one.
        manifest: of all artifacts so far.

    Raises:
        UsageError: the model is not ours to know, or no artifact is in half precision.
        MissingDependency: Triton, which knows what its kernels take, is not installed.
        ParityError: a twin is wrong.
    """
    config = require_known(manifest.model)
    half = [source for source in sources if source.format == "onnx" and source.precision != "fp32"]
    if not half:
        raise UsageError("the plugins' kernels compute in fp16 or bf16, not in fp32", hint="add --fp16")
    names = {artifact.name for artifact in half}
    plain = [a for a in half if not with_plugins(a.path) and f"{a.name}{PLUGINS}" not in names]
    twins = [twin for source in plain if (twin := _mark(source, config, writer, progress)) is not None]
    bundle = writer.seal(manifest.model_copy(update={"artifacts": (*manifest.artifacts, *twins)}))
    records = []
    for twin in twins:
        with progress.stage(f"parity {twin.precision}") as stage:
            proof = prove_onnx(bundle, bundle.artifact(twin.name), golden, manifest.max_abs)
            stage.detail = worst(proof)
        if trouble := first_failure(proof):
            raise ParityError(trouble, hint="without --plugins it is not made")
        records += proof
    return twins, records


def _mark(source: Artifact, config: ViTConfig, writer: BundleWriter, progress: Progress) -> Artifact | None:
    """Write an artifact beside its source, with every region that a kernel computes as one operator.

    The precision proof is the source's: the operators' bodies are its own nodes.

    Returns:
        The artifact; None, with a note, where no region can be marked.
    """
    import onnx

    begin = time.perf_counter()
    with progress.stage(f"plugins {source.precision}") as stage:
        model = onnx.load(writer.directory / source.path, load_external_data=False)
        marked, report = mark_plugins(model, config, refusal)
        stage.detail = str(report)
        if not report.marked:
            progress.note(f"no plugins in {source.path}: {report}")
            return None
        path = writer.file(source.path.removesuffix(".onnx") + FILE_SUFFIX)
        onnx.save(marked, path)
        onnx.checker.check_model(str(path), full_check=True)
        stage.size = path.stat().st_size
    return source.model_copy(
        update={
            "name": f"{source.name}{PLUGINS}",
            "path": path.name,
            "files": (path.name, *(name for name in source.files if name != source.path)),
            "nodes": len(marked.graph.node),
            "build_seconds": round(time.perf_counter() - begin, 3),
        }
    )
