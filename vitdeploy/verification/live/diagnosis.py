"""Why a live server's answers are wrong: the bundle is run here with common mistakes until one explains them.

A mistake is what is done to an input, a preprocessing or an output, with a phrase that says so.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from vitdeploy.backends.base import Array
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.golden import reference_of
from vitdeploy.config import InputKind, Output, Preprocess, Size, size_name
from vitdeploy.errors import VitdeployError
from vitdeploy.images.decode import load_image
from vitdeploy.images.preprocess import apply, for_channels, pixel_values, resized
from vitdeploy.predictor import Predictor
from vitdeploy.scores import sigmoid, softmax
from vitdeploy.verification.live.image_endpoints import Scored
from vitdeploy.verification.live.images import Expected, score_error

Change = Callable[[Array], Array]

_GIVES = "the answers are what the model gives for "
_SHARE = 0.1
"""A mistake that leaves no more than this of the error is named too, though not as the whole truth."""

_STATISTICS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "ImageNet's mean and std": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mean and std 0.5": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "CLIP's mean and std": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}

_CROPS = (1.0, 0.95, 0.9, 0.875)
"""Shares of the shorter edge that published checkpoints keep."""


@dataclass(frozen=True)
class Explanation:
    """A mistake, and the error that is left when it is made here as well."""

    text: str
    error: float


def explain_tensors(
    bundle: Bundle,
    local: Predictor | None,
    golden: Mapping[str, Array],
    answers: Array,
    output: Output,
    tolerance: float,
) -> str | None:
    """What would make the server give ``answers`` (K, ...) for the golden inputs, if one mistake does.

    Args:
        local: the bundle run here; None leaves out what needs that.
        output: what the answers are.
        tolerance: the relative error of two right models.
    """
    inputs, reference = golden["pixel_values"], reference_of(golden, output)
    if answers.shape != reference.shape:
        return None
    actual, expected = answers.astype(np.float64), reference.astype(np.float64)
    if not np.isfinite(actual).all():
        return "the model overflows there: fp16 where fp32 or bf16 is needed, or damaged weights"
    if text := _visible_mistake(actual, expected, tolerance):
        return text
    explanations = []
    if output == "logits":
        explanations += [
            Explanation(text, relative(change(expected), actual, expected))
            for text, change in output_mistakes()
        ]
    if local is not None:
        for phrase, mistake in tensor_mistakes(bundle.manifest.input, bundle.manifest.preprocess):
            changed = np.ascontiguousarray(mistake(inputs))
            if changed.shape == inputs.shape:
                with contextlib.suppress(VitdeployError):
                    other = local.outputs(changed.astype(inputs.dtype))[output].astype(np.float64)
                    error = relative(other, actual, expected)
                    explanations.append(Explanation(f"{_GIVES}{phrase}", error))
    return _best(explanations, relative(expected, actual), tolerance)


def explain_images(
    bundle: Bundle, local: Predictor, answers: Sequence[tuple[Expected, Sequence[Scored]]], bound: float
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
            score_error(row, indices, scores, item.scores, relative_to=item.logits)
            for row, (item, indices, scores) in zip(logits, scored, strict=True)
        )

    explanations = []
    for phrase, convert in image_mistakes(bundle.manifest.input, spec):
        with contextlib.suppress(VitdeployError):  # a crop of nothing, a picture too elongated
            made = local.outputs(np.stack([convert(picture) for picture in pictures]))
            logits = made["logits"].astype(np.float64)
            explanations.append(Explanation(f"{_GIVES}{phrase}", error(logits)))
    return _best(explanations, error(np.stack([item.logits for item, _, _ in scored])), bound)


def explain_size(
    others: Mapping[Size, Predictor],
    answers: Sequence[tuple[Expected, Sequence[Scored]]],
    labels: Sequence[str] | None,
    bound: float,
) -> str | None:
    """Whether the answers to image files are what the model gives at another image size.

    Args:
        others: the bundle run here at the sizes that are not the right one.
        answers: as :func:`explain_images`.
        bound: the relative error of two right models.
    """
    taken: dict[str, Size] = {}
    for item, answer in answers:
        read = _read(answer, labels, len(item.logits))
        for size, local in others.items() if read else ():
            indices, scores = read or ([], np.empty(0))
            logits = local.outputs(local.preprocess(item.file.data)[None])["logits"][0].astype(np.float64)
            wrong = score_error(item.logits, indices, scores, item.scores)
            error = score_error(logits, indices, scores, item.scores, relative_to=item.logits)
            if error <= bound + item.noise < wrong:
                taken[item.file.title] = size
    if not taken:
        return None
    title, size = next(iter(taken.items()))
    return f"{_GIVES}another image size: {title} gets that of {size_name(size)}"


def relative(expected: Array, actual: Array, reference: Array | None = None) -> float:
    """The worst row's ||actual - expected|| / ||expected||, or / ||reference||."""
    rows = len(expected), -1
    wide = expected.reshape(rows).astype(np.float64)
    difference = np.linalg.norm(actual.reshape(rows) - wide, axis=1)
    norms = np.linalg.norm(wide if reference is None else reference.reshape(rows), axis=1)
    return float((difference / np.maximum(norms, max(1e-9 * norms.max(), 1e-200))).max())


