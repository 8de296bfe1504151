"""Tensors for tests of kernels: surrounded by NaN, so that whatever is read or written outside shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitdeploy_kernels import reference

MARGIN = 512
"""Elements before and after; a multiple of what keeps a tensor aligned to 16 bytes."""

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Worst relative error of a row against float64 on the same inputs: twice what the rounding of an output, or
of an operand, can make of it."""


class Guarded:
    """A tensor in the middle of a larger storage that is filled with a canary."""

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, shift: int = 0
    ) -> None:
        size = torch.Size(shape).numel()
        canary = float("nan") if dtype.is_floating_point else 113
        self.storage = torch.full((size + 2 * MARGIN + shift,), canary, dtype=dtype, device=device)
        self.tensor = self.storage[MARGIN + shift : MARGIN + shift + size].view(*shape)
        self.shift = shift

    def intact(self) -> bool:
        """Whether everything around the tensor still is what it was."""
        before, after = self.storage[: MARGIN + self.shift], self.storage[-MARGIN:]
        if self.storage.dtype.is_floating_point:
            return bool(before.isnan().all() and after.isnan().all())
        return bool((before == 113).all() and (after == 113).all())


def guard(tensor: Tensor, device: torch.device, shift: int = 0) -> Tensor:
    """A copy of a tensor with NaN around it; ``shift`` elements off its alignment."""
    guarded = Guarded(tensor.shape, tensor.dtype, device, shift).tensor
    guarded.copy_(tensor)
    return guarded


def guard_rows(tensor: Tensor, device: torch.device, gap: int = 16) -> Tensor:
    """A copy of (rows, columns) whose rows are ``gap`` elements apart, NaN between them."""
    rows, columns = tensor.shape
    wide = Guarded((rows, columns + gap), tensor.dtype, device).tensor
    view = wide[:, :columns]
    view.copy_(tensor)
    return view


def relative(actual: Tensor, expected: Tensor) -> float:
    """The worst row's ||actual - expected|| / ||expected||; infinite where a NaN is."""
    a, e = (t.detach().cpu().double().reshape(-1, t.shape[-1]) for t in (actual, expected))
    assert a.shape == e.shape
    error = (a - e).norm(dim=1) / e.norm(dim=1).clamp(min=1e-30)
    return float(torch.where(error.isnan(), torch.inf, error).max())


def statistics_error(stats: Tensor, written: Tensor, tile: int, one_pass: bool = False) -> float:
    """The worst error of row statistics of (rows, columns) values as they were written.

    Means against the row's largest value; squares against themselves, or where they are next to nothing,
    against what float32 can tell apart in such a row: in one pass, that is the sum of the values' squares.
    Infinite where a NaN is.
    """
    a, e = stats.cpu().double(), reference.statistics(written.cpu(), tile)
    assert a.shape == e.shape
    values = written.cpu().double()
    largest = values.abs().amax(dim=1).clamp(min=1e-30)[:, None]
    means = (a[..., 0] - e[..., 0]).abs() / largest
    size = e[..., 1] + tile * (1e-4 * largest) ** 2
    if one_pass:
        sums = [(part**2).sum(dim=1) for part in values.split(tile, dim=1)]
        size = torch.stack(sums, dim=1).clamp(min=1e-30)
    squares = (a[..., 1] - e[..., 1]).abs() / size
    worst = torch.maximum(means, squares)
    return float(torch.where(worst.isnan(), torch.inf, worst).max()) if worst.numel() else 0.0
