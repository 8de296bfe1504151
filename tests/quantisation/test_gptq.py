"""GPTQ against what it minimises, and against the algorithm as its paper writes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from vitdeploy.bundle.dtypes import Quantised
from vitdeploy.quantisation.gptq import DAMPING, Grid, Hessian, rounded_weight

GRIDS = [Grid("int8", 7), Grid("int8", 8), Grid("fp8"), Grid("int8", 7, "fp16"), Grid("fp8", rest="fp16")]


def drawn(rows: int, width: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated inputs (rows, width), and a weight (width, columns)."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, width // 2, generator=generator) @ torch.randn(
        width // 2, width, generator=generator
    )
    inputs = inputs + 0.1 * torch.randn(rows, width, generator=generator)
    return inputs, torch.randn(width, columns, generator=generator)


def error(inputs: Tensor, weight: Tensor, numbers: Tensor, scale: Tensor) -> float:
    expected = inputs.double() @ weight.double()
    return float((inputs.double() @ (numbers.double() * scale.double()) - expected).norm() / expected.norm())


def nearest(weight: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    return grid.numbers(grid.nearest(weight / scale))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_output_is_nearer_than_with_the_nearest_numbers(grid: Grid) -> None:
    inputs, weight = drawn(400, 96, 40)
    scale = grid.weight_scale(weight)
    found = rounded_weight(weight, scale, grid, Hessian.of(inputs))
    assert found.dtype == (torch.int8 if grid.kind == "int8" else torch.float8_e4m3fn)
    assert found.shape == weight.shape
    assert error(inputs, weight, found, scale) < 0.8 * error(
        inputs, weight, nearest(weight, scale, grid), scale
    )


def test_it_is_the_algorithm_row_by_row() -> None:
    """numpy, one row after the other, the inverse Hessian of the rows that remain inverted anew each time."""
    grid = Grid("int8", 8)
    inputs, weight = drawn(200, 40, 6, seed=3)
    scale = grid.weight_scale(weight)
    found = rounded_weight(weight, scale, grid, Hessian.of(inputs)).numpy()

    x, left, steps = inputs.double().numpy(), weight.double().numpy().copy(), scale.double().numpy()
    hessian = x.T @ x / len(x)
    remaining = [int(i) for i in torch.from_numpy(np.diag(hessian).copy()).argsort(descending=True)]
    hessian += np.eye(len(hessian)) * DAMPING * np.diag(hessian).mean()
    expected = np.zeros_like(found)
    while remaining:
        row, others = remaining[0], remaining[1:]
        inverse = np.linalg.inv(hessian[np.ix_(remaining, remaining)])
        expected[row] = np.clip(np.round(left[row] / steps), -127, 127)
        lost = (left[row] - expected[row] * steps) / inverse[0, 0]
        left[others] -= inverse[1:, :1] * lost
        remaining = others
    assert (found != expected).mean() < 0.01, "apart from ties of rounding"


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    inputs, weight = drawn(100, 24, 8)
    inputs[:, :5] = 0
    for rows in (inputs, torch.zeros_like(inputs)):
        grid = Grid("int8", 7)
        found = rounded_weight(weight, grid.weight_scale(weight), grid, Hessian.of(rows))
        assert found.abs().max() <= 63


@pytest.mark.parametrize("bits, largest", [(7, 63), (8, 127)])
def test_weights_use_the_whole_grid_and_no_more(bits: int, largest: int) -> None:
    inputs, weight = drawn(100, 24, 8)
    grid = Grid("int8", bits)
    found = rounded_weight(weight, grid.weight_scale(weight), grid, Hessian.of(inputs))
    assert found.abs().max() == largest == grid.bound


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_scales_of_an_fp16_rest_are_numbers_of_fp16(kind: Quantised) -> None:
    grid, exact = Grid(kind, rest="fp16"), Grid(kind)
    weight = torch.tensor([[1.2345, 1e-7], [-0.5, 3e-8]])
    for scale in (
        grid.weight_scale(weight),
        torch.tensor(grid.input_scale(3.21)),
        torch.tensor(grid.input_scale(0)),
    ):
        assert torch.equal(scale.half().float(), scale)
        assert scale.min() >= 2.0**-14
    assert exact.input_scale(3.21) != grid.input_scale(3.21)
    assert exact.input_scale(0) > 0
    assert (exact.weight_scale(weight) > 0).all()
