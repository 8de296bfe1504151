"""Tables of positions that a configuration settles: sinusoids, rotations, relative positions.

All are float64 and are computed anew where they are needed; deployed models hold them as constants.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitdeploy.config import Rotary, ViTConfig


def sincos2d(config: ViTConfig) -> Tensor:
    """Return the fixed 2D sinusoidal position table, (patches, width), float64.

    Beyer et al. 2022, "Better plain ViT baselines for ImageNet-1k" (https://arxiv.org/abs/2205.01580).
    """
    rows, columns = config.grid
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    omega = _omega(config.width // 4)  # (D/4)
    y, x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega  # (patches, D/4) each
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)  # (patches, D)


def sincos1d(config: ViTConfig) -> Tensor:
    """Return the fixed 1D sinusoidal position table, (patches, width), float64: patches in row-major order.

    Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762), sines before cosines as in :func:`sincos2d`.
    """
    place = torch.arange(config.patches, dtype=torch.float64).reshape(-1, 1) * _omega(config.width // 2)
    return torch.cat([place.sin(), place.cos()], dim=1)


def _omega(count: int) -> Tensor:
    return 10_000.0 ** -(torch.arange(count, dtype=torch.float64) / max(count - 1, 1))


# --- rotary positions ------------------------------------------------------------------------------------


def rotation(config: ViTConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines for every token and column of a head, (T, d) float64 each; prefix tokens stand still.

    Raises:
        ValueError: the model has no rotary positions.
    """
    if config.rotary is None:
        raise ValueError("no rotary positions")
    turns = _angles(config.rotary, config)  # (patches, d / 2)
    angles = torch.cat([turns.new_zeros(config.prefix_tokens, turns.shape[1]), turns])
    angles = torch.cat([angles, angles], dim=1)  # (T, d)
    return angles.cos().double(), angles.sin().double()


def _angles(rotary: Rotary, config: ViTConfig) -> Tensor:
    """By how much each pair of columns turns, (patches, d / 2): rows first, then columns.

    In the dtype in which the model's own code takes sines and cosines: float32 where it keeps their table in
    float32 (EVA02), else float64. What is float32 on the way is so there, too, when the model is float64.
    """
    count = config.head_width // 4
    periods = rotary.base ** (torch.arange(count, dtype=torch.float32) / count)
    sides = [torch.arange(n, dtype=torch.float32) for n in config.grid]
    if rotary.coordinates == "indexed":
        if rotary.grid is not None:
            sides = [side / len(side) * n for side, n in zip(sides, rotary.grid, strict=True)]
        places = _places(*sides)
        return (places * (1 / periods)).flatten(1)
    places = _places(*(2 * ((side + 0.5) / len(side)) - 1 for side in sides))
    if rotary.coordinates == "centred_timm":
        return (2 * math.pi * places.double() / periods.double()).flatten(1)
    frequencies = 1 / rotary.base ** torch.arange(0, 1, 1 / count, dtype=torch.float32)[:count]
    return ((2 * math.pi * places).double() * frequencies.double()).flatten(1)


def _places(rows: Tensor, columns: Tensor) -> Tensor:
    """Row and column of every patch, (patches, 2, 1), from those of each row and of each column."""
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).reshape(-1, 2, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of columns of ``x`` (..., T, d) by the angles of (T, d)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


# --- relative positions ----------------------------------------------------------------------------------


def score_bias_rows(config: ViTConfig) -> int:
    """Rows of a table of relative positions: every offset, then CLS to patch, patch to CLS, CLS to itself."""
    rows, columns = config.grid
    return (2 * rows - 1) * (2 * columns - 1) + (3 if config.prefix_tokens else 0)


def relative_positions(table: Tensor, config: ViTConfig) -> Tensor:
    """Read the table (rows, h) out for every pair of tokens: (h, T, T), query by key.

    Row ``(y + H - 1) * (2 W - 1) + x + W - 1`` is for a query that lies ``y`` rows below and ``x`` columns to
    the right of its key (Bao et al. 2021, https://arxiv.org/abs/2106.08254).
    """
    height, width = config.grid
    y = torch.arange(height).repeat_interleave(width)
    x = torch.arange(width).repeat(height)
    down, right = y[:, None] - y[None, :], x[:, None] - x[None, :]
    index = (down + height - 1) * (2 * width - 1) + right + width - 1  # (patches, patches)
    if config.prefix_tokens:
        offsets = score_bias_rows(config) - 3
        index = torch.nn.functional.pad(index, (1, 0, 1, 0))
        index[0, :], index[:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
    return table[index.to(table.device)].permute(2, 0, 1)
