"""The fused kernels of one model, compiled for GPUs that need not be here.

Beside the cubins of each architecture lies the table of configurations they were compiled with: a plan
made from another table would ask for other kernels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitdeploy.backends.triton import TABLE
from vitdeploy.bundle.folder import BundleWriter
from vitdeploy.bundle.manifest import (
    AOT,
    Artifact,
    input_spec,
    output_spec,
)
from vitdeploy.bundle.proofs import OpPrecision, PrecisionProof
from vitdeploy.bundle.sizes import named, sized
from vitdeploy.config import BatchRange, InputKind, ModelConfig, Output, Precision, Size
from vitdeploy.errors import ExportError
from vitdeploy.exporter.request import kernels_library
from vitdeploy.model.precision import DTYPES
from vitdeploy.progress import Progress

if TYPE_CHECKING:
    from vitdeploy_kernels.launch import Launch

_FOLDER = "kernels"
_OPERANDS = ("weight_ptr", "qkv_ptr", "queries_ptr", "x_ptr")


def write_kernels(
    config: ModelConfig,
    precision: Precision,
    writer: BundleWriter,
    *,
    batch: BatchRange,
    architectures: Sequence[str],
    output: Output,
    input_kind: InputKind,
    progress: Progress,
    place: Size | None = None,
) -> Artifact:
    """Compile every kernel of the model's plans, for each batch bucket and architecture.

    Args:
        place: the image size as artifacts name it; None is the first.

    Raises:
        ExportError: a kernel cannot be compiled.
    """
    begin = time.perf_counter()
    aot, package, tables = (kernels_library(name) for name in ("aot", "package", "config"))
    needed: dict[str, list[Launch]] = {}
    plan: list[tuple[str, Launch]] = []
    chosen = {arch: tables.shipped_table(aot.ARCHITECTURES[arch]) for arch in architectures}
    for arch, table in chosen.items():
        plan = _launches(config, precision, batch, output, input_kind, table)
        needed[arch] = [launch for _, launch in plan]
    name = named(f"{AOT}-{precision}", place)
    root = writer.file(f"{_FOLDER}/{sized(precision, place)}/{TABLE}").parent
    with progress.stage(name.replace(f"{AOT}-", f"{AOT} ")) as stage:
        try:
            files = package.write_package(root, needed)
        except aot.AotError as error:
            raise ExportError(f"{name}: {error}") from error
        for arch, table in chosen.items():
            path = root / arch / TABLE
            path.write_text(tables.format_table(table), encoding="utf-8")
            files.append(path)
        stage.size = sum(path.stat().st_size for path in files)
        cubins = sum(path.suffix == ".cubin" for path in files)
        stage.detail = f"{cubins} kernels for {', '.join(architectures)}"
    proof = _proof(plan, precision)
    return Artifact(
        name=name,
        format=AOT,
        precision=precision,
        requested=precision,
        path=_name(root / architectures[0] / package.INDEX, writer),
        files=tuple(sorted(_name(path, writer) for path in files)),
        batch=batch,
        inputs=(input_spec(config, input_kind),),
        outputs=(output_spec(config, output),),
        proof=proof,
        image_size=place,
        build_seconds=round(time.perf_counter() - begin, 3),
        nodes=len(proof.ops),
    )


def _launches(
    config: ModelConfig,
    precision: Precision,
    batch: BatchRange,
    output: Output,
    input_kind: InputKind,
    table: Any,
) -> list[tuple[str, Launch]]:
    """The launches of all batch buckets, those of the largest last, with their sites."""
    from vitdeploy.model.fused import buckets_of
    from vitdeploy.model.registry import architecture_of

    shape, dtype = architecture_of(config).kernel_shape(config, output, input_kind), DTYPES[precision]
    plans = kernels_library("plans")
    return [pair for size in buckets_of(batch) for pair in plans.launches(shape, dtype, size, table)]


def _proof(plan: Sequence[tuple[str, Launch]], precision: Precision) -> PrecisionProof:
    """The dtype of what each kernel multiplies, read from its launch; one row a site."""
    declared = str(DTYPES[precision]).removeprefix("torch.")
    ops = {}
    for site, launch in plan:
        operand = next(launch.arguments[name] for name in _OPERANDS if name in launch.arguments)
        dtype = str(getattr(operand, "dtype", "undefined")).removeprefix("torch.")
        ops[site] = OpPrecision(name=site, op=launch.name.removesuffix("_kernel"), dtype=dtype)
    return PrecisionProof(ops=tuple(ops.values()), ok=all(op.dtype == declared for op in ops.values()))


def _name(path: Path, writer: BundleWriter) -> str:
    return path.relative_to(writer.directory).as_posix()
