"""The parts of a manifest as the commands show them."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vitdeploy.cli import output
from vitdeploy.config import size_name
from vitdeploy.errors import ParityError

if TYPE_CHECKING:
    from vitdeploy.bundle.folder import Bundle
    from vitdeploy.bundle.manifest import (
        Artifact,
        Choice,
        Manifest,
        Rewrite,
    )
    from vitdeploy.bundle.proofs import OpPrecision, ParityRecord
    from vitdeploy.bundle.quantisation import QuantisationRecord
    from vitdeploy.config import Preprocess
    from vitdeploy.optimiser.record import Optimisation
    from vitdeploy.verification.accuracy import AccuracyRecord

_KINDS = {
    "Softmax": "softmax",
    "patch_embed": "fused GEMM",
    "layernorm_linear": "fused GEMM",
    "linear_residual": "fused GEMM",
    "head_linear": "fused GEMM",
    "attention": "fused attention",
    "layernorm_attention": "fused attention",
    "absorbed_attention": "fused attention",
    "add_layernorm": "normalisation",
}
"""Operations by what they are; the fused kernels have names of their own."""
_PLURAL = {"softmax": "softmaxes", "fused attention": "fused attentions"}


PREPROCESS = ("turn", "colour", "resize", "crop", "resample", "pad", "rescale", "mean", "std")
"""The steps of preprocessing, by the names of what says them."""
_MARGINS = {"floor": "rounded down", "round": "rounded to even"}


def preprocess_rows(spec: Preprocess) -> list[tuple[str, str]]:
    """Every step from an image file to pixel values, by the names of ``PREPROCESS``."""
    height, width = spec.size
    target = "x".join(map(str, spec.resize_to or spec.size))
    how = {
        "exact": f"to {target}",
        "shortest_edge": f"shorter side to {spec.resize_edge}",
        "cover": f"to cover {target}",
        "contain": f"to fit into {target}",
        "none": "not at all",
    }[spec.resize]
    steps = {
        "turn": "as the EXIF orientation says" if spec.exif else None,
        "colour": "grey" if spec.channels == 1 else None,
        "resize": how,
        "resample": spec.resample if spec.resize != "none" else None,
        "crop": f"{height}x{width} from the middle, an odd margin {_MARGINS[spec.crop_rounding]}",
        "pad": f"with {_numbers(spec.pad)}" if any(spec.pad) else None,
        "rescale": "by 1/255" if spec.rescale == 1 / 255 else f"by {spec.rescale:g}",
        "mean": _numbers(spec.mean),
        "std": _numbers(spec.std),
    }
    if spec.resize == "exact" and spec.resize_to is None:
        steps["crop"] = None
    return [(name, text) for name in PREPROCESS if (text := steps[name])]


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def worst_relative(manifest: Manifest, artifact: Artifact) -> float | None:
    """The largest relative error among an artifact's parity records."""
    errors = [
        record.metrics.relative
        for record in manifest.parity
        if record.artifact == artifact.name and record.metrics.relative is not None
    ]
    return max(errors, default=None)


def artifact_dict(manifest: Manifest, artifact: Artifact) -> dict[str, Any]:
    """An artifact for ``--json``: its record without the list of operations, with its worst error."""
    facts = artifact.model_dump(mode="json", exclude={"proof"})
    proof = artifact.proof
    facts["relative_error"] = worst_relative(manifest, artifact)
    facts["precision_proof"] = {"ok": proof.ok, "operations": count_ops(proof.ops)} if proof else None
    return facts


def print_artifacts(manifest: Manifest) -> None:
    """Print a line for each artifact; its size is that of all its files, shared ones among them."""
    output.table(
        ("file", "precision", ">nodes", ">size", ">relative error", ">fp32 islands"),
        [
            (
                artifact.path,
                artifact.precision,
                str(artifact.nodes or "-"),
                output.size(artifact.size),
                output.small(worst_relative(manifest, artifact)),
                str(len(artifact.islands)),
            )
            for artifact in manifest.artifacts
        ],
    )
    users = Counter(name for artifact in manifest.artifacts for name in artifact.files)
    for name, count in users.items():
        if count > 1:
            size = output.size(manifest.files[name].size)
            output.line(f"{name}, {size}, is shared by {count} of them and counted in each")
    for artifact in manifest.artifacts:
        if artifact.fallback:
            output.line(
                f"{artifact.path} is {artifact.precision}, not {artifact.requested}: {artifact.fallback}"
            )


