"""What the small v2 servers compute: the linear classifier of ``bundles``, right or wrong on order.

Images are preprocessed with Pillow and numpy, or PyTorch, not with vitdeploy's own preprocessing.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from scipy import special

from tests.fakes.v2_server import Array, Served
from tests.helpers.bundles import LABELS, SIZE, WEIGHT, answer
from vitdeploy.config import Scores

IMAGENET = (np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]))
HALF = (np.full(3, 0.5), np.full(3, 0.5))


def linear(weight: Array = WEIGHT) -> Callable[[Array], Array]:
    """The classifier in float64, rounded at the end."""

    def run(inputs: Array) -> Array:
        flat = inputs.astype(np.float64).reshape(len(inputs), -1)
        return (flat @ weight.astype(np.float64)).astype(np.float32)

    return run


def served(function: Callable[[Array], Array] | None = None, **facts: Any) -> Served:
    """The classifier as version 1, with its labels."""
    return Served(**{"versions": {"1": function or linear()}, "labels": LABELS, **facts})


def in_half(inputs: Array) -> Array:
    """The classifier with every product in float16."""
    flat = inputs.reshape(len(inputs), -1).astype(np.float16)
    return (flat.astype(np.float32) @ WEIGHT.astype(np.float16).astype(np.float32)).astype(np.float32)


def resized(image: Image.Image, how: str) -> Array:
    """(8, 8, 3) from 0 to 255, float64."""
    rgb = image.convert("RGB")
    match how:
        case "cropped":
            scale = SIZE / min(rgb.size)
            whole = rgb.resize((int(rgb.width * scale), int(rgb.height * scale)), Image.Resampling.BILINEAR)
            left, top = (whole.width - SIZE) // 2, (whole.height - SIZE) // 2
            rgb = whole.crop((left, top, left + SIZE, top + SIZE))
        case "rough":
            return _without_antialiasing(rgb)
        case _:
            rgb = rgb.resize((SIZE, SIZE), Image.Resampling[how.upper()])
    return np.asarray(rgb).astype(np.float64)


def _without_antialiasing(image: Image.Image) -> Array:
    import torch

    planes = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].double()
    small = torch.nn.functional.interpolate(planes, (SIZE, SIZE), mode="bilinear", antialias=False)
    return small[0].permute(1, 2, 0).round().numpy()


def pixels(
    data: bytes,
    *,
    how: str = "bilinear",
    statistics: tuple[Array, Array] = HALF,
    scale: float = 255.0,
    bgr: bool = False,
) -> Array:
    """An image file as the network's input (1, 3, 8, 8)."""
    values = resized(Image.open(io.BytesIO(data)), how) / scale
    if bgr:
        values = values[..., ::-1]
    mean, std = statistics
    return ((values - mean) / std).transpose(2, 0, 1)[None].astype(np.float32)


def scored(logits: Array, labels: tuple[str, ...] = LABELS, kind: Scores = "softmax") -> list[dict[str, Any]]:
    """One row of logits as ``:predict`` has it, all classes."""
    scores: Array = {"softmax": special.softmax, "sigmoid": special.expit, "none": np.array}[kind](logits)
    best = np.argsort(-scores, kind="stable")
    return [{"label": labels[i], "index": int(i), "score": float(scores[i])} for i in best]


def predict(
    labels: tuple[str, ...] = LABELS, scores: Scores = "softmax", **wrong: Any
) -> Callable[[bytes, str], dict[str, Any]]:
    """A ``:predict`` with its preprocessing wrong on order."""

    def run(data: bytes, kind: str) -> dict[str, Any]:
        assert kind in ("image/png", "image/jpeg")
        logits = answer(pixels(data, **wrong))[0]
        return {"model_name": "linear", "model_version": "1", "predictions": [scored(logits, labels, scores)]}

    return run


def ensemble(top: int = 3, **wrong: Any) -> Served:
    """A v2 model of image files: labels and float32 scores of the best classes."""

    def run(files: Array) -> dict[str, Array]:
        rows = [scored(answer(pixels(data, **wrong))[0])[:top] for data in files.reshape(-1)]
        labels = np.array([[item["label"].encode() for item in row] for row in rows], dtype=object)
        scores = np.array([[item["score"] for item in row] for row in rows], dtype=np.float32)
        return {"labels": labels, "scores": scores}

    return Served(
        {"1": run}, input=("image", "BYTES", [-1, 1]), output=("labels", "BYTES", [-1, top]), labels=LABELS
    )
