"""Arrays as pictures: maps in colour, over an image, and side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitdeploy.config import Preprocess
from vitdeploy.explanation.measures import Array, Float

Pixels = NDArray[np.uint8]
"""(H, W, 3), or (H, W, 4) with transparency."""
Kind = Literal["PNG", "WEBP"]

_MOST_SIDE = 448
"""Pixels of a picture's longer side, on a page."""
_STOPS: Float = np.array(
    [
        [8, 12, 44],
        [62, 22, 110],
        [126, 36, 110],
        [190, 54, 85],
        [236, 98, 52],
        [252, 166, 50],
        [250, 238, 150],
    ]
)
"""From dark to light evenly, so that it is read in grey, too."""


def heat(values: Array) -> Pixels:
    """Numbers from 0 to 1 as colours, (...) to (..., 3)."""
    place = np.clip(np.nan_to_num(np.asarray(values, np.float64)), 0, 1) * (len(_STOPS) - 1)
    below = np.minimum(place.astype(int), len(_STOPS) - 2)
    share = (place - below)[..., None]
    colours: Pixels = np.rint(_STOPS[below] * (1 - share) + _STOPS[below + 1] * share).astype(np.uint8)
    return colours


def scaled(values: Array) -> Float:
    """From the least to the largest as 0 to 1; zeros where all are alike."""
    wide = np.asarray(values, np.float64)
    low, high = float(wide.min()), float(wide.max())
    found: Float = (wide - low) / (high - low) if high > low else np.zeros_like(wide)
    return found


def seen(pixel_values: Array, spec: Preprocess) -> Pixels:
    """What a model is given as a picture again: (C, H, W) normalised to (H, W, 3)."""
    mean, std = (np.array(numbers, np.float64)[:, None, None] for numbers in (spec.mean, spec.std))
    levels = (np.asarray(pixel_values, np.float64) * std + mean) / spec.rescale
    image = np.rint(levels.clip(0, 255)).astype(np.uint8).transpose(1, 2, 0)
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


def resized(image: Pixels, height: int, width: int, *, smooth: bool = True) -> Pixels:
    """A picture of another size; without ``smooth``, every pixel stays a rectangle."""
    how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return np.array(Image.fromarray(image).resize((width, height), how))


def easily_seen(picture: Pixels) -> Pixels:
    """A picture neither so small that nothing is seen, nor larger than a page needs."""
    longer = max(picture.shape[:2])
    if 160 <= longer <= _MOST_SIDE:
        return picture
    wanted = 320 if longer < 160 else _MOST_SIDE
    height, width = (round(side * wanted / longer) for side in picture.shape[:2])
    return resized(picture, max(1, height), max(1, width))


def over(image: Pixels, values: Array) -> Pixels:
    """A map over a picture: bright where it is large, the dimmed picture in grey where it is small.

    Args:
        image: (H, W, 3).
        values: (rows, columns), scaled from the least to the largest.
    """
    height, width = image.shape[:2]
    small = Image.fromarray(scaled(values).astype(np.float32))
    wide = np.array(small.resize((width, height), Image.Resampling.BILINEAR)).clip(0, 1)
    grey = (image @ np.array([0.299, 0.587, 0.114]))[..., None] * 0.75
    strength = (0.15 + 0.65 * wide)[..., None]
    mixed: Pixels = np.rint(grey * (1 - strength) + heat(wide) * strength).clip(0, 255).astype(np.uint8)
    return mixed


def tiled(tiles: Sequence[Pixels], columns: int, gap: int) -> Pixels:
    """Pictures of one size row by row, with nothing between them: (H, W, 4)."""
    height, width = tiles[0].shape[:2]
    rows = -(-len(tiles) // columns)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, 4)
    canvas = np.zeros(shape, np.uint8)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        top, left = row * (height + gap), column * (width + gap)
        canvas[top : top + height, left : left + width, :3] = tile[..., :3]
        canvas[top : top + height, left : left + width, 3] = 255
    return canvas


def stacked(rows: Sequence[Pixels], gap: int) -> Pixels:
    """Pictures below one another, flush left."""
    width = max(row.shape[1] for row in rows)
    height = sum(row.shape[0] for row in rows) + gap * (len(rows) - 1)
    canvas, top = np.zeros((height, width, 4), np.uint8), 0
    for row in rows:
        canvas[top : top + row.shape[0], : row.shape[1], : row.shape[2]] = row
        if row.shape[2] == 3:
            canvas[top : top + row.shape[0], : row.shape[1], 3] = 255
        top += row.shape[0] + gap
    return canvas


def encoded(image: Pixels, kind: Kind = "PNG") -> bytes:
    """A file's bytes; WebP loses what nobody sees."""
    buffer = io.BytesIO()
    settings: dict[str, Any] = {"optimize": True} if kind == "PNG" else {"quality": 82, "method": 4}
    Image.fromarray(image).save(buffer, kind, **settings)
    return buffer.getvalue()


def data_url(data: bytes, kind: Kind) -> str:
    """For the ``src`` of a page that loads nothing."""
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
