"""Common mistakes, each as what it does to an input, a preprocessing or an output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from PIL import Image

from vitdeploy.backends.base import Array
from vitdeploy.config import InputKind, Preprocess
from vitdeploy.images.preprocess import apply, pixel_values
from vitdeploy.predictor import softmax

Change = Callable[[Array], Array]

_STATISTICS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "ImageNet's mean and std": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mean and std 0.5": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "CLIP's mean and std": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}

_CROPS = (1.0, 0.95, 0.9, 0.875)
"""Shares of the shorter edge that published checkpoints keep."""


def tensor_mistakes(kind: InputKind, spec: Preprocess | None) -> Iterator[tuple[str, Change]]:
    """What a server may do to a tensor before it reaches the model: a phrase, and the same done to (N, ...).

    The phrase fits behind "the answers are what the model gives for".
    """
    if kind == "uint8":
        yield "BGR images: the server swaps red and blue", lambda x: x[..., ::-1]
        yield "images with rows and columns swapped", lambda x: x.transpose(0, 2, 1, 3)
        return
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
    if kind == "float":
        yield from _value_mistakes(spec)
    for what, other in _geometries(spec):
        yield what, lambda image, other=other: convert(image, other)  # type: ignore[misc]
    yield (
        "pixels resized without antialiasing",
        lambda image: convert(_resized_roughly(image, spec), replace(_bare(spec), exif=spec.exif)),
    )
    yield "pixels with rows and columns swapped", lambda image: convert(image.transpose(_SWAP), spec)
    yield "mirrored pixels", lambda image: convert(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), spec)


def output_mistakes() -> Iterator[tuple[str, Change]]:
    """What a server may do to logits (N, classes): a sentence, and the same done here."""
    yield "the server gives softmax probabilities, not logits", softmax
    yield "the server gives log-probabilities, not logits", lambda x: np.log(np.maximum(softmax(x), 1e-300))
    yield "the server gives sigmoid scores, not logits", lambda x: 1 / (1 + np.exp(-np.clip(x, -700, 700)))
    yield "the server gives the negated logits", lambda x: -x


def without_antialiasing(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resize bilinearly from the four nearest pixels alone, as OpenCV and plain interpolation do."""
    pixels = np.asarray(image).astype(np.float64)  # (H, W, 3)
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


_SWAP = Image.Transpose.TRANSPOSE


def _value_mistakes(spec: Preprocess) -> Iterator[tuple[str, Callable[[Image.Image], Array]]]:
    for name, (mean, std) in _STATISTICS.items():
        if not (np.allclose(mean, spec.mean, atol=1e-3) and np.allclose(std, spec.std, atol=1e-3)):
            yield f"pixels normalised with {name}", _with(replace(spec, mean=mean, std=std))
    plain = replace(spec, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
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


def _resized_roughly(image: Image.Image, spec: Preprocess) -> Image.Image:
    """Resized to what ``spec`` resizes to, but not cropped, and without antialiasing."""
    height, width = image.height, image.width
    if spec.resize == "exact":
        height, width = spec.resize_to or spec.size
    elif spec.resize_edge is not None:
        ratio = spec.resize_edge / min(height, width)
        height, width = max(1, int(height * ratio)), max(1, int(width * ratio))
    elif spec.resize_to is not None:
        ratios = height / spec.resize_to[0], width / spec.resize_to[1]
        ratio = min(ratios) if spec.resize == "cover" else max(ratios)
        height, width = max(1, round(height / ratio)), max(1, round(width / ratio))
    return without_antialiasing(image.convert("RGB"), width, height)
