"""How often a model is right on labelled images, and how that differs from the reference model."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vitdeploy.backends.base import get_backend
from vitdeploy.bundle.files import sha256
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import Manifest
from vitdeploy.data import digits_folder, digits_heldout
from vitdeploy.errors import ImageError, UsageError, did_you_mean
from vitdeploy.images.decode import find_images
from vitdeploy.images.kinds import unread_line
from vitdeploy.predictor import AnyImage, Predictor

Labels = NDArray[np.int64]
TopClasses = NDArray[np.int64]
"""(K, 5) class indices of each image, the likeliest first; (K, 1) of a model with five classes or fewer."""

REFERENCE = "reference"
"""What records call the reference model."""
USUAL_DROP = 1.0
"""Points of top-1 that what is quantised may lose where nothing else is said."""
_TOP = 5
_Z = 1.959963984540054
"""Of a standard normal variable, the quantile 0.975."""


@dataclass(frozen=True)
class AccuracyRecord:
    """Right answers of one model on labelled images."""

    model: str
    """An artifact's name, or ``REFERENCE``."""
    backend: str
    images: int
    correct: int
    """Images whose class it names first."""
    agree: int
    """Images on which it names first what the reference names first."""
    top5: int | None
    """Images whose class is among its first five; None with five classes or fewer."""
    top1_difference: float
    """Its share of right first places less the reference's."""
    top1_interval: tuple[float, float]
    """95 % confidence interval of that difference."""

    @property
    def top1(self) -> float:
        """Its share of right first places."""
        return self.correct / self.images


class Scored(Protocol):
    """What says how accurate a model is beside the reference: a record, a comparison, a measured cell's."""

    @property
    def images(self) -> int: ...

    @property
    def top1(self) -> float: ...

    @property
    def top1_difference(self) -> float: ...

    @property
    def top1_interval(self) -> tuple[float, float]: ...


@dataclass(frozen=True)
class AccuracyComparison:
    """A model beside the reference on the same labelled images; shares between 0 and 1."""

    images: int
    top1: float
    top5: float | None
    """None with five classes or fewer."""
    reference_top1: float
    reference_top5: float | None
    top1_difference: float
    """``top1 - reference_top1``."""
    top1_interval: tuple[float, float]
    """95 % confidence interval of that difference."""


@dataclass(frozen=True)
class LabelledImages:
    """Images and the class of each."""

    images: tuple[AnyImage, ...]
    labels: Labels
    """(K,) class indices."""
    unread: str = ""
    """What of the folder is no image that is read, in one line."""


def find_labelled(folder: Path, manifest: Manifest) -> LabelledImages:
    """Find images whose folder or name says their class: ``<label>/*.png``, or ``<label>_*.png``.

    A label is one of the bundle's, or a class index.

    Raises:
        UsageError: the bundle does not classify, or a name says no class of it.
        ImageError: the folder does not exist or holds no image.
    """
    if not manifest.classifies:
        raise UsageError(f"accuracy needs logits, but this bundle gives {manifest.gives}")
    if manifest.refuses_images:
        raise UsageError(f"accuracy needs images, but this bundle {manifest.refuses_images}")
    if not folder.is_dir():
        raise ImageError(f"{folder}: is not a folder of labelled images", hint="--data DIR")
    classes = _classes(manifest)
    unread = Counter[str]()
    paths = find_images([folder], unread)
    labels = np.array([_class_of(path, folder, classes) for path in paths], np.int64)
    return LabelledImages(tuple(paths), labels, unread_line(unread))


def _classes(manifest: Manifest) -> dict[str, int]:
    """Every name of a class: its label, and its index unless that is the label of another."""
    labels = manifest.labels or ()
    width = manifest.artifacts[0].output("logits").shape[-1] if manifest.artifacts else len(labels)
    count = manifest.model.classes if manifest.model else int(width)
    return {str(index): index for index in range(count)} | {label: i for i, label in enumerate(labels)}


