"""head_linear and absorbed_attention against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.interpreter import run_inside
from tests.helpers.kernel_tensors import TOLERANCE, Guarded, guard, guard_rows, relative
from vitdeploy_kernels import reference
from vitdeploy_kernels.absorbed import (
    WIDEST,
    absorbed_attention,
    head_linear,
    launch_absorbed_attention,
    launch_head_linear,
)
from vitdeploy_kernels.config import Config
from vitdeploy_kernels.support import UnsupportedError

PRODUCT = Config(block_m=16, block_n=32, block_k=32, group=2, warps=4, stages=2)
TOKENS = Config(block_m=16, block_n=16, warps=4, stages=2)
EPS = 1e-6


def tolerance(dtype: torch.dtype) -> float:
    """Normalised tokens and weights are rounded on the way, besides the output."""
    return 2 * TOLERANCE[dtype]


def queries_like(x: Tensor, rows: int) -> Tensor:
    """Queries whose scores have a deviation of about two: a softmax that is neither flat nor one-hot."""
    return (torch.randn(x.shape[0], rows, x.shape[2]) * 2 / x.shape[2] ** 0.5).to(x.dtype)


def statistics(x: Tensor, tile: int, device: torch.device) -> Tensor:
    return guard(reference.statistics(x.cpu().flatten(0, 1), tile).float(), device)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "rows, heads, depth, columns",
    [(1, 3, 16, 48), (17, 2, 32, 16), (33, 4, 24, 40), (5, 1, 33, 31), (64, 3, 64, 96)],
)
def test_head_linear(
    dtype: torch.dtype, rows: int, heads: int, depth: int, columns: int, device: torch.device
) -> None:
    torch.manual_seed(0)
    x = guard(torch.randn(rows, heads, depth).to(dtype), device)
    weight = guard((torch.randn(heads, depth, columns) / depth**0.5).to(dtype), device)
    out = Guarded((rows, heads, columns), dtype, device)
    run_inside(launch_head_linear(x, weight, out.tensor, config=PRODUCT))
    assert out.intact()
    assert relative(out.tensor, reference.head_linear(x.cpu(), weight.cpu())) < TOLERANCE[dtype]


def test_head_linear_of_columns_of_a_wider_row(device: torch.device) -> None:
    torch.manual_seed(1)
    wide = guard_rows(torch.randn(9, 3 * 32).half(), device)
    x = wide.view(9, 3, 32)
    weight = guard(torch.randn(3, 32, 24).half(), device)
    out = head_linear(x, weight, config=PRODUCT)
    assert out.is_contiguous()
    assert relative(out, reference.head_linear(x.cpu(), weight.cpu())) < TOLERANCE[torch.float16]


def test_head_linear_sums_in_float32(device: torch.device) -> None:
    x = torch.full((1, 2, 4096), 1.0, device=device).half()
    weight = torch.full((2, 4096, 16), 1.0, device=device).half()
    weight[:, 2048:] = 2**-4
    assert head_linear(x, weight, config=PRODUCT).eq(2048 + 128).all()


def test_head_linear_keeps_nan_in_its_row_and_head(device: torch.device) -> None:
    x = torch.randn(20, 3, 32, device=device).half()
    x[7, 1, 3], x[11, 2, 0] = float("nan"), float("inf")
    broken = head_linear(x, torch.rand(3, 32, 16, device=device).half() + 1, config=PRODUCT)
    assert broken[7, 1].isnan().all()
    assert broken[11, 2].isinf().all()
    assert int((~broken.isfinite()).sum()) == 32


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "images, rows, tokens, width, tile",
    [
        (2, 12, 21, 96, 32),
        (3, 3, 16, 64, 64),
        (1, 16, 1, 48, 16),
        (2, 17, 33, 40, 16),
        (1, 40, 50, 192, 64),
        (2, 1, 5, 100, 128),
        (2, 6, 18, 9, 16),
    ],
)
def test_absorbed_attention(
    dtype: torch.dtype,
    images: int,
    rows: int,
    tokens: int,
    width: int,
    tile: int,
    device: torch.device,
) -> None:
    torch.manual_seed(2)
    x = guard(torch.randn(images, tokens, width).to(dtype), device)
    queries = guard(queries_like(x.cpu(), rows), device)
    out = Guarded(queries.shape, dtype, device)
    stats = statistics(x, tile, device)
    run_inside(launch_absorbed_attention(queries, x, stats, out.tensor, scale=0.75, eps=EPS, config=TOKENS))
    assert out.intact()
    expected = reference.absorbed_attention(queries.cpu(), x.cpu(), 0.75, EPS)
    assert relative(out.tensor, expected) < tolerance(dtype)


@pytest.mark.parametrize("block_m, block_n", [(16, 32), (32, 16), (64, 64)])
def test_tiles_change_nothing(block_m: int, block_n: int, device: torch.device) -> None:
    torch.manual_seed(3)
    x = guard(torch.randn(2, 37, 64).half(), device)
    queries = guard(queries_like(x.cpu(), 24), device)
    config = Config(block_m=block_m, block_n=block_n, warps=4, stages=2)
    out = absorbed_attention(queries, x, statistics(x, 64, device), config=config)
    assert relative(out, reference.absorbed_attention(queries.cpu(), x.cpu(), 1.0, EPS)) < tolerance(x.dtype)


def test_tokens_and_images_may_be_apart(device: torch.device) -> None:
    torch.manual_seed(4)
    wide = guard_rows(torch.randn(3 * 20, 64).half(), device).unflatten(0, (3, 20))
    x = wide[:, 2:]
    queries = guard(queries_like(x.cpu(), 4), device)
    out = absorbed_attention(queries, x, statistics(x, 32, device), eps=EPS, config=TOKENS)
    assert relative(out, reference.absorbed_attention(queries.cpu(), x.cpu(), 1.0, EPS)) < tolerance(x.dtype)


@pytest.mark.parametrize(
    "name, values",
    [
        ("mean 1000, deviation 1", lambda: torch.randn(2, 20, 96) + 1000),
        ("+-6e4", lambda: torch.randn(2, 20, 96).sign() * 6e4),
        ("one massive channel", lambda: torch.cat([torch.full((2, 20, 1), 3e4), torch.randn(2, 20, 95)], 2)),
        ("subnormal", lambda: torch.randn(2, 20, 96) * 1e-6),
        ("tokens of all sizes", lambda: torch.randn(2, 20, 96) * torch.logspace(-3, 4, 20)[:, None]),
    ],
)
def test_extreme_tokens(name: str, values: object, device: torch.device) -> None:
    torch.manual_seed(5)
    x = guard(values().half(), device)  # type: ignore[operator]
    queries = guard(queries_like(x.cpu(), 12), device)
    out = absorbed_attention(queries, x, statistics(x, 32, device), eps=EPS, config=TOKENS)
    expected = reference.absorbed_attention(queries.cpu(), x.cpu(), 1.0, EPS)
    assert relative(out, expected) < tolerance(torch.float16), name


@pytest.mark.parametrize("width", [96, 100])
@pytest.mark.parametrize("value", [3.0, 6e4, 0.0])
def test_tokens_without_deviation_are_zero(value: float, width: int, device: torch.device) -> None:
    x = torch.full((1, 20, width), value, device=device).half()
    out = absorbed_attention(
        queries_like(x.cpu(), 12).to(device), x, statistics(x, 32, device), config=TOKENS
    )
    assert out.eq(0).all()


def test_scores_far_apart_do_not_overflow(device: torch.device) -> None:
    torch.manual_seed(6)
    x = guard(torch.randn(1, 40, 64).half(), device)
    queries = guard(torch.randn(1, 12, 64).half() * 100, device)
    out = absorbed_attention(queries, x, statistics(x, 64, device), eps=EPS, config=TOKENS)
    tokens = reference.normalise(x.cpu(), EPS)
    scores = queries.cpu().double() @ tokens.transpose(1, 2)
    clear = (scores.topk(2).values.diff(dim=2).abs() > 20).squeeze()
    assert int(clear.sum()) > 3
    winner = tokens[0, scores.argmax(dim=2)[0, clear.nonzero().flatten()]]
    assert relative(out[0, clear], winner) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("token", [0, 15, 16, 20])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stays_in_its_image(token: int, value: float, device: torch.device) -> None:
    torch.manual_seed(7)
    x = torch.randn(3, 21, 64).half()
    whole = absorbed_attention(
        queries_like(x, 12).to(device), x.to(device), statistics(x, 32, device), config=TOKENS
    )
    torch.manual_seed(7)
    x = torch.randn(3, 21, 64).half()
    queries = queries_like(x, 12)
    x[1, token, 5] = value
    out = absorbed_attention(queries.to(device), x.to(device), statistics(x, 32, device), config=TOKENS)
    assert out[1].isnan().all()
    assert out[[0, 2]].equal(whole[[0, 2]])


@settings(max_examples=15, deadline=None)
@given(
    images=st.integers(1, 3),
    rows=st.integers(1, 35),
    tokens=st.integers(1, 40),
    width=st.integers(8, 80),
    tile=st.sampled_from([16, 32, 64, 128]),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 2**16),
)
def test_any_shape(
    images: int,
    rows: int,
    tokens: int,
    width: int,
    tile: int,
    dtype: torch.dtype,
    seed: int,
    device: torch.device,
) -> None:
    torch.manual_seed(seed)
    x = guard((torch.randn(images, tokens, width) + 3).to(dtype), device)
    queries = guard(queries_like(x.cpu(), rows), device)
    out = absorbed_attention(queries, x, statistics(x, tile, device), eps=EPS, config=TOKENS)
    expected = reference.absorbed_attention(queries.cpu(), x.cpu(), 1.0, EPS)
    assert relative(out, expected) < tolerance(dtype)


def test_a_wide_residual_stream(device: torch.device) -> None:
    torch.manual_seed(8)
    x = guard(torch.randn(1, 3, 1280).half(), device)
    queries = guard(queries_like(x.cpu(), 2), device)
    out = absorbed_attention(queries, x, statistics(x, 128, device), eps=EPS, config=TOKENS)
    assert relative(out, reference.absorbed_attention(queries.cpu(), x.cpu(), 1.0, EPS)) < tolerance(x.dtype)


def test_empty(device: torch.device) -> None:
    x = torch.empty(0, 5, 32, device=device).half()
    assert absorbed_attention(x[:, :2], x, x.new_empty(0, 1, 2).float(), config=TOKENS).shape == (0, 2, 32)
    assert head_linear(x, x.new_ones(5, 32, 8), config=PRODUCT).shape == (0, 5, 8)


def test_operators_are_well_formed(device: torch.device) -> None:
    x = torch.randn(2, 18, 32, device=device).half()
    queries = queries_like(x.cpu(), 3).to(device)
    weight = torch.randn(3, 32, 16, device=device).half()
    config = TOKENS.as_list()
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.vitdeploy_kernels.absorbed_attention.default,
        (queries, x, statistics(x, 32, device), 1.0, EPS, config),
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.vitdeploy_kernels.head_linear.default, (queries, weight, config), test_utils=checks
    )


def test_under_compile(device: torch.device) -> None:
    x = torch.randn(2, 18, 32, device=device).half()
    queries = queries_like(x.cpu(), 3).to(device)
    weight = torch.randn(3, 32, 16, device=device).half()
    stats = statistics(x, 32, device)

    def read(queries: Tensor, x: Tensor) -> Tensor:
        return head_linear(absorbed_attention(queries, x, stats, config=TOKENS), weight, config=PRODUCT)

    compiled = torch.compile(read, backend="aot_eager", fullgraph=True)
    assert compiled(queries, x).equal(read(queries, x))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"queries": torch.zeros(2, 3, 31).half()}, r"queries must have the shape \(2, any, 32\)"),
        ({"queries": torch.zeros(2, 3, 32)}, "queries must be float16, not float32"),
        ({"x": torch.zeros(2, 18, 32)}, "x must be float16 or bfloat16, not float32"),
        ({"x": torch.zeros(36, 32).half()}, r"x must have the shape \(any, any, any\)"),
        ({"stats": torch.zeros(35, 1, 2)}, r"stats must have the shape \(36, any, 2\)"),
        ({"stats": torch.zeros(36, 1, 2).half()}, "stats must be float32"),
        ({"x": torch.zeros(2, 0, 32).half(), "stats": torch.zeros(0, 1, 2)}, "no tokens"),
        (
            {
                "x": torch.zeros(2, 18, WIDEST + 1).half(),
                "queries": torch.zeros(2, 3, WIDEST + 1).half(),
            },
            f"width {WIDEST + 1} is more than {WIDEST}",
        ),
    ],
)
def test_absorbed_attention_says_what_it_does_not_take(
    change: dict[str, Tensor], message: str, device: torch.device
) -> None:
    good = {
        "queries": torch.zeros(2, 3, 32).half(),
        "x": torch.zeros(2, 18, 32).half(),
        "stats": torch.zeros(36, 1, 2),
    }
    arguments = {name: tensor.to(device) for name, tensor in {**good, **change}.items()}
    with pytest.raises(UnsupportedError, match=f"^absorbed_attention: .*{message}"):
        absorbed_attention(**arguments)


@pytest.mark.parametrize(
    "x, weight, message",
    [
        (torch.zeros(2, 32).half(), torch.zeros(3, 32, 16).half(), "x must have the shape"),
        (torch.zeros(2, 3, 32).half(), torch.zeros(4, 32, 16).half(), r"weight must have .* \(3, 32, any\)"),
        (torch.zeros(2, 3, 32).half(), torch.zeros(3, 32, 16).bfloat16(), "weight must be float16, not bf"),
    ],
)
def test_head_linear_says_what_it_does_not_take(
    x: Tensor, weight: Tensor, message: str, device: torch.device
) -> None:
    with pytest.raises(UnsupportedError, match=f"^head_linear: {message}"):
        head_linear(x.to(device), weight.to(device))
