"""linear_residual against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.interpreter import run_inside
from tests.helpers.kernel_tensors import TOLERANCE, Guarded, guard, guard_rows, relative, statistics_error
from vitdeploy_kernels import reference
from vitdeploy_kernels.config import Config
from vitdeploy_kernels.launch import tiles
from vitdeploy_kernels.layernorm_linear import fold_layernorm, layernorm_linear
from vitdeploy_kernels.linear_residual import _operator, launch, linear_residual
from vitdeploy_kernels.support import UnsupportedError

SMALL = Config(block_m=32, block_n=64, block_k=32, group=2, warps=4, stages=2)
HALF = torch.float16
EXACT = 2e-6
"""Worst error of statistics: a few roundings of float32."""


class Case:
    """Inputs of one call, with NaN around each and between the rows of those that may have gaps."""

    def __init__(
        self,
        rows: int,
        depth: int,
        columns: int,
        device: torch.device,
        dtype: torch.dtype = HALF,
        bias: bool = True,
    ) -> None:
        vector = torch.randn(columns)
        self.x = guard_rows(torch.randn(rows, depth).to(dtype), device, gap=3)
        self.weight = guard((torch.randn(depth, columns) / depth**0.5).to(dtype), device)
        self.bias = guard(vector, device) if bias else None
        # The columns' means differ, so that parts of a tile differ in more than noise.
        residual = torch.randn(rows, columns) + torch.arange(columns) / 16
        self.residual = guard_rows(residual.to(dtype), device)

    def expected(self) -> Tensor:
        given = (self.x, self.weight, self.bias, self.residual)
        return reference.linear_residual(*(None if t is None else t.cpu() for t in given))  # type: ignore[arg-type]

    def run(self, config: Config = SMALL) -> tuple[Tensor, Tensor]:
        return linear_residual(self.x, self.weight, self.bias, self.residual, config=config)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [True, False])
def test_is_residual_plus_linear(dtype: torch.dtype, bias: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    case = Case(70, 100, 136, device, dtype, bias)
    out, stats = case.run()
    assert out.dtype == dtype
    assert stats.shape == (70, 3, 2)
    assert stats.dtype == torch.float32
    assert relative(out, case.expected()) < TOLERANCE[dtype]
    assert statistics_error(stats, out, 64, one_pass=True) < EXACT


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 50),
    depth=st.integers(1, 90),
    columns=st.integers(2, 280),
    blocks=st.tuples(
        st.sampled_from([16, 32, 64]), st.sampled_from([16, 64, 128, 256]), st.sampled_from([16, 32, 64])
    ),
    group=st.integers(1, 3),
    dtype=st.sampled_from(sorted(TOLERANCE, key=str)),
    in_place=st.booleans(),
)
def test_any_shape_stays_inside(
    rows: int,
    depth: int,
    columns: int,
    blocks: tuple[int, int, int],
    group: int,
    dtype: torch.dtype,
    in_place: bool,
    device: torch.device,
) -> None:
    torch.manual_seed(rows)
    case = Case(rows, depth, columns, device, dtype)
    expected = case.expected()
    config = Config(*blocks, group=group, warps=4, stages=2)
    out = Guarded((rows, columns), dtype, device)
    stats = Guarded((rows, tiles(columns, config.block_n), 2), torch.float32, device)
    if in_place:
        out.tensor.copy_(case.residual)
    run_inside(
        launch(
            case.x,
            case.weight,
            case.bias,
            out.tensor if in_place else case.residual,
            out.tensor,
            stats.tensor,
            config=config,
        )
    )
    assert relative(out.tensor, expected) < TOLERANCE[dtype]
    assert statistics_error(stats.tensor, out.tensor, config.block_n, one_pass=True) < EXACT
    assert out.intact()
    assert stats.intact()


@pytest.mark.parametrize("depth", [40, 64])
def test_ragged_tiles_stay_inside(depth: int, device: torch.device) -> None:
    torch.manual_seed(1)
    case = Case(20, depth, 70, device)
    inputs = case.x, case.weight, case.bias, case.residual
    out, stats = Guarded((20, 70), HALF, device), Guarded((20, 2, 2), torch.float32, device)
    run_inside(launch(*inputs, out.tensor, stats.tensor, config=SMALL))
    assert relative(out.tensor, case.expected()) < TOLERANCE[HALF]
    assert statistics_error(stats.tensor, out.tensor, 64, one_pass=True) < EXACT
    assert out.intact()
    assert stats.intact()
    again = torch.empty(20, 70, dtype=HALF, device=device)
    launch(*inputs, again, None, config=SMALL).run()
    assert torch.equal(again, out.tensor)


def test_one_column(device: torch.device) -> None:
    torch.manual_seed(8)
    case = Case(5, 1, 1, device)
    out, stats = case.run()
    assert relative(out, case.expected()) < TOLERANCE[HALF]
    assert statistics_error(stats, out, 64, one_pass=True) < EXACT


def test_misaligned_and_transposed_inputs(device: torch.device) -> None:
    torch.manual_seed(2)
    case = Case(40, 50, 70, device)
    expected = case.expected()
    case.x, case.residual = (guard(t, device, shift=1) for t in (case.x, case.residual))
    case.weight, case.bias = guard(case.weight, device, shift=3), guard(case.bias, device, shift=1)
    assert relative(case.run()[0], expected) < TOLERANCE[HALF]
    case.x, case.residual = (guard(t.mT, device).mT for t in (case.x, case.residual))
    case.weight = guard(case.weight.mT, device).mT
    case.bias = torch.stack([case.bias, case.bias], dim=1)[:, 0]
    assert relative(case.run()[0], expected) < TOLERANCE[HALF]


@pytest.mark.parametrize(
    "name, values",
    [
        ("mean 60, deviation 1", lambda: torch.randn(40, 200) + 60),
        ("rows of one value", lambda: torch.randn(40, 1).expand(40, 200)),
        ("all equal and large", lambda: torch.full((40, 200), 6e4)),
        ("+-6e4", lambda: torch.randn(40, 200).sign() * 6e4),
        ("one massive channel", lambda: torch.cat([torch.full((40, 1), 3e4), torch.randn(40, 199)], dim=1)),
        ("subnormal", lambda: torch.randn(40, 200) * 1e-6),
    ],
)
@pytest.mark.parametrize("block_n", [64, 256])
def test_statistics_of_extreme_rows(name: str, values: object, block_n: int, device: torch.device) -> None:
    torch.manual_seed(3)
    residual = guard(values().half(), device)  # type: ignore[operator]
    x, weight = (guard(torch.zeros(size, dtype=HALF), device) for size in ((40, 16), (16, 200)))
    out, stats = linear_residual(x, weight, None, residual, config=Config(32, block_n, 16))
    assert torch.equal(out, residual), name
    assert (stats[..., 1] >= 0).all(), name
    assert statistics_error(stats, out, block_n, one_pass=True) < EXACT, name


def test_statistics_are_of_rounded_values(device: torch.device) -> None:
    torch.manual_seed(4)
    x, weight = torch.ones(20, 16, dtype=HALF), torch.zeros(16, 64, dtype=HALF)
    residual, bias = torch.full((20, 64), 1000.0, dtype=HALF), torch.rand(64)
    out, stats = linear_residual(*(t.to(device) for t in (x, weight, bias, residual)), config=SMALL)
    assert statistics_error(stats, out, 64, one_pass=True) < EXACT


def centred(x: Tensor) -> Tensor:
    return x - x.mean(dim=1, keepdim=True)


@pytest.mark.parametrize(
    "name, values",
    [
        ("centred", lambda: centred(torch.randn(40, 200))),
        ("centred, massive channels", lambda: centred(torch.randn(40, 200) * torch.randn(200).exp() ** 2)),
        ("mean 60, deviation 1", lambda: torch.randn(40, 200) + 60),
    ],
)
def test_statistics_are_what_layernorm_needs(name: str, values: object, device: torch.device) -> None:
    torch.manual_seed(9)
    residual = guard(values().half(), device)  # type: ignore[operator]
    x, weight = (torch.zeros(size, dtype=HALF, device=device) for size in ((40, 16), (16, 200)))
    rows, stats = linear_residual(x, weight, None, residual, config=Config(32, 64, 16))
    exact = reference.statistics(rows.cpu(), 64).float().to(device)
    following = fold_layernorm(torch.ones(200), torch.zeros(200), torch.randn(200, 48), None)
    ours, theirs = (
        layernorm_linear(
            rows, each, *(t.to(device) for t in following), out_dtype=torch.float32, config=SMALL
        )
        for each in (stats, exact)
    )
    assert relative(ours, theirs) < (3e-4 if name.startswith("mean") else 1e-6), name


def test_sums_in_float32(device: torch.device) -> None:
    """A float16 sum of 4096 products of 1 would stop at 2048; a product of 300 by 300 would overflow."""
    x, weight = torch.ones(4, 4096).half(), torch.ones(4096, 16).half()
    x[:, 0], weight[0] = 300.0, 300.0
    residual = torch.full((4, 16), -6e4).half()
    x, weight, residual = (t.to(device) for t in (x, weight, residual))
    out, _ = linear_residual(x, weight, None, residual, config=Config(16, 16, 128))
    # 4095 + 90000 - 60000
    assert torch.equal(out.cpu(), torch.full((4, 16), 34095.0).half())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
def test_overflow_and_nan_are_torchs(device: torch.device) -> None:
    torch.manual_seed(5)
    case = Case(40, 32, 70, device)
    case.residual[3] = 65504.0
    case.residual[4, 5] = -torch.inf
    case.x[7, 2] = torch.nan
    case.x[8, 1] = torch.inf
    case.bias[:] = 0
    case.bias[6] = 3e4
    clean = torch.tensor([row for row in range(40) if row not in (3, 4, 7, 8)])
    out, stats = (t.cpu() for t in case.run())
    wanted = case.expected().half()
    assert torch.isinf(out[3, 6])
    assert torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(out.isinf(), wanted.isinf())
    assert torch.equal(out[wanted.isinf()], wanted[wanted.isinf()])
    assert relative(out[clean], wanted[clean]) < TOLERANCE[HALF]
    assert stats[clean].isfinite().all()
    assert stats[7].isnan().all()
    assert stats[[3, 4], 0, 1].isnan().all()


def test_compiles_and_exports(device: torch.device) -> None:
    class Add(torch.nn.Module):
        def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            return linear_residual(x, case.weight, case.bias, residual, config=SMALL)

    torch.manual_seed(6)
    case = Case(40, 48, 64, device)
    inputs = case.x.contiguous(), case.residual.contiguous()
    expected = Add()(*inputs)
    rows = torch.export.Dim("rows")
    exported = torch.export.export(Add(), inputs, dynamic_shapes=({0: rows}, {0: rows}))
    for model in (torch.compile(Add(), fullgraph=True, backend="eager"), exported.module()):
        assert all(torch.equal(a, e) for a, e in zip(model(*inputs), expected, strict=True))
    assert exported.module()(inputs[0][:7], inputs[1][:7])[0].shape == (7, 64)


def test_operator_is_a_good_citizen(device: torch.device) -> None:
    torch.manual_seed(7)
    case = Case(20, 32, 40, device)
    inputs = (case.x.contiguous(), case.weight, case.bias, case.residual, SMALL.as_list())
    torch.library.opcheck(_operator, inputs)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(20, 8, 4)}, "x must have the shape (any, any), not (20, 8, 4)"),
        ({"x": torch.zeros(20, 32)}, "x must be float16 or bfloat16, not float32"),
        ({"weight": torch.zeros(31, 40).half()}, "weight must have the shape (32, any), not (31, 40)"),
        ({"weight": torch.zeros(32, 40).bfloat16()}, "weight must be float16, not bfloat16"),
        ({"bias": torch.zeros(39)}, "bias must have the shape (40), not (39,)"),
        ({"bias": torch.zeros(40).half()}, "bias must be float32, not float16"),
        ({"residual": torch.zeros(19, 40).half()}, "residual must have the shape (20, 40), not (19, 40)"),
        ({"residual": torch.zeros(20, 40)}, "residual must be float16, not float32"),
        ({"weight": torch.zeros(32, 40).half().to("meta")}, "tensors lie on different devices"),
    ],
)
def test_unsupported(change: dict[str, Tensor], message: str, device: torch.device) -> None:
    case = Case(20, 32, 40, device)
    for name, value in change.items():
        setattr(case, name, value if value.is_meta else value.to(device))
    with pytest.raises(UnsupportedError, match=r"^linear_residual: ") as caught:
        case.run()
    assert message in str(caught.value)
