"""The layout of Google's released ViT ``.npz`` files, and what such a file computes: numpy in float64 alone.

Written from the description of the layout and of flax's layers (https://flax.readthedocs.io), not from a
converter: ``nn.gelu`` is the tanh form, LayerNorm adds 1e-6, attention divides the query by the square root
of a head's width, images are NHWC. Of the hybrids' ResNet: GroupNorm has 32 groups and adds 1e-6, a filter's
weights are divided by their deviation plus 1e-5, convolutions and pooling pad as SAME does.
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
    resnet: tuple[int, ...] | None = None,
    elder: bool = False,
) -> dict[str, NDArray[np.float32]]:
    """Random arrays under the names of a released file; ``side`` patches along each edge.

    Args:
        resnet: the blocks of each stage of a hybrid's ResNet, which begins with 32 channels.
        elder: GroupNorms of shape (1, 1, 1, C), as in the files of the ViT paper.
    """
    random = np.random.default_rng(seed)
    per_head = width // heads

    def dense(name: str, *shape: int, inputs: int = 1) -> dict[str, Array]:
        return {
            f"{name}/kernel": random.normal(0, 0.3, shape),
            f"{name}/bias": random.normal(0, 0.3, shape[inputs:]),
        }

    def norm(name: str) -> dict[str, Array]:
        return {f"{name}/scale": random.normal(1, 0.3, width), f"{name}/bias": random.normal(0, 0.3, width)}

    def convolution(base: str, suffix: str, *shape: int) -> dict[str, Array]:
        lead = (1, 1, 1) if elder else ()
        return {
            f"{base}conv{suffix}/kernel": random.normal(0.1, 0.3, shape),
            f"{base}gn{suffix}/scale": random.normal(1, 0.3, (*lead, shape[-1])),
            f"{base}gn{suffix}/bias": random.normal(0, 0.3, (*lead, shape[-1])),
        }

    arrays: dict[str, Array] = {}
    channels = 3
    if resnet is not None:
        arrays |= convolution("", "_root", 7, 7, 3, 32)
        channels = 32
        for stage, units in enumerate(resnet):
            for unit in range(units):
                base, inner = f"block{stage + 1}/unit{unit + 1}/", 32 * 2**stage
                if not unit:
                    arrays |= convolution(base, "_proj", 1, 1, channels, 4 * inner)
                arrays |= convolution(base, "1", 1, 1, channels, inner)
                arrays |= convolution(base, "2", 3, 3, inner, inner)
                arrays |= convolution(base, "3", 1, 1, inner, 4 * inner)
                channels = 4 * inner
    arrays |= dense("embedding", patch, patch, channels, width, inputs=3)
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

    if "conv_root/kernel" in weights:
        images = resnet_map(weights, images)
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


def resnet_map(weights: dict[str, Array], x: Array) -> Array:
    """What a hybrid cuts into patches: (N, H, W, 3) to (N, H / stride, W / stride, channels)."""

    def windows(x: Array, size: int, stride: int, value: float) -> Array:
        """(N, H, W, C) to (N, H / stride, W / stride, C, size, size)."""
        pads = []
        for length in x.shape[1:3]:
            total = max((-(-length // stride) - 1) * stride + size - length, 0)
            pads.append((total // 2, total - total // 2))
        padded = np.pad(x, [(0, 0), *pads, (0, 0)], constant_values=value)
        seen = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))
        return seen[:, ::stride, ::stride]

    def layer(x: Array, base: str, suffix: str, stride: int = 1) -> Array:
        """Convolution and GroupNorm."""
        kernel = weights[f"{base}conv{suffix}/kernel"]
        axes = (0, 1, 2)
        kernel = (kernel - kernel.mean(axes)) / (kernel.std(axes) + 1e-5)
        x = np.einsum("nyxcab,abcd->nyxd", windows(x, len(kernel), stride, 0.0), kernel)
        grouped = x.reshape(*x.shape[:3], 32, -1)
        mean, variance = (f(grouped, axis=(1, 2, 4), keepdims=True) for f in (np.mean, np.var))
        normed = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
        return normed * weights[f"{base}gn{suffix}/scale"].ravel() + weights[f"{base}gn{suffix}/bias"].ravel()

    def relu(x: Array) -> Array:
        return np.maximum(x, 0)

    x = windows(relu(layer(x, "", "_root", 2)), 3, 2, -np.inf).max((-1, -2))
    stage = 1
    while f"block{stage}/unit1/conv1/kernel" in weights:
        unit = 1
        while (base := f"block{stage}/unit{unit}/") + "conv1/kernel" in weights:
            stride = 2 if stage > 1 and unit == 1 else 1
            residual = layer(x, base, "_proj", stride) if unit == 1 else x
            y = relu(layer(relu(layer(x, base, "1")), base, "2", stride))
            x = relu(residual + layer(y, base, "3"))
            unit += 1
        stage += 1
    return x


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
