"""Parity: does an artifact compute what the checkpoint computes? Metrics, tolerances, verdicts.

The reference is the original model in float64 on the bundle's golden inputs, computed at export. Here
is numpy only, so that a bundle can be verified where it runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitdeploy.backends.base import Array, Session, run_in_batches
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.golden import REFERENCE, reference_of
from vitdeploy.bundle.proofs import ParityMetrics, ParityRecord, Tolerance
from vitdeploy.config import Output, is_output
from vitdeploy.errors import ParityError
from vitdeploy.images.preprocess import pixel_values

Float = NDArray[np.float64]

# Measured with random weights on the golden images, worst image, ONNX Runtime, OpenVINO and PyTorch:
#            fp32            fp16 (LayerNorm in fp32; all in fp16)   bf16 (the same)
# ViT-Ti/16  7e-7 to 9e-7    5.0e-4; 1.5e-3                          4.6e-3; 1.1e-2
# ViT-B/16   1e-6 to 1.6e-6  7.7e-4; 1.8e-3                          5.9e-3; 1.4e-2
# and planted faults: tanh-GELU for erf 1e-4 (Ti) to 2.7e-4 (B), LayerNorm eps 1e-5 for 1e-6 2.5e-3 to
# 3.3e-3, no head bias 7.1e-2 to 3.8e-2.
#
# KL is about half the variance of the logits' errors: with a trained model's logits (norm 50 over 1000
# classes, errors spread over them) the relative bounds below allow it 3e-9, 1e-4 and 3e-3. Its own bound
# catches what a relative error hides: logits so large, or so far from zero, that a small share of them
# changes probabilities.
#
# Company in a batch changes the order of sums, so an image's answer may move by rounding, that is by
# what the precision itself may lose; rows that get mixed up differ by a multiple of it.
TOLERANCES: Mapping[ArtifactPrecision, Tolerance] = {
    # 30 times the worst measured: room for deeper models, and for trained ones, whose massive activations
    # cost digits; half of the subtlest fault.
    "fp32": Tolerance(relative=5e-5, kl=1e-6, batch_invariance=5e-5),
    # 6 times the worst measured: trained weights spread wider than random ones and lose more.
    "fp16": Tolerance(relative=1e-2, kl=1e-3, batch_invariance=1e-2),
    # Islands only take rounding away from fp16.
    "mixed": Tolerance(relative=1e-2, kl=1e-3, batch_invariance=1e-2),
    # Three bits fewer than fp16 lose 8 times as much; less room, so that a lost head bias still shows.
    "bf16": Tolerance(relative=5e-2, kl=1e-2, batch_invariance=5e-2),
    # Of a trained model's held-out images (docs/quantisation.md): twice the mean that the recipe looks for; a
    # naive quantiser's worst image of .4 is beyond.
    # Rounding amplifies what company in a batch changes: 1e-7 of the embedding becomes 4 % of the output.
    "int8": Tolerance(relative=0.25, mean=0.08, kl=1e-2, batch_invariance=0.1),
    # E4M3 keeps four significant bits of every number: .035 to .057 is what the recipe measures.
    "fp8": Tolerance(relative=0.35, mean=0.12, kl=2e-2, batch_invariance=0.1),
}


_FEW = 5
"""A row of so many elements is far from zero, whatever the weights."""

PREPROCESS_TOLERANCE = 1e-5
"""Rounding of float32; one level of 256 off is 4e-3 or more."""


def _kind(name: str) -> Output:
    """What an output is; whatever a user's own model calls its output is ranked as logits."""
    return name if is_output(name) else "logits"


