"""layernorm_linear against float64."""

from __future__ import annotations

import pytest
import torch
from kernel_tensors import TOLERANCE, guard, relative
from torch import Tensor

from vitdeploy_kernels import reference
from vitdeploy_kernels.config import Config
from vitdeploy_kernels.layernorm_linear import Folded, fold_layernorm, layernorm_linear

SMALL = Config(block_m=32, block_n=64, block_k=32, group=2, warps=4, stages=2)
EPS = 1e-6


def folded(width: int, columns: int, dtype: torch.dtype, device: torch.device) -> Folded:
    weight = torch.randn(width, columns) / width**0.5
    f = fold_layernorm(torch.randn(width), torch.randn(width), weight, torch.randn(columns), dtype)
    return Folded(*(guard(t, device) for t in f))


def error(x: Tensor, f: Folded, out: Tensor, activation: str = "none") -> float:
    expected = reference.layernorm_linear(x.cpu(), f.weight.cpu(), f.bias.cpu(), EPS, activation)
    return relative(out, expected)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "quick_gelu", "relu", "silu"])
def test_is_layernorm_linear_activation(dtype: torch.dtype, activation: str, device: torch.device) -> None:
    torch.manual_seed(0)
    x = guard(torch.randn(70, 96).to(dtype), device)
    stats = guard(reference.statistics(x.cpu(), 32).float(), device)
    f = folded(96, 136, dtype, device)
    out = layernorm_linear(x, stats, *f, eps=EPS, activation=activation, config=SMALL)
    assert out.dtype == dtype
    assert error(x, f, out, activation) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "name, values",
    [
        ("mean 1000, deviation 1", lambda: torch.randn(40, 96) + 1000),
        ("all equal", lambda: torch.full((40, 96), 3.0)),
        ("all equal and large", lambda: torch.full((40, 96), 6e4)),
        ("+-6e4", lambda: torch.randn(40, 96).sign() * 6e4),
        ("one massive channel", lambda: torch.cat([torch.full((40, 1), 3e4), torch.randn(40, 95)], dim=1)),
        ("subnormal", lambda: torch.randn(40, 96) * 1e-6),
    ],
)
def test_extreme_rows(name: str, values: object, device: torch.device) -> None:
    torch.manual_seed(1)
    x = guard(values().half(), device)  # type: ignore[operator]
    stats = guard(reference.statistics(x.cpu(), 32).float(), device)
    f = folded(96, 64, torch.float16, device)
    out = layernorm_linear(x, stats, *f, eps=EPS, config=SMALL)
    assert error(x, f, out) < TOLERANCE[torch.float16], name
