"""Weights on a grid of 8 bits, each row's error spread over the rows that are not rounded yet.

GPTQ (Frantar et al. 2023, https://arxiv.org/abs/2210.17323): with the Hessian H = X' X of the layer's
rounded inputs and the Cholesky factor of its inverse, what a row loses is made up for by the rows behind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitdeploy.bundle.dtypes import Quantised
from vitdeploy.config import Precision
from vitdeploy.quantisation.sites import FP8_LARGEST, INT8_LARGEST

DAMPING = 0.01
"""Of the Hessian's mean diagonal."""
ROWS = 4096
"""Inputs that a Hessian is made of, at most."""
_BLOCK = 16
"""Rows that pass their errors on one by one; beyond, those of many rows are passed on by one product."""
_SMALLEST_FP16 = 2.0**-14
"""The least normal number."""
_SMALLEST = 1e-12


@dataclass(frozen=True)
class Grid:
    """The numbers a GEMM of 8 bits computes with.

    Attributes:
        weight_bits: of int8: 7 bits keep processors without VNNI from saturating.
        rest: whose precision scales are stored in.
    """

    kind: Quantised
    weight_bits: int = 7
    rest: Precision = "fp32"

    def stored(self, scale: Tensor) -> Tensor:
        """A scale as the rest stores it, float32."""
        scale = scale.float()
        if self.rest == "fp16":
            return scale.clamp_min(_SMALLEST_FP16).half().float()
        return scale.clamp_min(_SMALLEST)

    def input_scale(self, largest: float) -> float:
        """Of inputs whose largest magnitude this is."""
        largest /= INT8_LARGEST if self.kind == "int8" else FP8_LARGEST
        return self.stored(torch.tensor(largest)).item()

    def weight_scale(self, weight: Tensor) -> Tensor:
        """(out) of int8, () of fp8."""
        if self.kind == "fp8":
            return self.stored(weight.abs().amax() / FP8_LARGEST)
        return self.stored(weight.abs().amax(0) / self.bound)

    @property
    def bound(self) -> int:
        """The largest integer of a weight."""
        return int(2 ** (self.weight_bits - 1)) - 1

    def nearest(self, scaled: Tensor) -> Tensor:
        """Weights divided by their scale, on the grid, in their own dtype."""
        if self.kind == "int8":
            return scaled.round().clamp(-self.bound, self.bound)
        return scaled.clamp(-FP8_LARGEST, FP8_LARGEST).float().to(torch.float8_e4m3fn).to(scaled.dtype)

    def numbers(self, nearest: Tensor) -> Tensor:
        """As they are stored."""
        return nearest.to(torch.int8) if self.kind == "int8" else nearest.float().to(torch.float8_e4m3fn)


@dataclass(frozen=True)
class Hessian:
    """Of the inputs of a layer, or of several that read the same.

    Attributes:
        order: of rows, those that are read with the most energy first.
        factor: upper Cholesky factor of the inverse of the damped Hessian in this order, (in, in) float64.
    """

    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, inputs: Tensor) -> Hessian:
        """Of rounded inputs (rows, in)."""
        x = inputs.double()
        hessian = x.t() @ x / len(x)
        diagonal = hessian.diagonal()
        order = diagonal.argsort(descending=True)
        diagonal += DAMPING * diagonal.mean().clamp_min(_SMALLEST)
        # From the last row on, H = R R' with R upper, so that the inverse is U' U with U = R^-1.
        lower = torch.linalg.cholesky(hessian[order][:, order].flip(0, 1))
        upper, ones = lower.flip(0, 1), torch.eye(len(lower), dtype=lower.dtype)
        return cls(order, torch.linalg.solve_triangular(upper, ones, upper=True))


def rounded_weight(weight: Tensor, scale: Tensor, grid: Grid, hessian: Hessian) -> Tensor:
    """The weight (in, out) on the grid, as :meth:`Grid.numbers` stores it.

    Args:
        scale: :meth:`Grid.weight_scale`.
    """
    steps, factor = scale.double(), hessian.factor
    left = weight.double()[hessian.order]
    found, errors = torch.empty_like(left), torch.empty_like(left)

    def settle(start: int, stop: int) -> None:
        if stop - start > _BLOCK:
            middle = (start + stop) // 2
            settle(start, middle)
            left[middle:stop].addmm_(factor[start:middle, middle:stop].t(), errors[start:middle], alpha=-1)
            settle(middle, stop)
            return
        for row in range(start, stop):
            found[row] = grid.nearest(left[row] / steps)
            errors[row] = (left[row] - found[row] * steps) / factor[row, row]
            left[row + 1 : stop].addr_(factor[row, row + 1 : stop], errors[row], alpha=-1)

    settle(0, len(left))
    return grid.numbers(found[hessian.order.argsort()])
