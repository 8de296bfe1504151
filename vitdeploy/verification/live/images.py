"""Image files sent to a live server, and its classes and scores held against the bundle's own.

The float64 reference exists for tensors only, so what is expected is computed here, by the most exact
artifact that runs on this machine, from the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from vitdeploy.backends.base import Array
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.golden import raw_images
from vitdeploy.config import Scores, Size, size_name
from vitdeploy.images.decode import load_image
from vitdeploy.images.fitting import DEFAULT_RULE, Rule, fit
from vitdeploy.images.preprocess import shown_size
from vitdeploy.predictor import AnyImage, Predictor
from vitdeploy.scores import softmax
from vitdeploy.verification.live.client import AnswerError
from vitdeploy.verification.live.image_endpoints import ImageAnswer, ImageEndpoint, Scored
from vitdeploy.verification.live.report import ImageRecord
from vitdeploy.verification.live.signature import compare_labels

_TINY = 1e-30
"""Probabilities below are taken for this: in float32 they become zero."""

_CERTAIN = 15.0
"""Logits of sigmoids are taken to lie within this: in float32 the sigmoid is 1 beyond."""

_UNEVEN = 3.0
"""Rounding errors spread over the classes, so that k of n carry sqrt(k/n) of them; times this at most."""

_SCALES = (1.25, 1.0)
"""Of an image for a size: at the last one, every rule chooses it."""

_MEDIA = {"PNG": "image/png", "JPEG": "image/jpeg"}


@dataclass(frozen=True)
class ImageFile:
    """A file of known content."""

    name: str
    format: str
    """PNG or JPEG."""
    data: bytes

    @property
    def title(self) -> str:
        return f"{self.name} as {self.format}"


@dataclass(frozen=True)
class Expected:
    """What the bundle makes of a file."""

    file: ImageFile
    logits: Array
    """(classes,) float64."""
    scores: Scores
    """What the bundle makes of logits."""
    noise: float
    """Relative change of the logits where every value of a JPEG is a level off, as decoders may differ;
    0 of a PNG."""
    size: str | None = None
    """The image size of the logits, as HxW, where the bundle has several."""


@dataclass
class ImageCheck:
    """What sending the files gave."""

    records: list[ImageRecord] = field(default_factory=list)
    answers: list[tuple[Expected, list[Scored]]] = field(default_factory=list)
    """Those that have classes of the bundle in them."""
    failures: list[str] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)


def image_files(bundle: Bundle, rule: Rule = DEFAULT_RULE) -> list[ImageFile]:
    """The bundle's raw golden images as PNG, and as JPEG with full colour at quality 95.

    Of several image sizes, one that the rule chooses for none of them gets an image of its own shape.
    """
    golden = bundle.golden()
    names = [name for name in sorted(golden) if f"{name}.pixel_values" in golden]
    pictures = [(name, golden[name]) for name in names]
    pictures = pictures or [(f"image.{i}", pixels) for i, pixels in enumerate(raw_images())]
    if len(bundle.sizes) > 1:
        pictures += _for_others(pictures, bundle.sizes, rule)
    files = []
    for name, pixels in pictures:
        for kind, how in (("PNG", {}), ("JPEG", {"quality": 95, "subsampling": 0})):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, kind, **how)
            files.append(ImageFile(name, kind, buffer.getvalue()))
    return files


def _for_others(
    pictures: Sequence[tuple[str, Array]], sizes: Sequence[Size], rule: Rule
) -> Iterator[tuple[str, Array]]:
    """A picture for each size that is chosen for none of these: the first one, stretched to its shape."""
    chosen = {fit(pixels.shape[:2], sizes, rule) for _, pixels in pictures}
    for size in sizes:
        for scale in _SCALES:
            height, width = (math.ceil(scale * edge) for edge in size)
            if size not in chosen and fit((height, width), sizes, rule) == size:
                chosen.add(size)
                stretched = Image.fromarray(pictures[0][1]).resize((width, height))
                yield f"image.{size_name(size)}", np.asarray(stretched)


def fitted(files: Sequence[ImageFile], bundle: Bundle, rule: Rule) -> dict[Size, list[ImageFile]]:
    """The files by the image size that the rule chooses."""
    groups: dict[Size, list[ImageFile]] = {}
    spec = bundle.manifest.preprocess
    assert spec is not None
    for file in files:
        size = fit(shown_size(load_image(file.data), spec), bundle.sizes, rule)
        groups.setdefault(size, []).append(file)
    return groups


def expect(local: Predictor, files: Sequence[ImageFile]) -> list[Expected]:
    """Run the files through the bundle here.

    Raises:
        VitdeployError: the bundle cannot preprocess, or the runtime fails.
    """
    kind = local.bundle.manifest.scores

    def answers(images: Iterable[AnyImage]) -> Array:
        given = np.stack([local.preprocess(image) for image in images])
        return local.outputs(given)["logits"].astype(np.float64)

    logits, noisy = answers(file.data for file in files), answers(map(_with_noise, files))
    return [
        Expected(file, row, kind, logit_error(row, other, kind) if file.format == "JPEG" else 0.0)
        for file, row, other in zip(files, logits, noisy, strict=True)
    ]


def check_images(
    endpoint: ImageEndpoint, expected: Sequence[Expected], labels: Sequence[str] | None, tolerance: float
) -> ImageCheck:
    """Send every file, and compare classes and scores.

    Args:
        tolerance: the relative error of logits that the precisions of both sides allow together.

    Raises:
        ServerError: the server cannot be asked.
    """
    check = ImageCheck()
    for item in expected:
        where = f"{item.file.title} sent to {endpoint.title}"
        bound = tolerance + item.noise
        try:
            answer = endpoint.ask(item.file.data, _MEDIA[item.file.format], len(item.logits))
            record, causes = judge(item, answer, labels, bound)
            check.answers.append((item, answer.classes))
        except AnswerError as error:
            best = _name(int(np.argmax(item.logits)), labels)
            name, kind, failures = item.file.name, item.file.format, (error.message,)
            record = ImageRecord(name, kind, 0, best, "", None, bound, item.size, failures)
            causes = ()
        check.records.append(record)
        check.failures += [f"{where}: {reason}" for reason in record.failures]
        check.causes += [cause for cause in causes if cause not in check.causes]
    return check


def judge(
    item: Expected, given: ImageAnswer, labels: Sequence[str] | None, bound: float
) -> tuple[ImageRecord, tuple[str, ...]]:
    """One answer: its size, its names, its scores, and which classes it chose; with a likely cause.

    Raises:
        AnswerError: there are no classes in it.
    """
    answer = given.classes
    if not answer:
        raise AnswerError("the answer names no class")
    best = int(np.argmax(item.logits))
    record = ImageRecord(
        image=item.file.name,
        format=item.file.format,
        classes=len(answer),
        expected=_name(best, labels),
        answered=answer[0].label,
        error=None,
        bound=bound,
        size=item.size,
    )
    indices, problems, causes = _indices(answer, labels, len(item.logits))
    if None not in (item.size, given.size) and given.size != item.size:
        problems = (f"the size {given.size} was taken, not {item.size}", *problems)
    scores = np.array([scored.score for scored in answer])
    if problem := _impossible(scores, item.scores):
        problems += (problem,)
    elif indices is not None:
        error = score_error(item.logits, indices, scores, item.scores)
        record = replace(record, error=error)
        if not error <= bound:
            problems += (f"scores: relative error {error:.2g} exceeds {bound:.2g}",)
        problems += _other_classes(item.logits, indices, bound, labels)
    return replace(record, failures=problems), causes


def score_error(
    logits: Array, indices: Sequence[int], scores: Array, kind: Scores, relative_to: Array | None = None
) -> float:
    """The relative error of the logits behind some scores.

    A softmax tells logits up to a constant. Without it the error is no larger than with it, so the bounds for
    logits hold; of k classes out of n, in proportion.

    Args:
        logits: (n,) expected.
        indices: the classes (k,) that the scores (k,) are of.
        kind: what the scores are.
        relative_to: (n,) logits whose norm counts instead of that of ``logits``.
    """
    chosen = list(indices)
    if kind == "softmax":
        expected = np.maximum(softmax(logits)[chosen], _TINY)
        difference = np.log(np.maximum(scores, _TINY)) - np.log(expected)
        # One score moves with its own logit and with the sum of all.
        difference = difference - difference.mean() if len(difference) > 1 else difference / 2
    elif kind == "sigmoid":
        shares = np.clip(scores.astype(np.float64), _TINY, 1 - np.finfo(np.float64).eps)
        behind = np.log(shares) - np.log1p(-shares)
        difference = np.clip(behind, -_CERTAIN, _CERTAIN) - np.clip(logits[chosen], -_CERTAIN, _CERTAIN)
    else:
        difference = scores - logits[chosen]
    share = min(1.0, _UNEVEN * float(np.sqrt(len(difference) / len(logits))))
    norm = float(np.linalg.norm(logits if relative_to is None else relative_to))
    return float(np.linalg.norm(difference)) / (max(norm, 1e-200) * share)


def logit_error(expected: Array, actual: Array, kind: Scores) -> float:
    """``score_error`` of all classes, from logits."""
    difference = actual - expected
    if kind == "softmax":
        difference = difference - difference.mean()
    return float(np.linalg.norm(difference)) / max(float(np.linalg.norm(expected)), 1e-200)


def _with_noise(file: ImageFile) -> Array:
    """The file's pixels (H, W, 3) uint8, every value a level higher or lower, by lot."""
    pixels = np.asarray(load_image(file.data))
    signs = np.random.default_rng(0).choice(np.array([-1, 1]), size=pixels.shape)
    noisy: Array = np.clip(pixels.astype(np.int16) + signs, 0, 255).astype(np.uint8)
    return noisy


