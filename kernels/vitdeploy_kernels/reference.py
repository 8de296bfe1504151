"""What each kernel computes, in float64 and as plainly as it can be said. Tests compare with these.

Inputs may have any floating dtype and are used as they are; nothing is rounded on the way.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def statistics(x: Tensor, tile: int) -> Tensor:
    """Row statistics (rows, tiles, 2) of x (rows, width): mean and squared distances, per tile of columns."""
    parts = x.double().split(tile, dim=1)
    means = [part.mean(dim=1) for part in parts]
    squares = [((part - mean[:, None]) ** 2).sum(dim=1) for part, mean in zip(parts, means, strict=True)]
    return torch.stack([torch.stack(means, dim=1), torch.stack(squares, dim=1)], dim=2)


def normalise(x: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis without gain and shift."""
    x = x.double()
    away = x - x.mean(dim=-1, keepdim=True)
    return away / torch.sqrt((away**2).mean(dim=-1, keepdim=True) + eps)


def activate(x: Tensor, activation: str) -> Tensor:
    """The activations by their definitions."""
    if activation == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    if activation == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if activation == "quick_gelu":
        return x / (1 + torch.exp(-1.702 * x))
    if activation == "relu":
        return x.clamp(min=0)
    if activation == "silu":
        return x / (1 + torch.exp(-x))
    return x


def patch_embed(
    image: Tensor,
    weight: Tensor,
    tokens: Tensor,
    patch: int,
    prefix: int,
    scale: float = 1.0,
    shift: float = 0.0,
) -> Tensor:
    """(N, T, D): tokens (T, D) + ``scale * (patches - shift) @ weight`` in the rows behind the prefix.

    image is (N, C, H, W) floating with weight rows in the order (C, P, P), or (N, H, W, C) uint8 with weight
    rows in the order (P, P, C).
    """
    count = image.shape[0]
    if image.dtype == torch.uint8:
        rows, columns, channels = image.shape[1] // patch, image.shape[2] // patch, image.shape[3]
        x = image.double().reshape(count, rows, patch, columns, patch, channels).transpose(2, 3)
    else:
        channels, rows, columns = image.shape[1], image.shape[2] // patch, image.shape[3] // patch
        x = image.double().reshape(count, channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
    x = (x.reshape(count, rows * columns, -1) - shift) * scale @ weight.double()
    empty = x.new_zeros(count, prefix, x.shape[2])
    return torch.cat([empty, x], dim=1) + tokens.double()


def layernorm_linear(x: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str = "none") -> Tensor:
    """``activation(normalise(x) @ weight + bias)``; gain and shift are already in weight and bias."""
    return activate(normalise(x, eps) @ weight.double() + bias.double(), activation)


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """``residual + x @ weight + bias``."""
    y = x.double() @ weight.double()
    if bias is not None:
        y = y + bias.double()
    return residual.double() + y


def add_layernorm(x: Tensor, branch: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """``y = x + branch + bias`` and its LayerNorm; the second is of the exact y."""
    y = x.double()
    if branch is not None:
        y = y + branch.double()
    if bias is not None:
        y = y + bias.double()
    return y, normalise(y, eps)


def attention(qkv: Tensor, heads: int, scale: float, bias: Tensor | None = None) -> Tensor:
    """(N, T, 3 h d), columns (3, h, d), to (N, T, h d); image i has the bias i % W of (W, h, T, T)."""
    count, length, columns = qkv.shape
    q, k, v = qkv.double().reshape(count, length, 3, heads, columns // (3 * heads)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(2, 3) * scale
    if bias is not None:
        scores = scores + bias.double()[torch.arange(count) % len(bias)]
    pooled: Tensor = scores.softmax(dim=-1) @ v
    return pooled.transpose(1, 2).reshape(count, length, -1)


def layernorm_attention(
    x: Tensor, weight: Tensor, bias: Tensor, heads: int, scale: float, eps: float, mask: Tensor | None = None
) -> Tensor:
    """Attention of ``normalise(x) @ weight + bias``: x (N, T, D), weight (D, 3 h d), mask (W, h, T, T)."""
    return attention(normalise(x, eps) @ weight.double() + bias.double(), heads, scale, mask)


def head_linear(x: Tensor, weight: Tensor) -> Tensor:
    """One product per head: x (rows, h, in) and weight (h, in, out) to (rows, h, out)."""
    return torch.einsum("rhi,hio->rho", x.double(), weight.double())


def absorbed_attention(queries: Tensor, x: Tensor, scale: float, eps: float) -> Tensor:
    """queries (N, R, D) attend to ``normalise(x)``, x (N, T, D), keys and values in one: (N, R, D)."""
    tokens = normalise(x, eps)
    scores = queries.double() @ tokens.transpose(1, 2) * scale
    return scores.softmax(dim=-1) @ tokens
