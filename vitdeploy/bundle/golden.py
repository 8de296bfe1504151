"""The images on which every artifact is compared with the reference, drawn at any size.

Three scenes with the statistics of photographs (1/f texture, shading, hard edges), then noise, constants and
extreme contrast. Drawn with integers only, from the raw 64-bit stream of PCG64, which numpy keeps stable
between versions (a ``Generator``'s distributions it does not): every machine draws the same pixels.

For a model of one channel they are grey. Beyond three channels, each three are the first three moved on by
one more pixel, so that no channel of a scene can stand for another unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitdeploy.config import InputKind, Output, Preprocess, Size

_Pixels = NDArray[np.int64]

REFERENCE = "reference"
"""The key of the reference's answers."""
_UNIT = 4096
"""Scenes are drawn in coordinates from 0 to this, whatever the size."""


def golden_images(
    size: Size, channels: int = 3, names: Sequence[str] | None = None
) -> list[NDArray[np.uint8]]:
    """Return one (H, W, channels) uint8 image per name in ``GOLDEN_NAMES``, in that order; RGB where it is 3.

    Args:
        names: some of them only.

    From 8x8 pixels on, no two are the same.
    """
    return [_with_channels(_DRAWINGS[name](size), channels) for name in names or GOLDEN_NAMES]


def golden_inputs(
    spec: Preprocess, size: Size, kind: InputKind, names: Sequence[str] | None = None
) -> NDArray[Any]:
    """The same images as a model reads them: (K, C, H, W) float32 normalised, or (K, H, W, C) uint8.

    Patches are made of the former, by the model's architecture.
    """
    return inputs_of(np.stack(golden_images(size, spec.channels, names)), spec, kind)


def inputs_of(images: NDArray[np.uint8], spec: Preprocess, kind: InputKind) -> NDArray[Any]:
    """Images (K, H, W, C) uint8 of the model's size as it reads them; see :func:`golden_inputs`."""
    if kind == "uint8":
        return images
    mean, std = (np.array(values, np.float64) for values in (spec.mean, spec.std))
    normalised = (images * spec.rescale - mean) / std
    return np.ascontiguousarray(normalised.astype(np.float32).transpose(0, 3, 1, 2))


def reference_key(outputs: Sequence[Output], output: Output) -> str:
    """What a bundle calls the reference's answers for one of its outputs: ``reference`` is the first's."""
    return REFERENCE if output == outputs[0] else f"{REFERENCE}.{output}"


def reference_of(arrays: Mapping[str, NDArray[Any]], output: Output) -> NDArray[Any]:
    """The reference's answers for an output, among the arrays of :func:`reference_key`."""
    return arrays.get(f"{REFERENCE}.{output}", arrays[REFERENCE])


def raw_images() -> list[NDArray[np.uint8]]:
    """Return two (H, W, 3) uint8 RGB images, one wide, one tall, that a preprocessing has to resize."""
    return [_landscape((213, 320)), _still_life((240, 97))]


