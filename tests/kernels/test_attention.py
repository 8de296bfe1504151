"""attention against float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.interpreter import run_inside
from tests.helpers.kernel_tensors import Guarded, guard, relative
from vitdeploy_kernels import reference, support
from vitdeploy_kernels.attention import attention, launch, supports
from vitdeploy_kernels.config import Config
from vitdeploy_kernels.support import Unsupported, UnsupportedError

HALF = torch.float16
SMALL = Config(block_m=32, block_n=32, warps=4, stages=2)
INF = float("inf")
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Two roundings follow each other."""


def random(count: int, length: int, heads: int, width: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(count, length, 3 * heads * width).to(dtype)


def check(
    qkv: Tensor,
    heads: int,
    device: torch.device,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    config: Config = SMALL,
) -> None:
    """Run the launch between canaries, and compare with float64."""
    count, length, columns = qkv.shape
    scale = (columns // (3 * heads)) ** -0.5 if scale is None else scale
    out = Guarded((count, length, columns // 3), qkv.dtype, device)
    biases = None if bias is None else guard(bias, device)
    run_inside(launch(guard(qkv, device), out.tensor, heads=heads, scale=scale, bias=biases, config=config))
    assert out.intact()
    expected = reference.attention(qkv, heads, scale, bias)
    assert relative(out.tensor, expected) < TOLERANCE[qkv.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [16, 32, 64, 72, 80, 128])
@pytest.mark.parametrize("biased", [False, True])
def test_head_widths(width: int, dtype: torch.dtype, biased: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    check(random(2, 37, 2, width, dtype), 2, device, bias=torch.randn(3, 2, 37, 37) if biased else None)


@pytest.mark.parametrize("length", [1, 5, 16, 17, 32, 49, 64, 65])
@pytest.mark.parametrize("config", [SMALL, Config(block_m=16, block_n=64, warps=4, stages=2)])
def test_lengths(length: int, config: Config, device: torch.device) -> None:
    torch.manual_seed(1)
    check(random(2, length, 1, 32), 1, device, config=config)


@pytest.mark.parametrize("width, dtype", [(64, HALF), (80, torch.bfloat16)])
def test_vit_length(width: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(2)
    check(
        random(1, 197, 1, width, dtype), 1, device, config=Config(block_m=64, block_n=64, warps=4, stages=2)
    )


def test_is_scaled_dot_product_attention(device: torch.device) -> None:
    torch.manual_seed(3)
    qkv, bias = random(3, 40, 2, 32), torch.randn(1, 2, 40, 40)
    q, k, v = qkv.double().view(3, 40, 3, 2, 32).permute(2, 0, 3, 1, 4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.double())
    out = attention(guard(qkv, device), 2, bias=guard(bias, device), config=SMALL)
    assert relative(out, expected.transpose(1, 2).reshape(3, 40, 64)) < TOLERANCE[HALF]


def test_left_over_rows_and_columns_get_small_tiles() -> None:
    qkv, out = (torch.empty(2, 197, columns, dtype=HALF, device="meta") for columns in (576, 192))
    planned = launch(qkv, out, heads=3, scale=1.0, config=Config(block_m=64, block_n=128, warps=4))
    assert planned.grid == (2 * 3 * 4,)
    assert (planned.constants["TAIL_M"], planned.constants["TAIL_N"]) == (16, 128)
    wide = torch.empty(1, 257, 240, dtype=HALF, device="meta")
    planned = launch(wide, wide[..., :80], heads=1, scale=1.0, config=SMALL)
    assert (planned.constants["TAIL_M"], planned.constants["TAIL_N"]) == (16, 16)
    assert (planned.constants["MAIN"], planned.constants["REST_BLOCK"]) == (64, 16)


def ascending() -> Tensor:
    """Every key scores higher than those before it, so that each tile rescales what was summed."""
    qkv = random(1, 70, 1, 32)
    qkv[..., :64] = 0
    qkv[..., 0] = 1
    qkv[0, :, 32] = torch.arange(70) * 0.5
    return qkv


def huge() -> Tensor:
    """Scores of +-6e4 and all between; two keys share the top, so that a softmax of one key is wrong."""
    qkv = random(1, 70, 1, 32)
    qkv[..., :64] = 0
    qkv[..., 0] = torch.where(torch.arange(70) % 2 == 0, 240, -240)
    qkv[0, :, 32] = torch.linspace(-250, 250, 70).round()
    qkv[0, [0, 40], 32], qkv[0, [3, 69], 32] = -250.0, 250.0
    return qkv


def large_values() -> Tensor:
    """Values whose unscaled sum leaves float16, and equal scores."""
    qkv = random(1, 70, 1, 32)
    qkv[..., :64] = 0
    qkv[..., 64:] += 1500
    return qkv


def large_products() -> Tensor:
    """Products that leave float16 and cancel in the score."""
    qkv = random(1, 70, 1, 32)
    qkv[..., 3:32] = 0
    qkv[..., :3] = torch.tensor([300.0, 300.0, 1.0])
    qkv[..., 32], qkv[..., 33] = 300, -300
    qkv[..., 34] = (4 * qkv[..., 34]).round() / 4
    return qkv


@pytest.mark.parametrize("make", [ascending, huge, large_values, large_products])
def test_extreme_values(make: Callable[[], Tensor], device: torch.device) -> None:
    torch.manual_seed(4)
    check(make(), 1, device, scale=1.0)
    check(make(), 1, device, scale=1.0, bias=torch.zeros(1, 1, 70, 70))


def test_weights_are_summed_in_float32(device: torch.device) -> None:
    """One weight of 1 and 69 of 2^-11, which float16 would round off their sum."""
    qkv = torch.zeros(1, 70, 96, dtype=HALF)
    qkv[..., 0], qkv[0, 1:, 32], qkv[..., 64:] = 1, -11, 0.75
    out = attention(guard(qkv, device), 1, scale=math.log(2), config=SMALL)
    assert relative(out, qkv[..., 64:]) < 1e-4


def test_all_equal_rows(device: torch.device) -> None:
    torch.manual_seed(5)
    check(random(2, 1, 2, 32).expand(2, 45, 192).contiguous(), 2, device)


def test_excluded_keys(device: torch.device) -> None:
    """Rows that see nothing in the first tile, in the last, or but one key."""
    torch.manual_seed(6)
    bias = torch.randn(2, 1, 70, 70)
    bias[0, 0, :20, :32] = -INF
    bias[0, 0, 20:40, 64:] = -INF
    bias[0, 0, 40:, :69] = -INF
    bias[1, 0, :, 1:] = -INF
    check(random(5, 70, 1, 32), 1, device, bias=bias)


def test_rows_without_keys_are_nan(device: torch.device) -> None:
    torch.manual_seed(7)
    qkv, bias = random(1, 40, 1, 32), torch.zeros(1, 1, 40, 40)
    bias[0, 0, [3, 35]] = -INF
    out = attention(guard(qkv, device), 1, bias=guard(bias, device), config=SMALL)
    expected = reference.attention(qkv, 1, 32**-0.5, bias)
    assert expected.isnan().all(dim=2).sum() == 2
    torch.testing.assert_close(out.cpu().double(), expected, rtol=2e-3, atol=2e-3, equal_nan=True)


@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
@pytest.mark.parametrize("column", [0, 32, 64])
def test_what_is_not_finite_spreads_as_in_torch(value: float, column: int, device: torch.device) -> None:
    """In a query, a key, a value; in a full tile and in the tail. Other images and heads stay clean."""
    torch.manual_seed(8)
    for row in (2, 36):
        qkv = random(3, 37, 1, 32)
        qkv[..., : column + 1] = qkv[..., : column + 1].abs() + 0.5
        qkv[1, row, column] = value
        out = attention(guard(qkv, device), 1, config=SMALL).cpu().double()
        expected = reference.attention(qkv, 1, 32**-0.5)
        assert not expected[1].isfinite().all() or value == -INF
        assert expected[[0, 2]].isfinite().all()
        torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3, equal_nan=True)


def test_what_is_not_finite_stays_in_its_head(device: torch.device) -> None:
    """24 columns are 16 and 8, and the 8 are filled up to 16."""
    torch.manual_seed(12)
    qkv = random(1, 20, 2, 24)
    qkv.view(1, 20, 3, 2, 24)[..., 1, :] = float("nan")
    out = attention(guard(qkv, device), 2, config=SMALL)
    assert out[..., 24:].isnan().all()
    assert relative(out[..., :24], reference.attention(qkv, 2, 24**-0.5)[..., :24]) < TOLERANCE[HALF]


def test_images_take_the_biases_in_turn(device: torch.device) -> None:
    """Windows, heads and rows of the bias may be apart, or the same memory."""
    torch.manual_seed(9)
    qkv, bias = random(5, 20, 3, 16), torch.randn(2, 3, 20, 24)
    expected = reference.attention(qkv, 3, 0.25, bias[..., :20])
    out = attention(guard(qkv, device), 3, bias=guard(bias, device)[..., :20], config=SMALL)
    assert relative(out, expected) < TOLERANCE[HALF]
    shared = bias[:1, :1, :, :20].half().expand(2, 3, 20, 20)
    expected = reference.attention(qkv, 3, 0.25, shared)
    out = attention(guard(qkv, device), 3, bias=shared.to(device), config=SMALL)
    assert relative(out, expected) < TOLERANCE[HALF]


def test_misaligned_and_apart(device: torch.device) -> None:
    torch.manual_seed(10)
    qkv, bias = random(2, 21, 2, 32), torch.randn(2, 2, 21, 21)
    expected = reference.attention(qkv, 2, 0.3, bias)
    shifted = guard(qkv, device, shift=1), guard(bias, device, shift=3)
    apart = guard(qkv.transpose(0, 1), device).transpose(0, 1), guard(bias.mT, device).mT
    for x, b in (shifted, apart):
        assert relative(attention(x, 2, scale=0.3, bias=b, config=SMALL), expected) < TOLERANCE[HALF]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(0, 3),
    length=st.integers(1, 80),
    heads=st.integers(1, 2),
    width=st.integers(16, 100),
    biases=st.integers(0, 3),
    dtype=st.sampled_from(sorted(TOLERANCE, key=str)),
    blocks=st.tuples(st.sampled_from([16, 32, 64]), st.sampled_from([16, 32, 64])),
)
def test_any_shape(
    count: int,
    length: int,
    heads: int,
    width: int,
    biases: int,
    dtype: torch.dtype,
    blocks: tuple[int, int],
    device: torch.device,
) -> None:
    torch.manual_seed(length)
    bias = torch.randn(biases, heads, length, length) if biases else None
    qkv = random(count, length, heads, width, dtype)
    out = attention(
        guard(qkv, device), heads, bias=bias if bias is None else guard(bias, device), config=Config(*blocks)
    )
    assert out.shape == (count, length, heads * width)
    if count:
        assert relative(out, reference.attention(qkv, heads, width**-0.5, bias)) < TOLERANCE[dtype]


def test_compiles_and_exports(device: torch.device) -> None:
    class Attend(torch.nn.Module):
        def forward(self, qkv: Tensor, bias: Tensor) -> Tensor:
            return attention(qkv, 2, bias=bias, config=SMALL)

    torch.manual_seed(11)
    qkv, bias = random(2, 20, 2, 16).to(device), torch.randn(1, 2, 20, 20, device=device)
    out = Attend()(qkv, bias)
    compiled = torch.compile(Attend(), fullgraph=True, backend="eager")
    exported = torch.export.export(Attend(), (qkv, bias))
    assert torch.equal(compiled(qkv, bias), out)
    assert torch.equal(exported.module()(qkv, bias), out)
    operator = torch.ops.vitdeploy_kernels.attention.default
    torch.library.opcheck(operator, (qkv, 2, 0.25, bias, SMALL.as_list()))


@pytest.mark.parametrize(
    "shape, heads, dtype, keywords, reason",
    [
        ((2, 8), 1, HALF, {}, "shape"),
        ((2, 8, 96), 1, torch.float32, {}, "float16 or bfloat16"),
        ((2, 8, 97), 1, HALF, {}, "97 columns"),
        ((2, 8, 96), 5, HALF, {}, "5 heads"),
        ((2, 8, 96), 0, HALF, {}, "0 heads"),
        ((2, 0, 96), 1, HALF, {}, "1 to 1024 tokens, not 0"),
        ((1, 1025, 96), 1, HALF, {}, "1 to 1024 tokens, not 1025"),
        ((2, 8, 96), 4, HALF, {}, "16 to 128 wide, not 8"),
        ((2, 8, 576), 1, HALF, {}, "16 to 128 wide, not 192"),
        ((2, 8, 96), 1, HALF, {"scale": 0.0}, "positive"),
        ((2, 8, 96), 1, HALF, {"scale": -1.0}, "positive"),
        ((2, 8, 96), 1, HALF, {"scale": float("nan")}, "positive"),
        ((2, 8, 96), 1, HALF, {"bias": torch.zeros(1, 1, 8, 9)}, "bias must have the shape"),
        ((2, 8, 96), 1, HALF, {"bias": torch.zeros(0, 1, 8, 8)}, "bias is empty"),
        ((2, 8, 96), 1, HALF, {"bias": torch.zeros(1, 1, 8, 8).double()}, "bias must be float32"),
    ],
)
def test_unsupported(
    shape: tuple[int, ...],
    heads: int,
    dtype: torch.dtype,
    keywords: dict[str, object],
    reason: str,
    device: torch.device,
) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        attention(torch.zeros(shape, dtype=dtype, device=device), heads, **keywords)  # type: ignore[arg-type]


def test_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "interpreted", lambda: False)
    found = supports(random(1, 4, 1, 16), 1, 1.0)
    assert isinstance(found, Unsupported)
    assert "TRITON_INTERPRET" in found.reason
