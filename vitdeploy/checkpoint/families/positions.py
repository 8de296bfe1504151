"""Fit learned tables of positions to another resolution, by the rule of the family they come from."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vitdeploy.config import ModelConfig, Size, SwinConfig, ViTConfig


def bilinear_offsets(offsets: Tensor, source: Size, target: Size) -> Tensor:
    """Return a table of relative positions for the patches of another grid, in float64.

    Args:
        offsets: (2 H - 1) (2 W - 1) rows for the rows and columns of ``source``, a column for each head.

    Returns:
        ``offsets`` itself where the grids are the same.
    """
    if source == target:
        return offsets
    (rows, columns), size = ([2 * count - 1 for count in grid] for grid in (source, target))
    grid = offsets.double().reshape(1, rows, columns, -1).permute(0, 3, 1, 2)  # (1, h, rows, columns)
    grid = F.interpolate(grid, size=size, mode="bilinear")
    return grid.permute(0, 2, 3, 1).flatten(0, 2)


_OF_STAGE = re.compile(r"layers\.(\d+)\..*\.score_bias\.table")
"""The tables of relative positions in a Swin's windows, and their stage."""


@dataclass(frozen=True)
class PositionRule:
    """How a family interpolates its tables of positions."""

    mode: Literal["bicubic", "bilinear"] = "bicubic"
    align_corners: bool = False
    antialias: bool = False
    dtype: torch.dtype = torch.float64
    """What the family computes in; float64 where it uses the model's own dtype, as the reference does."""
    square_source: bool = False
    """The table is taken for a square grid whatever the configured image size, as transformers does."""
    even_at_own_size: bool = False
    """The square assumption holds at the configured, not square, image size too."""
    by_count: bool = False
    """A table of as many rows as are needed stays as it is, whatever its grid, as open_clip does."""
    offsets: Callable[[Tensor, Size, Size], Tensor] = bilinear_offsets
    """For tables of relative positions; called at the configured image size too."""

    def fit(self, state: Mapping[str, Tensor], config: ModelConfig, size: Size) -> dict[str, Tensor]:
        """What of ``state``, which is for ``config.image_size``, is another tensor for images of ``size``."""
        if not isinstance(config, (ViTConfig, SwinConfig)):
            return {}
        if isinstance(config, ViTConfig):
            tables = {name: table for name, table in state.items() if name.endswith(".score_bias")}
            fitted = {name: fit_scores(table, config, size, self) for name, table in tables.items()}
        else:
            of_stages = {name: int(match[1]) for name in state if (match := _OF_STAGE.fullmatch(name))}
            sized = config.at_size(size)
            fitted = {
                name: self.offsets(state[name], config.window(stage), sized.window(stage))
                for name, stage in of_stages.items()
            }
        if (table := state.get("pos_embed")) is not None:
            fitted["pos_embed"] = fit_positions(table, config, size, self)
        return {name: table for name, table in fitted.items() if table is not state[name]}


def fit_scores(table: Tensor, config: ViTConfig, size: Size, rule: PositionRule) -> Tensor:
    """Return a table of relative positions, (rows, h), for images of ``size``; the rows of CLS are kept."""
    extra = 3 if config.prefix_tokens else 0
    offsets = table[: len(table) - extra]
    fitted = rule.offsets(offsets, config.grid, config.at_size(size).grid)
    return table if fitted is offsets else torch.cat([fitted, table[len(table) - extra :].to(fitted)])


def fit_positions(table: Tensor, config: ViTConfig | SwinConfig, size: Size, rule: PositionRule) -> Tensor:
    """Return ``table`` (prefix + patches, D) for images of ``size``; unchanged where nothing changes.

    Args:
        table: in the checkpoint's dtype, for ``config.image_size``; rows of prefix tokens are kept.
        size: height and width in pixels that the model can be built for.

    Returns:
        ``table`` itself, or a table in ``rule.dtype``.
    """
    if size == config.image_size and not rule.even_at_own_size:
        return table
    source = config.grid
    side = math.isqrt(config.patches)
    if rule.square_source and side * side == config.patches:
        source = side, side
    target = config.at_size(size).grid
    if source == target or (rule.by_count and math.prod(target) == config.patches):
        return table
    first = config.position_prefix if isinstance(config, ViTConfig) else 0
    prefix, patches = table[:first], table[first:]
    # No copy between reshape and permute: torch's kernels round differently for other memory layouts.
    grid = patches.to(rule.dtype).reshape(1, *source, -1).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    grid = F.interpolate(
        grid, size=target, mode=rule.mode, align_corners=rule.align_corners, antialias=rule.antialias
    )
    return torch.cat([prefix.to(rule.dtype), grid.permute(0, 2, 3, 1).flatten(0, 2)])  # (prefix + patches, D)
