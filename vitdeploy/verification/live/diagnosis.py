"""Why a live server's answers are wrong: it is run here with common mistakes until one explains them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vitdeploy.backends.base import Array
from vitdeploy.bundle.folder import Bundle
from vitdeploy.errors import VitdeployError
from vitdeploy.images.decode import load_image
from vitdeploy.verification.live.hypotheses import image_mistakes, output_mistakes, tensor_mistakes
from vitdeploy.verification.live.image_endpoints import Scored
from vitdeploy.verification.live.images import Expected, score_error
from vitdeploy.verification.live.local import LocalModel

_GIVES = "the answers are what the model gives for "
_SHARE = 0.1
"""A mistake that leaves no more than this of the error is named too, though not as the whole truth."""


@dataclass(frozen=True)
class Explanation:
    """A mistake, and the error that is left when it is made here as well."""

    text: str
    error: float


def explain_tensors(
    bundle: Bundle, local: LocalModel | None, golden: Mapping[str, Array], answers: Array, tolerance: float
) -> str | None:
    """What would make the server give ``answers`` (K, ...) for the golden inputs, if one mistake does.

    Args:
        local: the bundle run here; None leaves out what needs that.
        tolerance: the relative error of two right models.
    """
    inputs, reference = golden["pixel_values"], golden["reference"]
    if answers.shape != reference.shape:
        return None
    actual, expected = answers.astype(np.float64), reference.astype(np.float64)
    if not np.isfinite(actual).all():
        return "the model overflows there: fp16 where fp32 or bf16 is needed, or damaged weights"
    if plain := _plainly(actual, expected, tolerance):
        return plain
    found = []
    if bundle.manifest.output == "logits":
        found += [
            Explanation(text, relative(change(expected), actual, expected))
            for text, change in output_mistakes()
        ]
    if local is not None:
        for phrase, mistake in tensor_mistakes(bundle.manifest.input, bundle.manifest.preprocess):
            changed = np.ascontiguousarray(mistake(inputs))
            if changed.shape == inputs.shape:
                text = f"{_GIVES}{phrase}"
                found.append(
                    Explanation(text, _error_of(local, changed.astype(inputs.dtype), actual, expected))
                )
    return _best(found, relative(expected, actual), tolerance)


def explain_images(
    bundle: Bundle, local: LocalModel, answers: Sequence[tuple[Expected, Sequence[Scored]]], bound: float
) -> str | None:
    """What preprocessing would make the server answer image files as it does, if one mistake does.

    Args:
        answers: with classes known by index, or by a label of the bundle.
        bound: the relative error of two right models.
    """
    spec, labels = bundle.manifest.preprocess, bundle.manifest.labels
    scored = [(item, *read) for item, answer in answers if (read := _read(answer, labels, len(item.logits)))]
    if spec is None or not scored:
        return None
    pictures = [load_image(item.file.data) for item, _, _ in scored]
    bound += max(item.noise for item, _, _ in scored)

    def error(logits: Array) -> float:
        return max(
            score_error(row, indices, scores, relative_to=item.logits)
            for row, (item, indices, scores) in zip(logits, scored, strict=True)
        )

    found = []
    for phrase, convert in image_mistakes(bundle.manifest.input, spec):
        logits = _logits(local, pictures, convert)
        if logits is not None:
            found.append(Explanation(f"{_GIVES}{phrase}", error(logits)))
    return _best(found, error(np.stack([item.logits for item, _, _ in scored])), bound)


def relative(expected: Array, actual: Array, reference: Array | None = None) -> float:
    """The worst row's ||actual - expected|| / ||expected||, or / ||reference||."""
    rows = len(expected), -1
    wide = expected.reshape(rows).astype(np.float64)
    difference = np.linalg.norm(actual.reshape(rows) - wide, axis=1)
    norms = np.linalg.norm(wide if reference is None else reference.reshape(rows), axis=1)
    return float((difference / np.maximum(norms, max(1e-9 * norms.max(), 1e-200))).max())


def _plainly(actual: Array, expected: Array, tolerance: float) -> str | None:
    """What shows without running anything: constant, mixed up or reordered answers."""
    rows = len(actual)
    flat, wanted = actual.reshape(rows, -1), expected.reshape(rows, -1)
    if not flat.any():
        return "the server answers with zeros"
    if rows > 1 and np.ptp(flat, axis=0).max() <= tolerance * np.abs(flat).max():
        return "the server gives the same answer whatever it is sent"
    if (order := _matching(flat, wanted, tolerance, once=False)) is not None and (
        order != np.arange(rows)
    ).any():
        return "the server mixes up images: the answers are right, but each belongs to another one"
    if (order := _matching(flat.T, wanted.T, tolerance, once=True)) is not None:
        moved = np.flatnonzero(order != np.arange(len(order)))
        if len(moved):
            at = int(moved[0])
            return (
                f"the classes are in another order: column {at} of the answer is the bundle's class "
                f"{order[at]} ({len(moved)} of {len(order)} are elsewhere)"
            )
    return None


def _matching(actual: Array, expected: Array, tolerance: float, *, once: bool) -> Array | None:
    """For each row of ``actual`` the row of ``expected`` that it is; None if some is none, or with ``once``
    two are the same."""
    if len(actual) < 2:
        return None
    squares = (actual**2).sum(1)[:, None] + (expected**2).sum(1)[None] - 2 * actual @ expected.T
    order: Array = squares.argmin(axis=1)
    if once and len(set(order.tolist())) < len(order):
        return None
    left = np.linalg.norm(actual - expected[order])
    return order if left <= tolerance * np.linalg.norm(expected) else None


def _error_of(local: LocalModel, inputs: Array, actual: Array, reference: Array) -> float:
    try:
        return relative(local.run(inputs).astype(np.float64), actual, reference)
    except VitdeployError:
        return float("inf")


def _logits(
    local: LocalModel, pictures: Sequence[Image.Image], convert: Callable[[Image.Image], Array]
) -> Array | None:
    try:
        return local.run(np.stack([convert(picture) for picture in pictures])).astype(np.float64)
    except VitdeployError:  # a crop of nothing, a picture too elongated
        return None


def _read(
    answer: Sequence[Scored], labels: Sequence[str] | None, classes: int
) -> tuple[list[int], Array] | None:
    """The classes of an answer and their scores; None where it has others than the bundle's."""
    known = list(labels) if labels is not None else [str(index) for index in range(classes)]
    indices = []
    for scored in answer:
        index = scored.index
        if index is None:
            index = known.index(scored.label) if scored.label in known else -1
        if not 0 <= index < classes:
            return None
        indices.append(index)
    scores = np.array([scored.score for scored in answer])
    return (indices, scores) if np.isfinite(scores).all() and indices else None


def _best(found: Sequence[Explanation], without: float, tolerance: float) -> str | None:
    """The mistake that explains most, if it explains enough."""
    best = min(found, key=lambda explanation: explanation.error, default=None)
    if best is None or not best.error < without:
        return None
    if best.error <= tolerance:
        as_good = max(3 * best.error, 0.05 * tolerance)
        same = [e.text.removeprefix(_GIVES) for e in found if e.error <= as_good and e is not best]
        return best.text + (f" (or: {'; or: '.join(same[:2])})" if same else "")
    if best.error <= _SHARE * without:
        return f"{best.text}, nearly (relative error {best.error:.2g} then, {without:.2g} now)"
    return None