def print_rewrites(rewrites: Sequence[Rewrite], flops: int | None) -> None:
    if not rewrites:
        return
    saved = sum(rewrite.flops_saved for rewrite in rewrites)
    share = f", {100 * saved / flops:.1f} % of {output.flops(flops)} saved" if flops and saved else ""
    output.heading(f"{len(rewrites)} exact rewrites{share}")
    rows = [(r.name, output.flops(r.flops_saved) if r.flops_saved else "-", r.detail) for r in rewrites]
    output.table(("rewrite", ">saved", "what"), rows)


def print_proofs(manifest: Manifest) -> None:
    audited = [artifact for artifact in manifest.artifacts if artifact.proof]
    if audited:
        output.heading("precision proof")
    for artifact in audited:
        if artifact.proof:
            verdict = "" if artifact.proof.ok else "  NOT as declared"
            output.line(f"  {artifact.path}: {proof_line(artifact.proof.ops)}{verdict}")


def print_quantisation(manifest: Manifest) -> None:
    """Print for each quantised artifact what of it is quantised, and what is not."""
    records = [(a, a.quantisation) for a in manifest.artifacts if a.quantisation]
    if records:
        output.heading("quantisation")
    for artifact, record in records:
        output.line(f"  {artifact.path}: {quantisation_line(artifact.precision, record)}")


def quantisation_line(precision: str, record: QuantisationRecord) -> str:
    """``49 of 50 GEMMs in int8 (97.1 % of the multiplications), weights of 7 bits, the rest in fp32;
    calibrated with 32 images; left in fp32: patch_embed``."""
    count = len(record.sites) + len(record.left_out)
    gemms = f"{len(record.sites)} of {output.count(count, 'GEMM')} in {precision}"
    parts = [f"{gemms} ({100 * record.macs:.1f} % of the multiplications)"]
    if precision == "int8":
        parts.append(f"weights of {record.weight_bits} bits")
    if record.attention:
        parts.append("the products of attention, too")
    parts.append(f"the rest in {record.rest}")
    left = f"; left in {record.rest}: {', '.join(record.left_out)}" if record.left_out else ""
    return f"{', '.join(parts)}; calibrated with {output.count(record.images, 'image')}{left}"


def print_parity(records: Sequence[ParityRecord]) -> None:
    rows, several = [], any(record.output for record in records)
    for record in records:
        m = record.metrics
        bad = f", {m.nonfinite} NaN or Inf" if m.nonfinite else ""
        rows.append(
            (
                record.artifact,
                record.backend if record.provider == "cpu" else f"{record.backend} ({record.provider})",
                str(record.batch),
                *((record.output or "",) if several else ()),
                output.small(m.relative),
                output.small(m.max_abs),
                output.small(None if m.cosine is None else 1 - m.cosine),
                output.small(m.kl),
                f"{m.top1_agree}/{m.top1_compared}" if m.top1_compared else "-",
                "ok" if record.passed else f"FAILED{bad}",
            )
        )
    measured = (">relative", ">max abs", ">1-cosine", ">KL", ">top-1", "")
    output.table(("artifact", "backend", ">batch", *(("output",) if several else ()), *measured), rows)


def print_accuracy(records: Sequence[AccuracyRecord]) -> None:
    output.heading(f"accuracy on {records[0].images} images")
    rows = [
        (a.model, a.backend, f"{100 * a.correct / a.images:.2f} %", f"{a.agree}/{a.images}") for a in records
    ]
    output.table(("model", "backend", ">accuracy", ">as the reference"), rows)


def count_ops(ops: Sequence[OpPrecision]) -> list[dict[str, Any]]:
    """How many operations of each kind compute in each dtype."""
    from vitdeploy.bundle.dtypes import DATATYPES

    counts = Counter((_kind(op), DATATYPES.get(op.dtype, op.dtype).lower(), op.island) for op in ops)
    return [
        {"kind": kind, "dtype": dtype, "count": count, "declared_island": island}
        for (kind, dtype, island), count in counts.items()
    ]