def _class_of(path: Path, folder: Path, classes: dict[str, int]) -> int:
    inside = path.relative_to(folder)
    if len(inside.parts) > 1:
        name = inside.parts[0]
        if name in classes:
            return classes[name]
    else:
        # A label may contain underscores itself: the longest that fits is meant.
        parts = path.stem.split("_")
        for end in range(len(parts), 0, -1):
            if (name := "_".join(parts[:end])) in classes:
                return classes[name]
        name = parts[0]
    raise UsageError(
        f"{path}: {name!r} is no class of this bundle{did_you_mean(name, classes)}",
        hint="put images into a folder per label, or name them <label>_*.png",
    )


def bundled_images(manifest: Manifest) -> LabelledImages | None:
    """The images for a bundle of the checkpoint ``digits``: the 450 that were held out from its training.

    Returns:
        None for other checkpoints, and for a bundle that does not classify.
    """
    checkpoint = sha256(digits_folder() / "model.safetensors")
    if not manifest.classifies or checkpoint not in manifest.provenance.source_files.values():
        return None
    images, labels = digits_heldout()
    return LabelledImages(tuple(images), labels)


def top_classes(predictor: Predictor, images: LabelledImages) -> TopClasses:
    """The classes that a model puts first, for each image.

    Raises:
        ImageError: an image cannot be decoded.
        UsageError: the bundle does not classify.
        BundleError: the runtime fails, or gives NaN or infinite logits.
    """
    rows = [[best.index for best in row] for row in predictor.predict(images.images, top_k=_TOP + 1)]
    width = _TOP if rows and len(rows[0]) > _TOP else 1
    return np.array([row[:width] for row in rows], np.int64).reshape(len(rows), width)


def reference_top_classes(bundle: Bundle, images: LabelledImages) -> TopClasses | None:
    """What the reference model in float64 puts first; None without PyTorch, or weights it knows.

    Raises:
        ImageError: an image cannot be decoded.
        BundleError: the weights are damaged.
    """
    backend = get_backend("torch")
    if not backend.availability().ok or backend.supports(bundle.manifest, None) is not None:
        return None
    from vitdeploy.backends.torch import reference_session

    with reference_session(bundle) as session:
        return top_classes(Predictor(bundle, session), images)


def score(
    model: str, backend: str, classes: TopClasses, reference: TopClasses, labels: Labels
) -> AccuracyRecord:
    """Count right answers, and agreement with the reference.

    Raises:
        ValueError: no images, or not of the same number everywhere.
    """
    compared = compare_accuracy(classes, reference, labels)
    top5 = _among_five(classes, labels)
    return AccuracyRecord(
        model,
        backend,
        images=len(labels),
        correct=int((classes[:, 0] == labels).sum()),
        agree=int((classes[:, 0] == reference[:, 0]).sum()),
        top5=None if top5 is None else int(top5.sum()),
        top1_difference=compared.top1_difference,
        top1_interval=compared.top1_interval,
    )


def check_max_drop(max_drop: float | None, data: object) -> None:
    """Check what a user allows accuracy to drop by.

    Raises:
        UsageError: no number of points, or nothing to measure them on.
    """
    if max_drop is None:
        return
    if not 0 <= max_drop <= 100:
        raise UsageError(
            f"--max-drop {max_drop:g}: not a number of percentage points", hint="--max-drop 0.5, half a point"
        )
    if data is None:
        raise UsageError("--max-drop is measured on labelled images, and there are none", hint="--data DIR")


def judge_drop(record: Scored, max_drop: float) -> tuple[bool, str]:
    """Whether an artifact's top-1 stays within ``max_drop`` points of the reference's, and one line about it.

    What was observed decides. Where the interval of the true drop holds what is allowed, the line says so:
    other images of the same kind might decide otherwise.
    """
    lost = -round(record.top1_difference * record.images)  # images, net
    held = lost * 100 <= max_drop * record.images + 1e-9
    low, high = sorted(-100 * limit for limit in record.top1_interval)
    share = 100 * record.top1
    verdict = f"{'within' if held else 'more than'} the {max_drop:g} allowed"
    said = (
        f"top-1 {share:.2f} %, {100 * lost / record.images:.2f} points below the reference "
        f"(95 % interval {low:.2f} to {high:.2f}), {verdict}"
    )
    if low < max_drop < high:
        said += f"; {record.images} images cannot tell: the interval holds {max_drop:g}"
    return held, said