def _name(index: int, labels: Sequence[str] | None) -> str:
    return labels[index] if labels else str(index)


def _indices(
    answer: Sequence[Scored], labels: Sequence[str] | None, classes: int
) -> tuple[list[int] | None, tuple[str, ...], tuple[str, ...]]:
    """The classes of an answer, None if they are not the bundle's; what is wrong with the names, and why."""
    names = labels if labels is not None else [str(index) for index in range(classes)]
    if all(scored.index is not None for scored in answer):
        indices = [int(scored.index or 0) for scored in answer]
        if len(set(indices)) < len(indices) or not all(0 <= index < classes for index in indices):
            return None, ("the answer has classes that the bundle does not, or one twice",), ()
        named = {index: scored.label for index, scored in zip(indices, answer, strict=True)}
        return indices, *compare_labels(named, names)
    strange = [scored.label for scored in answer if scored.label not in names]
    if strange:
        return None, (f"labels: the bundle has no class {strange[0]!r}",), ()
    if len(set(names)) < len(names):
        return None, (), ()  # names alone do not tell which class is meant
    return [list(names).index(scored.label) for scored in answer], (), ()


def _impossible(scores: Array, kind: Scores) -> str:
    """Why these are no scores of this kind, where they are none."""
    if not np.isfinite(scores).all():
        return "scores: NaN or infinite"
    most = {"softmax": scores.sum(), "sigmoid": scores.max(), "none": 0.0}[kind]
    if kind != "none" and (scores.min() < 0 or most > 1.001):
        return f"scores: from {scores.min():.3g} to {scores.max():.3g}, which are no probabilities"
    if (np.diff(scores) > 0).any():
        return "scores: the likeliest class is not first"
    return ""


def _other_classes(
    logits: Array, indices: Sequence[int], bound: float, labels: Sequence[str] | None
) -> tuple[str, ...]:
    """Whether the answer names the expected class first, where the margin is wider than rounding."""
    order = np.argsort(-logits, kind="stable")
    decided = np.sqrt(2) * bound * np.linalg.norm(logits)
    if len(order) > 1 and indices[0] != order[0] and logits[order[0]] - logits[indices[0]] > decided:
        return (f"another class first: {_name(indices[0], labels)}, not {_name(int(order[0]), labels)}",)
    return ()
