"""What the grid of patches settles for one of Qwen's towers: orders, windows, rotations, positions.

All tables are float64 and are computed anew where they are needed; deployed models hold them as constants.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitdeploy.config import QwenVisionConfig


def patch_order(config: QwenVisionConfig) -> Tensor:
    """The numbers, row by row of the image, of the patches in the order of the processor, (T) int64."""
    (rows, columns), merge = config.grid, config.merge
    numbers = torch.arange(rows * columns).reshape(rows // merge, merge, columns // merge, merge)
    return numbers.transpose(1, 2).flatten()


def places(config: QwenVisionConfig) -> Tensor:
    """Row and column of every patch, in the order of the processor, (T, 2) int64."""
    order, columns = patch_order(config), config.grid[1]
    return torch.stack([order // columns, order % columns], dim=1)


def windows(config: QwenVisionConfig) -> Tensor:
    """The number of the window that every patch lies in, (T) int64; windows are numbered row by row."""
    side = config.window_blocks * config.merge
    row, column = (places(config) // side).unbind(1)
    return row * -(-config.grid[1] // side) + column


def rotation(config: QwenVisionConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines for every patch and column of a head, (T, d) float64 each.

    Of the pairs of columns, the first half turns by the row, the second by the column, as
    :func:`vitdeploy.model.positions.rotate` pairs them. Frequencies are float32, as the original keeps them.
    """
    half = config.head_width // 2
    frequencies = 1.0 / config.rotary_base ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
    angles = (places(config)[:, :, None].double() * frequencies.double()).flatten(1)  # (T, d / 2)
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos(), angles.sin()


def interpolated(table: Tensor, config: QwenVisionConfig) -> Tensor:
    """The learned positions of every patch: (side side, D) to (T, D), bilinear, corners on corners."""
    side = config.positions
    grid = table.reshape(side, side, -1)
    for count in config.grid:
        place = torch.arange(count, dtype=torch.float64, device=table.device) * (side - 1) / max(count - 1, 1)
        below = place.long()
        share = (place - below).to(table.dtype)[:, None, None]
        above = (below + 1).clamp(max=side - 1)
        # One axis goes to the other's place each time, so that both have had their turn in the end.
        grid = (grid[below] * (1 - share) + grid[above] * share).transpose(0, 1)
    return grid.flatten(0, 1)[patch_order(config).to(table.device)]


# --- windows as groups -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Groups:
    """An order of the blocks of patches in which each window's lie together, and equal windows one after
    another."""

    blocks: Tensor
    """Numbers of the blocks in the processor's order, (T / merged) int64."""
    sizes: tuple[tuple[int, int], ...]
    """How many windows there are of each number of patches, in that order: (count, patches)."""

    @property
    def back(self) -> Tensor:
        """The order that undoes this one."""
        return self.blocks.argsort()

    def patches(self, merged: int) -> Tensor:
        """The same order for patches, (T) int64."""
        return (self.blocks[:, None] * merged + torch.arange(merged)).flatten()


def grouped(config: QwenVisionConfig) -> Groups | None:
    """Windows as groups of equal size; None where one window would be the whole image, or there is none.

    A grid that windows do not divide has up to three sizes more, at its right, its lower edge and its corner.
    """
    if not any(config.windowed(block) for block in range(config.depth)):
        return None
    numbers = windows(config)[:: config.merged]
    counts = numbers.bincount()
    if (counts > 0).sum() == 1:
        return None
    order = sorted(range(len(counts)), key=lambda window: (-int(counts[window]), window))
    blocks = torch.cat([(numbers == window).nonzero().flatten() for window in order])
    sizes = [int(counts[window]) * config.merged for window in order]
    return Groups(blocks, tuple((sizes.count(size), size) for size in dict.fromkeys(sizes)))