def measure_parity(reference: Array, outputs: Array, tolerance: Tolerance, output: Output) -> ParityMetrics:
    """Measure outputs against the float64 reference, row by row.

    Args:
        reference: (R, ...), float64.
        outputs: the same shape, any floating dtype.
        tolerance: decides which of the reference's rankings are wider than rounding.
        output: only logits have a softmax and a ranking.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != outputs.shape:
        raise ValueError(f"outputs have the shape {outputs.shape}, the reference {reference.shape}")
    rows = len(reference)
    if not reference.size:
        return ParityMetrics(rows=rows, elements=0)
    expected, actual = (array.reshape(rows, -1).astype(np.float64) for array in (reference, outputs))
    numbers = np.isfinite(actual)
    finite = numbers.all(axis=1)
    counts = {
        "rows": rows,
        "elements": int(expected.size),
        "nonfinite": int((~numbers).sum()),
        "worst": None if finite.all() else int(np.argmin(finite)),
    }
    if not finite.any():
        return ParityMetrics(**counts)
    expected, actual = expected[finite], actual[finite]
    error, relative = np.abs(actual - expected), _relative(actual - expected, expected)
    if counts["worst"] is None:
        counts["worst"] = int(np.argmax(relative))
    ranking = _ranking(expected, actual, tolerance) if output == "logits" else {}
    if tolerance.mean is not None:
        ranking["mean_relative"] = float(relative.mean())
    return ParityMetrics(
        **counts,
        **ranking,
        max_abs=float(error.max()),
        mean_abs=float(error.mean()),
        relative=float(relative.max()),
        cosine=float(_cosine(expected, actual).min()),
    )


def _norm(rows: Float) -> Float:
    norm: Float = np.linalg.norm(rows, axis=1)
    return norm


def _size(expected: Float) -> Float:
    """What an error of each row is relative to: its norm; of few elements at least what rows have on average.

    A single output may be near zero for one image, and is then no less exact than for the others.
    """
    norm = _norm(expected)
    if expected.shape[1] < _FEW:
        norm = np.maximum(norm, np.sqrt((norm**2).mean()))
    return np.maximum(norm, np.finfo(np.float64).tiny)  # a reference of zeros is refused elsewhere


def _relative(difference: Float, expected: Float) -> Float:
    return _norm(difference) / _size(expected)


def _cosine(expected: Float, actual: Float) -> Float:
    norms = np.maximum(_norm(expected) * _norm(actual), np.finfo(np.float64).tiny)
    cosine: Float = (expected * actual).sum(axis=1) / norms
    return cosine


def _log_softmax(logits: Float) -> Float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Float = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _ranking(expected: Float, actual: Float, tolerance: Tolerance) -> dict[str, Any]:
    """KL, and the rankings that an output within tolerance cannot change.

    An error of norm e moves the difference of two logits by at most sqrt(2) e, so a reference margin
    wider than that is decided; narrower ones (random weights, near ties) decide nothing either way.
    """
    logs = _log_softmax(expected), _log_softmax(actual)
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1)
    decided = np.sqrt(2) * tolerance.relative * _size(expected)
    order = np.sort(expected, axis=1)[:, ::-1]
    ranking: dict[str, Any] = {"kl": max(0.0, float(kl.max()))}
    if order.shape[1] > 1:
        top1 = order[:, 0] - order[:, 1] > decided
        agree = expected.argmax(axis=1) == actual.argmax(axis=1)
        ranking |= {"top1_compared": int(top1.sum()), "top1_agree": int((agree & top1).sum())}
        if tolerance.mean is not None:
            ranking["agreement"] = float(agree.mean())
    if order.shape[1] > 5:
        top5 = order[:, 4] - order[:, 5] > decided
        best = (np.argsort(-array, axis=1, kind="stable")[:, :5] for array in (expected, actual))
        shares = [len(set(a) & set(b)) / 5 for a, b in zip(*best, strict=True)]
        ranking["top5_compared"] = int(top5.sum())
        ranking["top5_overlap"] = float(np.array(shares)[top5].mean()) if top5.any() else None
    return ranking


def _source(tolerance: Tolerance) -> str:
    """Whose images these are: what is quantised is held against those of its calibration."""
    return "golden" if tolerance.mean is None else "held-out"


def tolerance_failures(metrics: ParityMetrics, tolerance: Tolerance) -> tuple[str, ...]:
    """Why the metrics are not within tolerance; empty if they are."""
    image = "" if metrics.worst is None else f" ({_source(tolerance)} image {metrics.worst})"
    if not metrics.elements:
        return ("nothing was compared",)
    if metrics.nonfinite:
        return (f"{metrics.nonfinite} NaN or infinite values{image}",)
    problems = []
    for name, value, limit in (
        (f"relative error{image}", metrics.relative, tolerance.relative),
        ("mean relative error", metrics.mean_relative, tolerance.mean),
        ("KL divergence", metrics.kl, tolerance.kl),
        ("difference alone and in a batch", metrics.batch_invariance, tolerance.batch_invariance),
        (f"max abs error{image}", metrics.max_abs, tolerance.max_abs),
    ):
        if value is not None and limit is not None and not value <= limit:
            problems.append(f"{name} {value:.2g} exceeds {limit:.2g}")
    if metrics.top1_agree < metrics.top1_compared:
        wrong = metrics.top1_compared - metrics.top1_agree
        problems.append(f"another top class on {wrong} of {metrics.top1_compared} decided rows")
    if metrics.top5_overlap is not None and metrics.top5_overlap < 1:
        problems.append(f"other top five classes: {metrics.top5_overlap:.0%} found again")
    return tuple(problems)


def passes(reference: Array, outputs: Array, tolerance: Tolerance, output: Output) -> bool:
    """Whether outputs are within a tolerance, such as one of ``TOLERANCES``."""
    return not tolerance_failures(measure_parity(reference, outputs, tolerance, output), tolerance)


def check_session(
    session: Session,
    golden: Mapping[str, Array],
    *,
    batches: Sequence[int] | None = None,
    max_abs: float | None = None,
    tolerance: Tolerance | None = None,
) -> list[ParityRecord]:
    """Hold a session against the reference: a record per batch size and output, over every golden image.

    A batch is filled by going round the golden images, and all their rows are compared. A single one has
    itself turned round for company, which nothing is compared with: no neighbour may be its equal.

    Args:
        golden: ``pixel_values`` (K, ...) as the session takes them, ``reference`` (K, ...) float64; one for
            each of several outputs, as ``vitdeploy.bundle.golden.reference_key`` says.
        batches: batch sizes; by default the least, the optimal and the most the session serves.
        max_abs: an absolute bound on top of the precision's tolerance.
        tolerance: in place of the precision's own.

    Raises:
        ParityError: no golden data, or a reference that nothing can be compared with.
        UsageError: a batch size that the session does not serve.
    """
    facts = session.facts
    names = [spec.name for spec in facts.outputs]
    tolerance = (tolerance or TOLERANCES[facts.precision]).model_copy(update={"max_abs": max_abs})
    inputs, references = _golden(golden, names, _source(tolerance))
    least = facts.batch.min if facts.batch else 1
    sizes = batches or (facts.batch.sizes if facts.batch else (1, 8))
    turned = np.flip(inputs, axis=tuple(range(1, inputs.ndim)))
    filled = inputs if len(inputs) > 1 else np.concatenate([inputs, turned])
    alone = _otherwise(session, inputs, filled, least)
    records = []
    for size in sizes:
        outputs = alone if size == least == 1 else _outputs(session, filled, size, len(inputs))
        for name, reference in references.items():
            metrics, problems = _check_batch(outputs[name], alone[name], reference, name, tolerance)
            record = ParityRecord(
                artifact=facts.artifact,
                backend=facts.backend,
                batch=size,
                provider=facts.provider,
                output=name if len(names) > 1 else None,
                metrics=metrics,
                tolerance=tolerance,
                passed=not problems,
                failures=problems,
            )
            records.append(record)
    return records


def _golden(golden: Mapping[str, Array], names: Sequence[str], source: str) -> tuple[Array, dict[str, Array]]:
    """The golden inputs and the reference's answer for each output, fit to compare with.

    Args:
        source: what an image of them is called.
    """
    if "pixel_values" not in golden or REFERENCE not in golden:
        raise ParityError("the bundle has no golden data, so nothing can be compared")
    inputs = golden["pixel_values"]
    unnamed = [name for name in names if f"{REFERENCE}.{name}" not in golden]
    if len(unnamed) > 1:
        raise ParityError(f"the bundle has golden data for one of {', '.join(unnamed)} only")
    references = {name: reference_of(golden, name) for name in names}
    for name, reference in references.items():
        _require_comparable(inputs, reference, f"{name}: " if len(names) > 1 else "", source)
    return inputs, references


def _require_comparable(inputs: Array, reference: Array, title: str, source: str) -> None:
    """Refuse a reference that nothing can be compared with."""
    if not len(inputs) or len(inputs) != len(reference) or not reference.size:
        raise ParityError(
            f"{title}{len(inputs)} golden inputs and {len(reference)} reference outputs: nothing to compare"
        )
    if not np.isfinite(reference).all():
        bad = int(np.argmin(np.isfinite(reference.reshape(len(reference), -1)).all(axis=1)))
        raise ParityError(f"{title}the reference itself has NaN or infinite values ({source} image {bad})")
    empty = ~reference.reshape(len(reference), -1).any(axis=1)
    if empty.any() and (reference[0].size >= _FEW or empty.all()):
        raise ParityError(
            f"{title}nothing to compare: the reference's output is zero for {source} image "
            f"{int(np.argmax(empty))}",
            hint="an untrained head? --output features leaves it out",
        )


def _otherwise(session: Session, inputs: Array, filled: Array, least: int) -> dict[str, Array | None]:
    """Outputs of the golden images alone where the artifact allows it, else with other neighbours."""
    if least == 1:
        return _outputs(session, inputs, 1, len(inputs))
    rolled = _outputs(session, np.roll(filled, 1, axis=0), least, len(filled))
    return {
        name: None if array is None else np.roll(array[: len(filled)], -1, axis=0)[: len(inputs)]
        for name, array in rolled.items()
    }


def _outputs(session: Session, filled: Array, size: int, golden: int) -> dict[str, Array | None]:
    """Outputs in batches of ``size``, filled by going round; None for a misshapen one.

    Args:
        golden: of so many inputs, the first ones, they stay.
    """
    parts = run_in_batches(session, filled, size)
    stays = np.arange(len(parts) * size) % len(filled) < golden
    outputs: dict[str, Array | None] = {}
    for name in (spec.name for spec in session.facts.outputs):
        fits = all(part[name].shape == (size, *parts[0][name].shape[1:]) for part in parts)
        outputs[name] = np.concatenate([part[name] for part in parts])[stays] if fits else None
    return outputs


def _check_batch(
    outputs: Array | None, alone: Array | None, reference: Array, name: str, tolerance: Tolerance
) -> tuple[ParityMetrics, tuple[str, ...]]:
    if outputs is None or alone is None or outputs.shape[1:] != reference.shape[1:]:
        shape = "of another batch size" if outputs is None or alone is None else str(outputs.shape[1:])
        problem = f"outputs are {shape} per image, the reference {reference.shape[1:]}"
        return ParityMetrics(rows=0, elements=0), (problem,)
    order = np.arange(len(outputs)) % len(reference)
    expected = reference[order]
    metrics = measure_parity(expected, outputs, tolerance, _kind(name))
    update: dict[str, Any] = {"worst": None if metrics.worst is None else int(order[metrics.worst])}
    if outputs is not alone and not metrics.nonfinite and np.isfinite(alone).all():
        rows = len(outputs), -1
        difference = (outputs.astype(np.float64) - alone[order]).reshape(rows)
        update["batch_invariance"] = float(_relative(difference, expected.reshape(rows)).max())
    metrics = metrics.model_copy(update=update)
    return metrics, tolerance_failures(metrics, tolerance)


@dataclass(frozen=True)
class PreprocessCheck:
    """Whether this machine makes the same pixels from the golden images as the exporting one."""

    images: int
    max_abs: float
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures


def check_preprocess(bundle: Bundle) -> PreprocessCheck:
    """Preprocess the bundle's raw images again and compare with what the export recorded.

    Where no images can go in there are none: nothing is compared, and nothing fails.
    """
    spec, golden = bundle.manifest.preprocess, bundle.golden()
    if spec is not None and bundle.manifest.refuses_images:
        return PreprocessCheck(0, 0.0, ())
    names = [name for name in sorted(golden) if f"{name}.pixel_values" in golden]
    if spec is None or not names:
        missing = "no preprocessing" if spec is None else "no raw golden images"
        return PreprocessCheck(0, 0.0, (f"the bundle has {missing}",))
    problems, worst = [], 0.0
    for name in names:
        image = Image.fromarray(golden[name])
        pixels = pixel_values(image, spec, bundle.manifest.input)
        recorded = golden[f"{name}.pixel_values"]
        if pixels.shape != recorded.shape or pixels.dtype != recorded.dtype:
            problems.append(
                f"{name}: {pixels.dtype} {pixels.shape}, recorded {recorded.dtype} {recorded.shape}"
            )
            continue
        error = float(np.abs(pixels.astype(np.float64) - recorded.astype(np.float64)).max(initial=0.0))
        worst = max(worst, error)
        if not error <= PREPROCESS_TOLERANCE:
            problems.append(f"{name}: pixels differ by {error:.2g}")
    return PreprocessCheck(len(names), worst, tuple(problems))
