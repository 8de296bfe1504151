"""Folders of pictures that a model can be calibrated with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (24, 32)) -> Image.Image:
    """Shading, an edge and some noise, another one for each seed: (H, W) RGB."""
    height, width = size
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(size)
    tilt = draw.uniform(-1, 1, (2, 3))
    pixels = 128 + 90 * (y[..., None] * tilt[0] + x[..., None] * tilt[1])
    pixels[x > draw.uniform(0.2, 0.8)] *= draw.uniform(0.3, 1.4)
    return Image.fromarray(np.clip(pixels + draw.normal(0, 12, pixels.shape), 0, 255).astype(np.uint8))


def pictures(folder: Path, count: int, size: tuple[int, int] = (24, 32)) -> Path:
    """Write ``000.png`` and so on, each another picture; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(i, size).save(folder / f"{i:03d}.png")
    return folder