def judge_quantised(record: Scored) -> tuple[bool, str]:
    """Whether images show that a quantised artifact loses more than ``USUAL_DROP``, and one line about it.

    They do where the whole interval of the true drop lies beyond it. Few images show little either way.
    """
    low, high = sorted(-100 * limit for limit in record.top1_interval)
    held = low <= USUAL_DROP
    share, lost = 100 * record.top1, 0.0 - 100 * record.top1_difference
    said = (
        f"top-1 {share:.2f} % of {record.images} images, {lost:.2f} points below the reference "
        f"(95 % interval {low:.2f} to {high:.2f})"
    )
    return held, said if held else f"{said}, which is wholly beyond the {USUAL_DROP:g} that 8 bits may cost"


def compare_accuracy(classes: TopClasses, reference: TopClasses, labels: Labels) -> AccuracyComparison:
    """Hold a model against the reference.

    Args:
        classes, reference: what :func:`top_classes` gives for each.
        labels: (K,) the right classes; K is at least 1.

    Raises:
        ValueError: no images, or not of the same number everywhere.
    """
    if not len(classes) == len(reference) == len(labels) > 0:
        raise ValueError(f"{len(classes)}, {len(reference)} and {len(labels)} images to compare")
    right, reference_right = classes[:, 0] == labels, reference[:, 0] == labels
    top5, reference_top5 = _among_five(classes, labels), _among_five(reference, labels)
    gained, lost = int((right & ~reference_right).sum()), int((reference_right & ~right).sum())
    return AccuracyComparison(
        images=len(labels),
        top1=float(right.mean()),
        top5=None if top5 is None else float(top5.mean()),
        reference_top1=float(reference_right.mean()),
        reference_top5=None if reference_top5 is None else float(reference_top5.mean()),
        top1_difference=(gained - lost) / len(labels),
        top1_interval=paired_interval(int((right & reference_right).sum()), gained, lost, len(labels)),
    )


def _among_five(classes: TopClasses, labels: Labels) -> NDArray[np.bool_] | None:
    """(K,) whether the right class is among the first five; None where that says nothing."""
    right: NDArray[np.bool_] = (classes == labels[:, None]).any(axis=1)
    return right if classes.shape[1] == _TOP else None


def paired_interval(both: int, first: int, second: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of the difference of two shares that were counted on the same trials.

    Method 10 (hybrid score) of R. G. Newcombe, "Improved confidence intervals for the difference between
    binomial proportions based on paired data", Statistics in Medicine 17 (1998), 2635-2650. Unlike the
    normal approximation it is wider than nothing where the two never differ.

    Args:
        both: trials that succeed both times.
        first, second: trials that succeed the first time only, and the second time only.
        trials: all of them, at least 1.

    Returns:
        The limits of (first share - second share), within -1 and 1.
    """
    one, other = both + first, both + second
    neither = trials - one - second
    (low1, high1), (low2, high2) = _wilson(one, trials), _wilson(other, trials)
    p1, p2 = one / trials, other / trials
    product = float(both * neither - first * second)
    if product > 0:  # corrected for continuity
        product = max(product - trials / 2, 0)
    variance = one * (trials - one) * other * (trials - other)
    correlation = product / math.sqrt(variance) if variance else 0.0

    def joined(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * correlation * a * b + b * b, 0))

    down, up = joined(p1 - low1, high2 - p2), joined(high1 - p1, p2 - low2)
    difference = (first - second) / trials
    return max(difference - down, -1.0), min(difference + up, 1.0)


def _wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's score interval of one share; holds the share itself, whatever the rounding."""
    share, square = successes / trials, _Z * _Z
    middle = share + square / (2 * trials)
    half = _Z * math.sqrt(share * (1 - share) / trials + square / (4 * trials * trials))
    scale = 1 + square / trials
    return min((middle - half) / scale, share), max((middle + half) / scale, share)