def _visible_mistake(actual: Array, expected: Array, tolerance: float) -> str | None:
    """What shows without running anything: constant, mixed up or reordered answers."""
    rows = len(actual)
    flat, right = actual.reshape(rows, -1), expected.reshape(rows, -1)
    if not flat.any():
        return "the server answers with zeros"
    if rows > 1 and np.ptp(flat, axis=0).max() <= tolerance * np.abs(flat).max():
        return "the server gives the same answer whatever it is sent"
    if (order := _matching(flat, right, tolerance, once=False)) is not None and (
        order != np.arange(rows)
    ).any():
        return "the server mixes up images: the answers are right, but each belongs to another one"
    if (order := _matching(flat.T, right.T, tolerance, once=True)) is not None:
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


def _read(
    answer: Sequence[Scored], labels: Sequence[str] | None, classes: int
) -> tuple[list[int], Array] | None:
    """The classes of an answer and their scores; None where it has others than the bundle's."""
    names = list(labels) if labels is not None else [str(index) for index in range(classes)]
    indices = []
    for scored in answer:
        index = scored.index
        if index is None:
            index = names.index(scored.label) if scored.label in names else -1
        if not 0 <= index < classes:
            return None
        indices.append(index)
    scores = np.array([scored.score for scored in answer])
    return (indices, scores) if np.isfinite(scores).all() and indices else None


def _best(explanations: Sequence[Explanation], without: float, tolerance: float) -> str | None:
    """The mistake that explains most, if it explains enough."""
    best = min(explanations, key=lambda explanation: explanation.error, default=None)
    if best is None or not best.error < without:
        return None
    if best.error <= tolerance:
        as_good = max(3 * best.error, 0.05 * tolerance)
        same = [e.text.removeprefix(_GIVES) for e in explanations if e.error <= as_good and e is not best]
        return best.text + (f" (or: {'; or: '.join(same[:2])})" if same else "")
    if best.error <= _SHARE * without:
        return f"{best.text}, nearly (relative error {best.error:.2g} then, {without:.2g} now)"
    return None


def tensor_mistakes(kind: InputKind, spec: Preprocess | None) -> Iterator[tuple[str, Change]]:
    """What a server may do to a tensor before it reaches the model: a phrase, and the same done to (N, ...).

    The phrase fits behind "the answers are what the model gives for".
    """
    channels = 3 if spec is None else spec.channels
    if kind == "uint8":
        if channels == 3:
            yield "BGR images: the server swaps red and blue", lambda x: x[..., ::-1]
        yield "images with rows and columns swapped", lambda x: x.transpose(0, 2, 1, 3)
        return
    if channels == 3:
        yield "BGR tensors: the server swaps red and blue", lambda x: x[:, ::-1]
    yield "tensors with rows and columns swapped", lambda x: x.transpose(0, 1, 3, 2)
    yield (
        "tensors whose channels are last: the server takes one layout for the other",
        lambda x: x.transpose(0, 2, 3, 1).reshape(x.shape),
    )
    yield "tensors divided by 255: the server scales what is scaled", lambda x: x / np.float32(255)
    if spec is not None:
        mean, std = (np.array(v, np.float32)[:, None, None] for v in (spec.mean, spec.std))
        yield "tensors normalised twice: the server does it again", lambda x: (x - mean) / std
        yield "tensors that are not normalised: the server undoes it", lambda x: x * std + mean


def image_mistakes(kind: InputKind, spec: Preprocess) -> Iterator[tuple[str, Callable[[Image.Image], Array]]]:
    """Wrong ways from an image to the model's input (the right one left out): a phrase, and the way."""

    def convert(image: Image.Image, spec: Preprocess) -> Array:
        return pixel_values(image, spec, kind)

    yield "BGR pixels: red and blue are swapped", lambda image: convert(_bgr(image), spec)
    if spec.channels == 1:
        yield "grey that is the mean of red, green and blue", lambda image: convert(_mean_grey(image), spec)
    if kind == "float":
        yield from _value_mistakes(spec)
    for what, other in _geometries(spec):
        yield what, lambda image, other=other: convert(image, other)  # type: ignore[misc]
    yield (
        "pixels resized without antialiasing",
        lambda image: convert(_without_antialiasing(image, spec), replace(_bare(spec), exif=spec.exif)),
    )
    yield (
        "pixels with rows and columns swapped",
        lambda image: convert(image.transpose(Image.Transpose.TRANSPOSE), spec),
    )
    yield "mirrored pixels", lambda image: convert(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), spec)