def proof_line(ops: Sequence[OpPrecision]) -> str:
    """``97 GEMMs fp16, 25 normalisations fp32 (declared)``."""
    parts = []
    for row in count_ops(ops):
        kind = row["kind"]
        name = kind if row["count"] == 1 else _PLURAL.get(kind, f"{kind}s")
        declared = " (declared)" if row["declared_island"] else ""
        parts.append(f"{row['count']} {name} {row['dtype']}{declared}")
    return ", ".join(parts) or "no operation whose precision matters"


def _kind(op: OpPrecision) -> str:
    from vitdeploy.bundle.onnx_graph import GEMMS, NORMALISATIONS

    if op.op in GEMMS:
        return "GEMM"
    return "normalisation" if op.op in NORMALISATIONS else _KINDS.get(op.op, "mean")


class Verdict(Protocol):
    """A report that holds or does not."""

    def as_dict(self) -> dict[str, Any]: ...

    def check(self) -> None: ...


def json_verdict(report: Verdict) -> int:
    """Print a report as the command's document, with what did not hold; returns the exit code."""
    document = report.as_dict()
    code = 0
    try:
        report.check()
    except ParityError as error:
        document["error"] = error.as_dict()
        output.error(error.message, error.hint)
        code = error.exit_code
    output.json_document(document)
    return code


def show_bundle(bundle: Bundle, where: Path, stages: output.Stages, as_json: bool) -> None:
    """Print a bundle that was written: its artifacts, rewrites and proofs, and what to do next."""
    if not as_json:
        return _print_bundle(bundle, where)
    return output.json_document(bundle_dict(bundle, where, stages))


def bundle_dict(bundle: Bundle, where: Path, stages: output.Stages) -> dict[str, Any]:
    """A bundle that was written, for ``--json``."""
    manifest = bundle.manifest
    return {
        "ok": True,
        "bundle": str(where),
        "artifacts": [artifact_dict(manifest, artifact) for artifact in manifest.artifacts],
        "rewrites": [rewrite.model_dump(mode="json") for rewrite in manifest.rewrites],
        "parity": [record.model_dump(mode="json") for record in manifest.parity],
        "stages": stages.as_list(),
        "notes": stages.notes,
    }


def choice_line(choice: Choice) -> str:
    """What was found best on a machine, and how fast it is there."""
    what = " ".join(filter(None, (choice.backend, choice.artifact)))
    threads = f", {output.count(choice.threads, 'thread')}" if choice.threads else ""
    threads += ", spinning" if choice.spin else ""
    sessions = f", {choice.concurrency} sessions" if choice.concurrency > 1 else ""
    size = f", {size_name(choice.image_size)}" if choice.image_size else ""
    speed = f"{choice.p50_ms:.2f} ms, {choice.images_per_s:.1f} images/s"
    return f"for {choice.goal}: {what}{size}, batch {choice.batch}{threads}{sessions}: {speed}"


def print_optimisation(record: Optimisation, *, whole: bool) -> None:
    """Print what was tried.

    Args:
        whole: every contestant; else without those that were merely slower.
    """
    shown = [one for one in record.tried if whole or one.verdict not in ("slower", "level")]
    output.heading(f"tried for {record.goal} at batch {record.batch}, on {', '.join(record.machine)}")
    rows = [
        (
            one.label,
            "-" if one.p50_ms is None else f"{one.p50_ms:.2f}",
            "-" if one.images_per_s is None else f"{one.images_per_s:.1f}",
            "-" if one.spread is None else f"±{one.spread:.0%}",
            output.small(one.relative),
            "-" if one.top1_difference is None else f"{100 * one.top1_difference:+.2f}",
            one.verdict,
            one.why,
        )
        for one in shown
    ]
    columns = ("what", ">median ms", ">images/s", ">spread", ">relative error", ">top-1 points", "", "why")
    output.table(columns, rows)


def _print_bundle(bundle: Bundle, where: Path) -> None:
    output.heading(f"{where}")
    print_artifacts(bundle.manifest)
    print_rewrites(bundle.manifest.rewrites, bundle.manifest.flops)
    print_quantisation(bundle.manifest)
    print_proofs(bundle.manifest)
    output.heading("next")
    folder = shlex.quote(str(where))
    output.line(f"  vitdeploy verify {folder}")
    if bundle.manifest.classifies_images:
        output.line(f"  vitdeploy predict {folder} IMAGE")
    output.line(f"  vitdeploy bench {folder}")
