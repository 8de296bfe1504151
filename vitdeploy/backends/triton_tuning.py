"""Finds the fastest kernel configurations for this GPU at a bundle's shapes, and keeps them in the bundle."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitdeploy.backends.base import get_backend, require_support
from vitdeploy.backends.triton import PRECISIONS, TUNED
from vitdeploy.bundle.dtypes import PRECISION_DTYPES
from vitdeploy.bundle.folder import Bundle
from vitdeploy.config import BatchRange
from vitdeploy.errors import DeviceUnavailable, UsageError
from vitdeploy.progress import Progress

if TYPE_CHECKING:
    from vitdeploy_kernels.config import Table
    from vitdeploy_kernels.tuner import Finding, Target


@dataclass(frozen=True)
class TuneReport:
    """What came of a search."""

    gpu: str
    table: Path
    """The file with the configurations."""
    tuned: int
    shapes: int
    """How many there are; those that the time did not suffice for keep their defaults."""
    lines: tuple[str, ...]
    """One for each that was tuned."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"ok": True, **asdict(self), "table": str(self.table)}


def tune_bundle(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    batches: Sequence[int] | None = None,
    precision: str = "fp16",
    budget: float = 240.0,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> TuneReport:
    """Search the configurations of every kernel for the bundle's model on this machine's GPU.

    Every candidate is compared with float64 before it is timed.

    Args:
        batches: batch sizes to tune for; the artifacts' buckets when omitted.
        budget: seconds.
        folder: where to write the table; into the bundle, where the triton backend finds it, when omitted.

    Raises:
        UsageError: no such precision, or the kernels do not run this bundle.
        BundleError: the bundle cannot be written.
        DeviceUnavailable: there is no GPU that they run on.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
    kind = next((name for name in PRECISIONS if name == precision), None)
    if kind is None:
        raise UsageError(f"the kernels compute in {' or '.join(PRECISIONS)}, not in {precision!r}")
    if folder is not None and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UsageError(f"{folder} is not a folder that can be written")  # before the search, not after it
    backend = get_backend("triton")
    require_support(backend, opened, None)
    state = backend.availability()
    if not state.ok:
        raise DeviceUnavailable(f"nothing to tune for: {state.reason}", hint="run it where the GPU is")
    target = _target()
    table, findings, shapes, lines = _search(
        opened, target, batches, PRECISION_DTYPES[kind], budget, progress or Progress()
    )
    path = _keep(opened, table, folder)
    return TuneReport(target.name, path, len(findings), shapes, tuple(lines))


def _target() -> Target:
    from vitdeploy_kernels.support import UnsupportedError
    from vitdeploy_kernels.tuner import this_gpu

    try:
        return this_gpu()
    except UnsupportedError as error:
        raise DeviceUnavailable(f"nothing to tune for: {error}", hint="run it where the GPU is") from error


def _search(
    bundle: Bundle,
    target: Target,
    batches: Sequence[int] | None,
    dtype_name: str,
    budget: float,
    progress: Progress,
) -> tuple[Table, list[Finding], int, list[str]]:
    import torch

    from vitdeploy.model.fused import buckets_of
    from vitdeploy.model.registry import architecture_of
    from vitdeploy_kernels import tuner
    from vitdeploy_kernels.config import shipped_table
    from vitdeploy_kernels.warming import Warmer

    manifest = bundle.manifest
    assert manifest.model is not None
    served = [artifact.batch for artifact in manifest.artifacts] or [BatchRange()]
    sizes = batches or sorted({size for each in served for size in buckets_of(each)})
    dtype = getattr(torch, dtype_name)
    start = shipped_table(target.capability, target.name)
    model = manifest.model
    shape = architecture_of(model).kernel_shape(model, manifest.output, manifest.input)
    specs = tuner.specs_of([shape], sizes, dtype, start)
    lines: list[str] = []
    with progress.stage("tune") as stage, Warmer(dtype, os.cpu_count() or 1) as warmer:
        warmer.submit({spec: tuner.contestants_of(spec, target, start) for spec in specs})
        build = tuner.random_problems(dtype, torch.device("cuda"))
        table, findings = tuner.tune(
            specs, target, start, build=build, budget=budget, ready=warmer.ready, report=lines.append
        )
        stage.detail = f"{len(findings)} of {len(specs)} shapes on {target.name}"
    return table, findings, len(specs), lines


def _keep(bundle: Bundle, table: Table, folder: Path | None) -> Path:
    """Write the table into a folder, or into the bundle."""
    from vitdeploy_kernels.tuner import write_table

    if folder is not None:
        return write_table(table, folder)
    with tempfile.TemporaryDirectory() as temporary:
        path = write_table(table, Path(temporary))
        name = f"{TUNED}/{path.name}"
        return bundle.add(files={name: path}).path(name)
