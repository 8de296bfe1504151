"""How often an artifact is right on labelled images, and how often it says what the reference says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitdeploy.errors import ImageError, UsageError, did_you_mean
from vitdeploy.images import find_images
from vitdeploy.manifest import Manifest
from vitdeploy.predictor import Predictor

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Accuracy:
    """First places of one model on labelled images."""

    model: str
    """An artifact's name, or ``reference``."""
    backend: str
    images: int
    correct: int
    agree: int
    """Images on which it names the class that the reference names."""


@dataclass(frozen=True)
class LabelledImages:
    """Files and the class of each."""

    paths: tuple[Path, ...]
    labels: Labels
    """(K,) class indices."""


def find_labelled(folder: Path, manifest: Manifest) -> LabelledImages:
    """Find images whose class their place says: ``<label>/*.png``, or ``<label>_*.png``.

    A label is one of the bundle's, or a class index.

    Raises:
        UsageError: the bundle does not classify, or a name says no class of it.
        ImageError: the folder does not exist or holds no image.
    """
    if manifest.output != "logits":
        raise UsageError(f"accuracy needs logits, but this bundle gives {manifest.output}")
    if not folder.is_dir():
        raise ImageError(f"{folder}: is not a folder of labelled images", hint="--data DIR")
    classes = _classes(manifest)
    paths = find_images([folder])
    return LabelledImages(tuple(paths), np.array([_class_of(path, folder, classes) for path in paths]))


def _classes(manifest: Manifest) -> dict[str, int]:
    """Every name of a class: its label, and its index unless that is the label of another."""
    labels = manifest.labels or ()
    width = manifest.artifacts[0].outputs[0].shape[-1] if manifest.artifacts else len(labels)
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


def first_places(predictor: Predictor, images: LabelledImages) -> Labels:
    """The class index that a model puts first, for each image.

    Raises:
        ImageError: an image cannot be decoded.
        BundleError: the runtime fails.
    """
    return np.array([best[0].index for best in predictor.predict(images.paths, top_k=1)])


def score(model: str, backend: str, found: Labels, reference: Labels, images: LabelledImages) -> Accuracy:
    """Count right answers, and agreement with the reference."""
    correct, agree = int((found == images.labels).sum()), int((found == reference).sum())
    return Accuracy(model, backend, len(images.paths), correct, agree)
