"""add_layernorm and row_statistics against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.interpreter import run_inside
from tests.helpers.kernel_tensors import TOLERANCE, Guarded, guard, guard_rows, relative, statistics_error
from vitdeploy_kernels import add_layernorm as module
from vitdeploy_kernels import reference
from vitdeploy_kernels.add_layernorm import add_layernorm, launch, row_statistics
from vitdeploy_kernels.config import Config
from vitdeploy_kernels.support import UnsupportedError

SMALL = Config(block_m=4, warps=4, stages=1)
HALF = torch.float16
EPS = 1e-6
EXACT = 1e-5
"""Worst error of statistics: a few roundings of float32."""


class Case:
    """Inputs of one call, with NaN around each and between the rows of those that may have gaps."""

    def __init__(
        self,
        rows: int,
        width: int,
        device: torch.device,
        dtype: torch.dtype = HALF,
        branch: bool = True,
        bias: bool = True,
    ) -> None:
        vector = guard(torch.randn(width), device)
        self.x = guard_rows((3 * torch.randn(rows, width) + 2).to(dtype), device, gap=3)
        self.branch = guard_rows(torch.randn(rows, width).to(dtype), device) if branch else None
        self.bias = vector if bias else None

    def run(self, config: Config = SMALL) -> tuple[Tensor, Tensor]:
        return add_layernorm(self.x, self.branch, self.bias, eps=EPS, config=config)

    def total(self) -> Tensor:
        branch, bias = (None if t is None else t.cpu() for t in (self.branch, self.bias))
        return reference.add_layernorm(self.x.cpu(), branch, bias, EPS)[0]

    def normed(self, total: Tensor) -> Tensor:
        """LayerNorm of a total as it was rounded."""
        return reference.add_layernorm(total.cpu(), None, None, EPS)[1]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("branch, bias", [(True, True), (True, False), (False, True), (False, False)])
def test_is_sum_and_its_layernorm(dtype: torch.dtype, branch: bool, bias: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    case = Case(21, 200, device, dtype, branch, bias)
    total, normed = case.run()
    assert total.dtype == normed.dtype == dtype
    assert relative(total, case.total()) < TOLERANCE[dtype]
    assert relative(normed, case.normed(total)) < TOLERANCE[dtype]


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 40),
    width=st.one_of(st.integers(2, 300), st.sampled_from([1023, 1025, 8191, 8192])),
    block_m=st.sampled_from([1, 2, 8]),
    dtype=st.sampled_from(sorted(TOLERANCE, key=str)),
    in_place=st.booleans(),
    bias=st.booleans(),
)
def test_any_shape_stays_inside(
    rows: int,
    width: int,
    block_m: int,
    dtype: torch.dtype,
    in_place: bool,
    bias: bool,
    device: torch.device,
) -> None:
    torch.manual_seed(width)
    case = Case(rows, width, device, dtype, bias=bias)
    expected = case.total()
    total, normed = (Guarded((rows, width), dtype, device) for _ in range(2))
    stats = Guarded((rows, 1, 2), torch.float32, device)
    written = case.x if in_place else total.tensor
    run_inside(
        launch(
            case.x,
            case.branch,
            case.bias,
            written,
            normed.tensor,
            stats.tensor,
            eps=EPS,
            config=Config(block_m),
        )
    )
    assert relative(written, expected) < TOLERANCE[dtype]
    assert statistics_error(stats.tensor, written, width) < EXACT
    assert relative(normed.tensor, case.normed(written)) < TOLERANCE[dtype]
    assert total.intact()
    assert normed.intact()
    assert stats.intact()
    if in_place:
        assert (
            torch.as_strided(case.x, (rows, 3), (width + 3, 1), case.x.storage_offset() + width).isnan().all()
        )


def test_ragged_rows_stay_inside(device: torch.device) -> None:
    torch.manual_seed(8)
    case = Case(9, 100, device)
    total, normed = (Guarded((9, 100), HALF, device) for _ in range(2))
    stats = Guarded((9, 1, 2), torch.float32, device)
    inputs = case.x, case.branch, case.bias
    run_inside(launch(*inputs, total.tensor, normed.tensor, stats.tensor, eps=EPS, config=SMALL))
    assert relative(total.tensor, case.total()) < TOLERANCE[HALF]
    assert relative(normed.tensor, case.normed(total.tensor)) < TOLERANCE[HALF]
    assert statistics_error(stats.tensor, total.tensor, 100) < EXACT
    assert total.intact()
    assert normed.intact()
    assert stats.intact()


@pytest.mark.parametrize("wanted", ["total", "normed", "stats"])
def test_writes_only_what_is_wanted(wanted: str, device: torch.device) -> None:
    torch.manual_seed(1)
    case = Case(9, 100, device)
    outputs: dict[str, Tensor | None] = {"total": None, "normed": None, "stats": None}
    outputs[wanted] = out = torch.empty(9, *((1, 2) if wanted == "stats" else (100,)), device=device)
    if wanted != "stats":
        out = outputs[wanted] = out.half()
    launch(case.x, case.branch, case.bias, **outputs, eps=EPS, config=SMALL).run()
    total = case.total().half()
    if wanted == "stats":
        assert statistics_error(out, total, 100) < 1e-3  # ties may be rounded differently
    else:
        assert relative(out, total if wanted == "total" else case.normed(total)) < TOLERANCE[HALF]


EXTREME = {
    "mean 1000, deviation 1": lambda: torch.randn(10, 96) + 1000,
    "all equal": lambda: torch.full((10, 96), 3.0),
    "all equal and large": lambda: torch.full((10, 96), 6e4),
    "+-6e4": lambda: torch.randn(10, 96).sign() * 6e4,
    "one massive channel": lambda: torch.cat([torch.full((10, 1), 3e4), torch.randn(10, 95)], dim=1),
    "subnormal": lambda: torch.randn(10, 96) * 1e-6,
}


@pytest.mark.parametrize("name", EXTREME)
def test_extreme_rows(name: str, device: torch.device) -> None:
    torch.manual_seed(2)
    case = Case(10, 96, device, branch=False, bias=False)
    case.x = guard(EXTREME[name]().half(), device)
    total, normed = case.run()
    assert torch.equal(total, case.x)
    assert relative(normed, case.normed(total)) < TOLERANCE[HALF]
    assert statistics_error(row_statistics(case.x, config=SMALL), case.x, 96) < EXACT


def test_one_column(device: torch.device) -> None:
    torch.manual_seed(9)
    case = Case(5, 1, device)
    total, normed = case.run()
    assert relative(total, case.total()) < TOLERANCE[HALF]
    assert torch.equal(normed, torch.zeros(5, 1, dtype=HALF, device=device))


def test_eps_counts(device: torch.device) -> None:
    x = torch.tensor([[1.0, -1.0]], device=device).half() / 64
    _, normed = add_layernorm(x, None, eps=3 / 64**2, config=SMALL)
    assert torch.equal(normed.cpu(), torch.tensor([[0.5, -0.5]]).half())


def test_layernorm_is_of_the_rounded_total(device: torch.device) -> None:
    torch.manual_seed(3)
    case = Case(10, 96, device)
    case.x = torch.full((10, 96), 1000.0, device=device).half()
    case.bias, case.branch = torch.rand(96, device=device), None
    total, normed = case.run()
    assert relative(normed, case.normed(total)) < TOLERANCE[HALF]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
def test_overflow_and_nan_are_torchs(device: torch.device) -> None:
    torch.manual_seed(4)
    case = Case(12, 50, device)
    assert case.branch is not None
    assert case.bias is not None
    case.x[3, 7], case.branch[3, 7] = 65504.0, 65504.0
    case.x[5, 1] = torch.nan
    case.branch[6, 2] = -torch.inf
    clean = torch.tensor([row for row in range(12) if row not in (3, 5, 6)])
    total, normed = (t.cpu() for t in case.run())
    wanted = case.total().half()
    assert torch.equal(total.isnan(), wanted.isnan())
    assert torch.equal(total.isinf(), wanted.isinf())
    assert torch.equal(total[wanted.isinf()], wanted[wanted.isinf()])
    assert normed[[3, 5, 6]].isnan().all()
    assert relative(normed[clean], case.normed(total)[clean]) < TOLERANCE[HALF]
    assert row_statistics(total.to(device), config=SMALL)[:, 0, 1].isnan().sum() == 3


def test_misaligned_and_transposed_inputs(device: torch.device) -> None:
    torch.manual_seed(5)
    case = Case(11, 70, device)
    assert case.branch is not None
    expected = case.total()
    case.bias, case.x, case.branch = (guard(t, device, shift=1) for t in (case.bias, case.x, case.branch))
    total, normed = case.run()
    assert relative(total, expected) < TOLERANCE[HALF]
    case.x, case.branch = guard(case.x.mT, device).mT, guard(case.branch.mT, device).mT
    case.bias = torch.stack([case.bias, case.bias], dim=1)[:, 0]
    again, normed_again = case.run()
    assert torch.equal(again, total)
    assert torch.equal(normed_again, normed)
    assert statistics_error(row_statistics(case.x, config=SMALL), case.x, 70) < EXACT


def test_compiles_and_exports(device: torch.device) -> None:
    class Add(torch.nn.Module):
        def forward(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            total, normed = add_layernorm(x, branch, case.bias, config=SMALL)
            return total, normed, row_statistics(total, config=SMALL)

    torch.manual_seed(6)
    case = Case(10, 48, device)
    assert case.branch is not None
    inputs = case.x.contiguous(), case.branch.contiguous()
    expected = Add()(*inputs)
    rows = torch.export.Dim("rows")
    exported = torch.export.export(Add(), inputs, dynamic_shapes=({0: rows}, {0: rows}))
    for model in (torch.compile(Add(), fullgraph=True, backend="eager"), exported.module()):
        assert all(torch.equal(a, e) for a, e in zip(model(*inputs), expected, strict=True))
    assert exported.module()(inputs[0][:7], inputs[1][:7])[2].shape == (7, 1, 2)


def test_operators_are_good_citizens(device: torch.device) -> None:
    torch.manual_seed(7)
    case = Case(6, 40, device)
    inputs = (case.x.contiguous(), case.branch, case.bias, EPS, SMALL.as_list())
    torch.library.opcheck(module._operator, inputs)
    torch.library.opcheck(module._statistics, (case.x.contiguous(), SMALL.as_list()))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(8)}, "x must have the shape (any, any), not (8,)"),
        ({"x": torch.zeros(6, 40)}, "x must be float16 or bfloat16, not float32"),
        ({"x": torch.zeros(6, 8193).half()}, "rows are at most 8192 columns wide, not 8193"),
        ({"branch": torch.zeros(7, 40).half()}, "branch must have the shape (6, 40), not (7, 40)"),
        ({"branch": torch.zeros(6, 40).bfloat16()}, "branch must be float16, not bfloat16"),
        ({"bias": torch.zeros(40).half()}, "bias must be float32, not float16"),
        ({"bias": torch.zeros(1, 40)}, "bias must have the shape (40), not (1, 40)"),
        ({"bias": torch.zeros(40).to("meta")}, "tensors lie on different devices"),
    ],
)
def test_unsupported(change: dict[str, Tensor], message: str, device: torch.device) -> None:
    case = Case(6, 40, device)
    for name, value in change.items():
        setattr(case, name, value if value.is_meta else value.to(device))
    with pytest.raises(UnsupportedError, match=r"^add_layernorm: ") as caught:
        case.run()
    assert message in str(caught.value)


def test_row_statistics_names_itself(device: torch.device) -> None:
    with pytest.raises(
        UnsupportedError, match=r"^row_statistics: x must be float16 or bfloat16, not float32"
    ):
        row_statistics(torch.zeros(4, 4, device=device))