def _with_channels(image: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """(H, W, 3) to (H, W, channels)."""
    if channels == 1:  # as Pillow's convert("L")
        luma = image.astype(np.int64) @ np.array([[19595], [38470], [7471]]) + 32768
        return _to_uint8(luma >> 16)
    pixels = image.reshape(-1, 3)
    moved = [np.roll(pixels, step, axis=0) for step in range(-(-channels // 3))]
    made: NDArray[np.uint8] = np.concatenate(moved, axis=-1)[:, :channels]
    return made.reshape(*image.shape[:2], channels)


def _landscape(size: Size) -> NDArray[np.uint8]:
    """Sky, clouds, a sun, a mountain ridge before it, a meadow."""
    y, x = _grid(size)
    clouds = _texture(size, seed=1)
    sky = _mix(y, (64, 120, 210), (225, 230, 240)) + (clouds[..., None] - 128) // 3
    sun = (x - 2900) ** 2 + (y - 800) ** 2 < 350**2
    ridge = 1500 + 6 * _texture((1, size[1]), seed=2)
    rock = _mix(y, (70, 66, 80), (120, 110, 100)) + (_texture(size, seed=3)[..., None] - 128) // 2
    meadow = _mix(y, (60, 110, 30), (150, 170, 60)) + (_noise(size, seed=4)[..., None] - 128) // 4
    scene = np.where(sun[..., None], np.array([255, 244, 200]), sky)
    scene = np.where((y > ridge)[..., None], rock, scene)
    return _to_uint8(np.where((y > 2900 + 2 * clouds)[..., None], meadow, scene))


def _still_life(size: Size) -> NDArray[np.uint8]:
    """Shaded balls and a striped box on a wooden table."""
    y, x = _grid(size)
    grain = _texture((size[0], 1), seed=5) + _texture(size, seed=6) // 3
    scene = _mix(grain * 12, (90, 50, 25), (200, 140, 80))
    box = (abs(x - 3000) < 700) & (abs(y - 1300) < 800)
    stripes = np.where(((x + y) // 200 % 2 == 0)[..., None], [230, 225, 60], [30, 60, 160])
    scene = np.where(box[..., None], stripes, scene)
    balls = (
        ((1200, 1300), 900, (220, 30, 40)),
        ((2300, 2900), 1000, (40, 160, 90)),
        ((900, 3300), 500, (240, 240, 250)),
    )
    for (centre_x, centre_y), radius, colour in balls:
        distance = (x - centre_x) ** 2 + (y - centre_y) ** 2
        light = (x - centre_x + radius // 3) ** 2 + (y - centre_y + radius // 3) ** 2
        shade = _UNIT - light * _UNIT // (2 * radius**2)
        ball = np.array(colour) * shade[..., None] // _UNIT
        scene = np.where((distance < radius**2)[..., None], ball, scene)
    return _to_uint8(scene)


def _foliage(size: Size) -> NDArray[np.uint8]:
    """Texture alone, its colours correlated as a photograph's are."""
    shared = _texture(size, seed=7)
    hues = np.stack([_texture(size, seed=seed) for seed in (8, 9, 10)], axis=-1)
    return _to_uint8((3 * shared[..., None] + hues) // 4 * np.array([200, 256, 130]) // 256)


def _uniform_noise(size: Size) -> NDArray[np.uint8]:
    return np.stack([_noise(size, seed=seed) for seed in (11, 12, 13)], axis=-1).astype(np.uint8)


def _constant(level: int) -> Callable[[Size], NDArray[np.uint8]]:
    return lambda size: np.full((*size, 3), level, dtype=np.uint8)


def _checkerboard(size: Size) -> NDArray[np.uint8]:
    """Black and white pixel by pixel."""
    odd = np.add.outer(np.arange(size[0]), np.arange(size[1])) % 2
    return _to_uint8(odd[..., None] * np.array([255, 255, 255]))


def _bright_pixel(size: Size) -> NDArray[np.uint8]:
    """One white pixel on black."""
    image = np.zeros((*size, 3), dtype=np.uint8)
    image[size[0] // 3, size[1] // 3] = 255
    return image


def _grid(size: Size) -> tuple[_Pixels, _Pixels]:
    """Rows (H, 1) and columns (1, W) in scene coordinates."""
    height, width = size
    return np.arange(height)[:, None] * _UNIT // height, np.arange(width)[None] * _UNIT // width


def _mix(position: _Pixels, first: tuple[int, int, int], last: tuple[int, int, int]) -> _Pixels:
    """A colour gradient: ``first`` at position 0, ``last`` at ``_UNIT``."""
    share = position[..., None]
    start, end = (np.array(colour, dtype=np.int64) for colour in (first, last))
    return (start * (_UNIT - share) + end * share) // _UNIT


def _noise(size: Size, seed: int) -> _Pixels:
    """White noise: (H, W) of 0 to 255."""
    raw = np.random.PCG64(seed).random_raw(size[0] * size[1])
    return (raw >> np.uint64(56)).astype(np.int64).reshape(size)


def _texture(size: Size, seed: int) -> _Pixels:
    """Noise whose amplitude falls as 1/f, like a photograph's: (H, W) of 0 to 255.

    Octaves of white noise, each twice as fine as the one before and half as strong, enlarged bilinearly.
    """
    total = np.zeros(size, dtype=np.int64)
    octaves = max(1, (max(size) - 1).bit_length())
    for octave in range(octaves):
        cells = min(2**octave, size[0]) + 1, min(2**octave, size[1]) + 1
        layer = _noise(cells, seed * 1000 + octave)
        total += _enlarge(_enlarge(layer, size[0]).T, size[1]).T << (octaves - octave)
    low, high = int(total.min()), int(total.max())
    return (total - low) * 255 // max(1, high - low)


def _enlarge(layer: _Pixels, rows: int) -> _Pixels:
    """Interpolate (n, m) linearly to (rows, m)."""
    position = np.arange(rows) * (len(layer) - 1) * 256 // max(1, rows)
    row, share = position // 256, (position % 256)[:, None]
    return (layer[row] * (256 - share) + layer[row + 1] * share) // 256


def _to_uint8(image: _Pixels) -> NDArray[np.uint8]:
    return np.clip(image, 0, 255).astype(np.uint8)


_DRAWINGS: dict[str, Callable[[Size], NDArray[np.uint8]]] = {
    "landscape": _landscape,
    "still_life": _still_life,
    "foliage": _foliage,
    "noise": _uniform_noise,
    "black": _constant(0),
    "white": _constant(255),
    "checkerboard": _checkerboard,
    "bright_pixel": _bright_pixel,
}

GOLDEN_NAMES: tuple[str, ...] = tuple(_DRAWINGS)
"""What ``golden_images`` draws, in its order."""
FEWER_NAMES = ("landscape",)
"""What stands for all of them at a further image size, whose weights are those of the first."""
