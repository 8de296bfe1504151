"""All figures of a bundle and of images, as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitdeploy.config import Size
from vitdeploy.explanation.measures import Float, Norms
from vitdeploy.explanation.pictures import Pixels
from vitdeploy.explanation.precision import BlockErrors
from vitdeploy.predictor import Prediction


@dataclass(frozen=True, eq=False)
class Relevance:
    """Where what speaks for a class is."""

    label: Prediction
    places: Float
    """(rows, columns)."""


@dataclass(frozen=True, eq=False)
class ImageFigures:
    """Of one image."""

    path: str
    picture: Pixels
    """What the model is given, resized and cropped, (H, W, 3)."""
    predictions: tuple[Prediction, ...] = ()
    rollout: Float | None = None
    """(rows, columns)."""
    relevance: tuple[Relevance, ...] = ()
    attention: tuple[Float, ...] = ()
    """Of each block, (h, rows, columns)."""
    distances: tuple[Float, ...] = ()
    """Of each block, (h) in pixels."""
    norms: tuple[Norms, ...] = ()
    """Of each block."""
    lengths: tuple[Float, ...] = ()
    """Of each block's tokens in the image, (rows, columns)."""

    @property
    def image_size(self) -> Size:
        return self.picture.shape[0], self.picture.shape[1]

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "image_size": list(self.image_size),
            "predictions": [_label(prediction) for prediction in self.predictions],
            "rollout": None if self.rollout is None else numbers(self.rollout),
            "relevance": [_label(found.label) | {"map": numbers(found.places)} for found in self.relevance],
            "distances": [numbers(heads) for heads in self.distances],
            "norms": [norms._asdict() for norms in self.norms],
        }


@dataclass(frozen=True, eq=False)
class ModelFigures:
    """Of the weights alone."""

    filters: Float | None = None
    """Principal components of the first projection, (k, C, rows, columns)."""
    shares: tuple[float, ...] = ()
    """Of the filters' variance that each has."""
    positions: Float | None = None
    """Cosines of every two positions, (P, P)."""
    grid: Size = (0, 0)
    """Rows and columns of the positions."""
    prefix: tuple[str, ...] = ()
    """What the first tokens are, where they are no patches."""
    looks: str = ""
    """From where heads look in ``ImageFigures.attention``, in words."""


@dataclass(frozen=True)
class LeftOut:
    """A figure that there is none of."""

    figure: str
    reason: str


@dataclass(frozen=True, eq=False)
class Explanation:
    """What was found, and where it was written."""

    bundle: Path
    name: str
    summary: str
    """The model's measures, in one line."""
    images: tuple[ImageFigures, ...]
    model: ModelFigures
    errors: tuple[BlockErrors, ...]
    """What each precision costs behind each block, on the first image."""
    parity: tuple[tuple[str, float], ...]
    """Of each artifact, the worst relative error of an output that the bundle has on record."""
    left_out: tuple[LeftOut, ...]
    folder: Path | None = None
    files: tuple[str, ...] = ()
    """Of the folder."""
    html: Path | None = None

    @property
    def distances(self) -> tuple[Float, ...]:
        """Of each block, the mean over the images, (h) in pixels."""
        found = [image.distances for image in self.images]
        return tuple(np.mean(blocks, axis=0) for blocks in zip(*found, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "ok": True,
            "bundle": str(self.bundle),
            "model": self.summary,
            "images": [image.as_dict() for image in self.images],
            "distances": [numbers(heads) for heads in self.distances],
            "filters": [round(share, 6) for share in self.model.shares],
            "precision": [
                {
                    "precision": errors.precision,
                    "blocks": list(errors.blocks),
                    "of": errors.of,
                    "output": errors.output,
                    "reason": errors.reason,
                }
                for errors in self.errors
            ],
            "parity": dict(self.parity),
            "left_out": {left.figure: left.reason for left in self.left_out},
            "folder": None if self.folder is None else str(self.folder),
            "files": list(self.files),
            "html": None if self.html is None else str(self.html),
        }


def _label(prediction: Prediction) -> dict[str, Any]:
    return {"label": prediction.label, "index": prediction.index, "score": prediction.score}


def numbers(values: Float) -> list[Any]:
    """Six significant digits: figures are for eyes."""
    found: list[Any] = np.vectorize(lambda value: float(f"{value:.6g}"), otypes=[float])(values).tolist()
    return found


def mean_norms(images: Sequence[ImageFigures]) -> tuple[tuple[float, float, tuple[float, ...]], ...]:
    """Of each block the median and the largest patch, and the prefix tokens: means over the images."""
    found = []
    for blocks in zip(*(image.norms for image in images), strict=True):
        prefix = np.mean([norms.prefix for norms in blocks], axis=0)
        median, largest = (float(np.mean([getattr(n, key) for n in blocks])) for key in ("median", "largest"))
        found.append((median, largest, tuple(map(float, prefix))))
    return tuple(found)
