"""Fit a learned position table to another resolution, by the rule of the family it comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vitdeploy.config import ModelConfig, Size, ViTConfig


@dataclass(frozen=True)
class PositionRule:
    """How a family interpolates its position table."""

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

    def fit(self, state: Mapping[str, Tensor], config: ModelConfig, size: Size) -> dict[str, Tensor]:
        """What of ``state``, which is for ``config.image_size``, is another tensor for images of ``size``."""
        table = state.get("pos_embed")
        if table is None or not isinstance(config, ViTConfig):
            return {}
        fitted = fit_positions(table, config, size, self)
        return {} if fitted is table else {"pos_embed": fitted}


def fit_positions(table: Tensor, config: ViTConfig, size: Size, rule: PositionRule) -> Tensor:
    """Return ``table`` (prefix + patches, D) for images of ``size``; unchanged where nothing changes.

    Args:
        table: in the checkpoint's dtype, for ``config.image_size``; the first ``config.position_prefix`` rows
            are kept.
        size: height and width in pixels, divisible by the patch.

    Returns:
        ``table`` itself, or a table in ``rule.dtype``.
    """
    if size == config.image_size and not rule.even_at_own_size:
        return table
    source = config.grid
    side = math.isqrt(config.patches)
    if rule.square_source and side * side == config.patches:
        source = side, side
    target = size[0] // config.patch_size, size[1] // config.patch_size
    if source == target or (rule.by_count and math.prod(target) == config.patches):
        return table
    prefix, patches = table[: config.position_prefix], table[config.position_prefix :]
    # No copy between reshape and permute: torch's kernels round differently for other memory layouts.
    grid = patches.to(rule.dtype).reshape(1, *source, -1).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    grid = F.interpolate(
        grid, size=target, mode=rule.mode, align_corners=rule.align_corners, antialias=rule.antialias
    )
    return torch.cat([prefix.to(rule.dtype), grid.permute(0, 2, 3, 1).flatten(0, 2)])  # (prefix + patches, D)
