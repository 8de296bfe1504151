"""The layout of Google's released ViT ``.npz`` files, and what such a file computes: numpy in float64 alone.

Written from the description of the layout and of flax's layers (https://flax.readthedocs.io), not from a
converter: ``nn.gelu`` is the tanh form, LayerNorm adds 1e-6, attention divides the query by the square root
of a head's width, images are NHWC.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


def synthesise(
    *,
    seed: int,
    width: int = 16,
    heads: int = 2,
    depth: int = 2,
    mlp: int = 24,
    patch: int = 4,
    side: int = 4,
    classes: int = 5,
    representation: int = 0,
    token: bool = True,
) -> dict[str, NDArray[np.float32]]:
    """Random arrays under the names of a released file; ``side`` patches along each edge."""
    random = np.random.default_rng(seed)
    per_head = width // heads

    def dense(name: str, *shape: int, inputs: int = 1) -> dict[str, Array]:
        return {
            f"{name}/kernel": random.normal(0, 0.3, shape),
            f"{name}/bias": random.normal(0, 0.3, shape[inputs:]),
        }

    def norm(name: str) -> dict[str, Array]:
        return {f"{name}/scale": random.normal(1, 0.3, width), f"{name}/bias": random.normal(0, 0.3, width)}

    arrays = dense("embedding", patch, patch, 3, width, inputs=3)
    if token:
        arrays["cls"] = random.normal(0, 0.3, (1, 1, width))
    arrays["Transformer/posembed_input/pos_embedding"] = random.normal(
        0, 0.3, (1, token + side * side, width)
    )
    for block in range(depth):
        base = f"Transformer/encoderblock_{block}"
        attention = f"{base}/MultiHeadDotProductAttention_1"
        arrays |= norm(f"{base}/LayerNorm_0") | norm(f"{base}/LayerNorm_2")
        for name in ("query", "key", "value"):
            arrays |= dense(f"{attention}/{name}", width, heads, per_head)
        arrays |= dense(f"{attention}/out", heads, per_head, width, inputs=2)
        arrays |= dense(f"{base}/MlpBlock_3/Dense_0", width, mlp) | dense(
            f"{base}/MlpBlock_3/Dense_1", mlp, width
        )
    arrays |= norm("Transformer/encoder_norm")
    if representation:
        arrays |= dense("pre_logits", width, representation)
    arrays |= dense("head", representation or width, classes)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def forward(arrays: dict[str, Any], images: Array) -> Array:
    """Logits (N, classes) of images (N, H, W, 3), in float64; positions are stretched where they must be."""
    weights = {name: np.asarray(array, dtype=np.float64) for name, array in arrays.items()}

    def norm(x: Array, name: str) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * weights[f"{name}/scale"] + weights[f"{name}/bias"]

    def dense(x: Array, name: str, subscripts: str) -> Array:
        return np.einsum(subscripts, x, weights[f"{name}/kernel"]) + weights[f"{name}/bias"]

    kernel = weights["embedding/kernel"]
    patch, width = kernel.shape[0], kernel.shape[-1]
    count, height, across, channels = images.shape
    grid = height // patch, across // patch
    tiles = images.reshape(count, grid[0], patch, grid[1], patch, channels)
    x = np.einsum("nyaxbc,abcd->nyxd", tiles, kernel).reshape(count, -1, width) + weights["embedding/bias"]
    prefix = int("cls" in weights)
    if prefix:
        x = np.concatenate([np.broadcast_to(weights["cls"], (count, 1, width)), x], axis=1)
    x = x + stretch(weights["Transformer/posembed_input/pos_embedding"][0], prefix, grid)
    block = 0
    while (base := f"Transformer/encoderblock_{block}") + "/LayerNorm_0/scale" in weights:
        y = norm(x, f"{base}/LayerNorm_0")
        attention = f"{base}/MultiHeadDotProductAttention_1"
        q, k, v = (dense(y, f"{attention}/{name}", "ntd,dhe->nthe") for name in ("query", "key", "value"))
        scores = np.einsum("nthe,nshe->nhts", q / np.sqrt(q.shape[-1]), k)
        exponent = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("nhts,nshe->nthe", exponent / exponent.sum(-1, keepdims=True), v)
        x = x + dense(mixed, f"{attention}/out", "nthe,hed->ntd")
        y = gelu(dense(norm(x, f"{base}/LayerNorm_2"), f"{base}/MlpBlock_3/Dense_0", "ntd,dm->ntm"))
        x = x + dense(y, f"{base}/MlpBlock_3/Dense_1", "ntm,md->ntd")
        block += 1
    x = norm(x, "Transformer/encoder_norm")
    pooled = x[:, 0] if prefix else x.mean(axis=1)
    if "pre_logits/kernel" in weights:
        pooled = np.tanh(dense(pooled, "pre_logits", "nd,dr->nr"))
    return dense(pooled, "head", "nd,dc->nc")


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def stretch(table: Array, prefix: int, grid: tuple[int, int]) -> Array:
    """Linear interpolation along each axis, corners on corners: ``scipy.ndimage.zoom(order=1)``."""
    side = round(np.sqrt(len(table) - prefix))
    square = table[prefix:].reshape(side, side, -1)
    for axis, length in enumerate(grid):
        wanted = np.linspace(0, side - 1, length)
        square = np.apply_along_axis(
            lambda line, at=wanted: np.interp(at, np.arange(side), line), axis, square
        )
    return np.concatenate([table[:prefix], square.reshape(grid[0] * grid[1], -1)])