def output_mistakes() -> Iterator[tuple[str, Change]]:
    """What a server may do to logits (N, classes): a sentence, and the same done here."""
    yield "the server gives softmax probabilities, not logits", softmax
    yield "the server gives log-probabilities, not logits", lambda x: np.log(np.maximum(softmax(x), 1e-300))
    yield "the server gives sigmoid scores, not logits", sigmoid
    yield "the server gives the negated logits", lambda x: -x


def _without_antialiasing(image: Image.Image, spec: Preprocess) -> Image.Image:
    """Resize as ``spec`` does, but bilinearly from the four nearest pixels alone, as OpenCV does; no crop."""
    height, width = resized((image.height, image.width), spec)
    pixels = np.asarray(image.convert("RGB")).astype(np.float64)  # (H, W, 3)
    pixels = _interpolated(pixels, height)
    pixels = _interpolated(pixels.transpose(1, 0, 2), width).transpose(1, 0, 2)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def _interpolated(pixels: Array, size: int) -> Array:
    """The first axis at ``size`` positions, each between two neighbours; beyond the last centre, the edge."""
    have = len(pixels)
    position = np.clip((np.arange(size) + 0.5) * have / size - 0.5, 0, have - 1)
    low = position.astype(np.int64)
    share = (position - low)[:, None, None]
    made: Array = pixels[low] * (1 - share) + pixels[np.minimum(low + 1, have - 1)] * share
    return made


def _value_mistakes(spec: Preprocess) -> Iterator[tuple[str, Callable[[Image.Image], Array]]]:
    for name, statistics in _STATISTICS.items():
        rgb = Preprocess(mean=statistics[0], std=statistics[1])
        mean, std = for_channels(rgb, spec.channels).mean, for_channels(rgb, spec.channels).std
        if not (np.allclose(mean, spec.mean, atol=1e-3) and np.allclose(std, spec.std, atol=1e-3)):
            yield f"pixels normalised with {name}", _with(replace(spec, mean=mean, std=std))
    plain = replace(spec, mean=(0.0,) * spec.channels, std=(1.0,) * spec.channels)
    yield "pixels that are not normalised: 0 to 1 as they are", _with(plain)
    yield "pixels from 0 to 255, neither scaled nor normalised", _with(replace(plain, rescale=1.0))
    yield "pixels normalised without being scaled from 0..255 first", _with(replace(spec, rescale=1.0))
    if spec.mean != spec.std and min(spec.mean) > 0:
        yield "pixels with mean and std swapped", _with(replace(spec, mean=spec.std, std=spec.mean))
    if len(set(spec.mean)) > 1 or len(set(spec.std)) > 1:
        backwards = replace(spec, mean=spec.mean[::-1], std=spec.std[::-1])
        yield "pixels whose channels have mean and std in the order BGR", _with(backwards)


def _geometries(spec: Preprocess) -> Iterator[tuple[str, Preprocess]]:
    """Other ways to the model's size."""
    for name in ("nearest", "bilinear", "bicubic", "lanczos", "box"):
        if name != spec.resample:
            yield f"pixels resized with the {name} filter, not {spec.resample}", replace(spec, resample=name)
    stretched = replace(_bare(spec), resize="exact")
    if spec.resize != "exact" or spec.resize_to not in (None, spec.size):
        yield "pixels squeezed to the model's size, not cropped", stretched
    for share in _CROPS:
        edge = math.floor(min(spec.size) / share)
        if spec.resize != "shortest_edge" or spec.resize_edge != edge:
            cropped = replace(_bare(spec), resize="shortest_edge", resize_edge=edge)
            yield f"pixels cropped from a shorter edge of {edge}", cropped
    if spec.resize != "none":
        yield "pixels cropped without being resized", _bare(spec)
    if spec.resize == "shortest_edge":
        yield (
            "pixels cropped one off the centre",
            replace(spec, crop_rounding="round" if spec.crop_rounding == "floor" else "floor"),
        )


def _bare(spec: Preprocess) -> Preprocess:
    """The same without any resizing."""
    return replace(spec, resize="none", resize_edge=None, resize_to=None)


def _with(spec: Preprocess) -> Callable[[Image.Image], Array]:
    return lambda image: apply(image, spec)


def _bgr(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1]))


def _mean_grey(image: Image.Image) -> Image.Image:
    """Every colour counts the same, not as the eye sees it."""
    return Image.fromarray(np.asarray(image.convert("RGB")).mean(axis=-1).round().astype(np.uint8))
