"""The images that a model is quantised with, and those that it is proven on afterwards.

Ranges are taken from what the model will see: noise says nothing of it (docs/quantisation.md). Of a folder,
images are chosen evenly in the order of their paths, so that a folder for each class counts as a whole; of
those, some are held out. They are kept as the preprocessing leaves them before it rescales, 8 bits a channel:
whatever input a model reads is made of that.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitdeploy.bundle.files import sha256
from vitdeploy.bundle.quantisation import CalibrationRecord
from vitdeploy.config import Preprocess, Size, size_name
from vitdeploy.errors import UsageError
from vitdeploy.images.decode import find_images, load_image
from vitdeploy.images.kinds import unread_line
from vitdeploy.images.preprocess import apply_uint8

LEAST = 8
"""Images below which ranges are those of single images."""
MOST = 32
"""Images to calibrate with: more change no range that counts."""
HELD_OUT = 16
"""Images to prove with."""
NOISE = 0.6
"""Roughness from which on an image is noise: of that it is 1, or 0.75 once resized; of pictures below 0.3."""
WANTED = (
    f"--calibration DIR, a folder with {MOST + HELD_OUT} or more typical images (at least {LEAST}), as the "
    "model will see them; no labels"
)
"""What to do where there are none, in a hint."""

Pixels = NDArray[np.uint8]
_IMAGES, _HELD_OUT = "images", "held_out"


@dataclass(frozen=True)
class CalibrationImages:
    """Images of a model's size, each different from the others.

    Attributes:
        images: to calibrate with, (K, H, W, C).
        held_out: to prove with, (M, H, W, C), none of ``images`` among them.
        record: the sha256 of their files.
        note: what of the folder was not read, in one line; or nothing.
    """

    images: Pixels
    held_out: Pixels
    record: CalibrationRecord
    note: str = ""

    @property
    def size(self) -> Size:
        """Height and width."""
        return self.images.shape[1], self.images.shape[2]

    def tensors(self) -> dict[str, Pixels]:
        """What a bundle keeps of them."""
        return {_IMAGES: self.images, _HELD_OUT: self.held_out}


def read_folder(folder: Path, spec: Preprocess) -> CalibrationImages:
    """Choose images below a folder and preprocess them, for a model of one channel or three.

    Raises:
        ImageError: the folder does not exist, holds no image, or one that is chosen cannot be decoded.
        UsageError: too few of them differ, or show anything.
    """
    unread = Counter[str]()
    found = find_images([folder], unread)
    count = min(len(found), MOST + HELD_OUT)
    _require(folder, len(found), f"has {_counted(len(found))}")
    chosen: dict[str, tuple[Path, Pixels]] = {}
    for i in range(count):
        path = found[i * len(found) // count]
        pixels = apply_uint8(load_image(path, heif=True), spec)
        chosen.setdefault(hashlib.sha256(pixels.tobytes()).hexdigest(), (path, pixels))
    _require(folder, len(chosen), f"of {count} images, {len(chosen)} differ where the model sees them")
    shown = [(path, pixels) for path, pixels in chosen.values() if pixels.min() < pixels.max()]
    _require(folder, len(shown), f"of {count} images, {len(shown)} are more than one plain colour")
    rough = [roughness(pixels) for _, pixels in shown]
    if np.median(rough) >= NOISE:
        noise = sum(value >= NOISE for value in rough)
        raise UsageError(
            f"{folder}: of {len(shown)} images, {noise} are noise, whose pixels have nothing to do with "
            "their neighbours: no range that a model meets follows from them",
            hint=WANTED,
        )
    held = _held_out(len(shown))
    parts = [[item for i, item in enumerate(shown) if (i in held) == is_held] for is_held in (False, True)]
    hashes = [tuple(sha256(path) for path, _ in part) for part in parts]
    images, held_out = (np.stack([pixels for _, pixels in part]) for part in parts)
    record = CalibrationRecord(images=hashes[0], held_out=hashes[1])
    return CalibrationImages(images, held_out, record, unread_line(unread))


def from_tensors(
    tensors: Mapping[str, NDArray[Any]], record: CalibrationRecord | None, spec: Preprocess, where: Path
) -> CalibrationImages:
    """What :meth:`CalibrationImages.tensors` gave, for a model with this preprocessing.

    Raises:
        UsageError: the bundle was never calibrated, or for another image size.
    """
    if record is None or not {_IMAGES, _HELD_OUT} <= tensors.keys():
        raise UsageError(f"{where}: the bundle has no calibration images: it is not quantised", hint=WANTED)
    kept = CalibrationImages(tensors[_IMAGES], tensors[_HELD_OUT], record)
    if kept.images.shape[1:] != (*spec.size, spec.channels):
        raise UsageError(
            f"{where}: its calibration images are {size_name(kept.size)} with {kept.images.shape[-1]} "
            f"channels, and the model reads {size_name(spec.size)} with {spec.channels}",
            hint=WANTED,
        )
    return kept


def roughness(pixels: Pixels) -> float:
    """How much neighbouring pixels of an image (H, W, C) differ, beside any two of it: 1 of white noise.

    It is von Neumann's ratio: half the mean square of differences, divided by the variance.
    """
    values = pixels.astype(np.float64)
    squares = [np.square(np.diff(values, axis=axis)).mean() for axis in (0, 1)]
    return float(np.mean(squares) / 2 / max(values.var(axis=(0, 1)).mean(), 1e-12))


def _require(folder: Path, count: int, found: str) -> None:
    """Refuse fewer images than ranges can be taken from."""
    if count < LEAST:
        raise UsageError(f"{folder}: {found}: too few to calibrate with", hint=WANTED)


def _held_out(count: int) -> Sequence[int]:
    """Which of so many images are held out: a third of them, evenly."""
    held = min(HELD_OUT, count // 3)
    return [(2 * i + 1) * count // (2 * held) for i in range(held)]


def _counted(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"
