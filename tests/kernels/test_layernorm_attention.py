"""layernorm_attention against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.interpreter import run_inside
from tests.helpers.kernel_tensors import Guarded, guard, relative
from vitdeploy_kernels import reference, support
from vitdeploy_kernels.config import Config
from vitdeploy_kernels.layernorm_attention import launch, layernorm_attention, supports
from vitdeploy_kernels.support import Unsupported, UnsupportedError

HALF = torch.float16
EPS = 1e-6
INF = float("inf")
SMALL = Config(block_m=32, block_k=32, warps=4, stages=2)
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 1.6e-2}
"""Five roundings follow each other."""


class Layer(NamedTuple):
    weight: Tensor
    bias: Tensor


def layer(width: int, heads: int, head: int, dtype: torch.dtype = HALF) -> Layer:
    weight = torch.randn(width, 3 * heads * head) / width**0.5
    return Layer(weight.to(dtype), torch.randn(3 * heads * head))


def check(
    x: Tensor,
    projection: Layer,
    heads: int,
    device: torch.device,
    *,
    mask: Tensor | None = None,
    config: Config = SMALL,
) -> None:
    """Run the launch between canaries, and compare with float64."""
    columns = projection.weight.shape[1] // 3
    scale = (columns // heads) ** -0.5
    out = Guarded((*x.shape[:2], columns), x.dtype, device)
    inputs, masks = (
        [guard(t, device) for t in (x, *projection)],
        None if mask is None else guard(mask, device),
    )
    run_inside(launch(*inputs, out.tensor, heads=heads, scale=scale, eps=EPS, mask=masks, config=config))
    assert out.intact()
    expected = reference.layernorm_attention(x, *projection, heads, scale, EPS, mask)
    assert relative(out.tensor, expected) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head", [16, 32, 64, 72, 80, 128])
def test_head_widths(head: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    check(torch.randn(2, 37, 96).to(dtype), layer(96, 2, head, dtype), 2, device)


@pytest.mark.parametrize("length", [1, 5, 16, 17, 32, 49, 64, 65])
def test_lengths(length: int, device: torch.device) -> None:
    torch.manual_seed(1)
    check(torch.randn(2, length, 64).half(), layer(64, 1, 32), 1, device)


@pytest.mark.parametrize("width", [1, 16, 33, 96, 512])
def test_widths(width: int, device: torch.device) -> None:
    torch.manual_seed(2)
    check(torch.randn(2, 20, width).half(), layer(width, 1, 16), 1, device)


def test_vit_length(device: torch.device) -> None:
    torch.manual_seed(3)
    config = Config(block_m=64, block_k=32, warps=8, stages=2)
    check(torch.randn(1, 197, 64).half(), layer(64, 1, 64), 1, device, config=config)


def test_swin_windows_take_the_masks_in_turn(device: torch.device) -> None:
    """Four windows to an image, each with its mask; windows and rows of the mask may be apart."""
    torch.manual_seed(4)
    x, projection, wide = torch.randn(5, 49, 64).half(), layer(64, 2, 32), torch.randn(4, 2, 49, 56)
    mask = wide[..., :49]
    mask[1, :, :25, 25:], mask[1, :, 25:, :25] = -INF, -INF
    mask[2, :, :, 32:], mask[3, :, :, :32] = -INF, -INF
    check(x, projection, 2, device, mask=mask, config=Config(block_m=64, block_k=32, warps=4, stages=2))
    out = layernorm_attention(
        guard(x, device), *(guard(t, device) for t in projection), 2,
        mask=guard(wide, device)[..., :49], config=Config(block_m=16, block_k=64),
    )  # fmt: skip
    expected = reference.layernorm_attention(x, *projection, 2, 32**-0.5, EPS, mask)
    assert relative(out, expected) < TOLERANCE[HALF]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(2, 40, 80) + 1000,
        lambda: torch.full((2, 40, 80), 3.0),
        lambda: torch.full((2, 40, 80), 6e4),
        lambda: torch.randn(2, 40, 80).sign() * 6e4,
        lambda: torch.randn(2, 40, 80) * 1e-6,
    ],
    ids=["mean 1000, deviation 1", "all equal", "all equal and large", "+-6e4", "subnormal"],
)
def test_extreme_rows(make: Callable[[], Tensor], device: torch.device) -> None:
    torch.manual_seed(5)
    check(make().half(), layer(80, 1, 32), 1, device)


def test_large_scores_and_values(device: torch.device) -> None:
    """Scores of thousands, equal for all keys, and values whose unscaled sum leaves float16."""
    torch.manual_seed(6)
    projection = layer(64, 1, 32)
    projection.weight[:, :64] = 0
    projection.bias[:64] = 100.0
    projection.bias[64:] += 1500
    check(torch.randn(1, 70, 64).half(), projection, 1, device)


def test_projection_is_summed_in_float32(device: torch.device) -> None:
    """The first 32 columns add about 640 and the last 32 take it away; float16 would round between them."""
    torch.manual_seed(13)
    projection = layer(64, 1, 32)
    projection.weight[:, 64:] += 20
    x = torch.ones(1, 40, 64).half()
    x[..., 32:] = -1
    x[0, torch.arange(40), torch.randint(32, (40,))] = -1
    x[0, torch.arange(40), torch.randint(32, 64, (40,))] = 1
    check(x, projection, 1, device)


def test_is_layer_norm_linear_and_scaled_dot_product_attention(device: torch.device) -> None:
    torch.manual_seed(7)
    x, projection = torch.randn(2, 40, 64).half(), layer(64, 2, 32)
    normed = torch.nn.functional.layer_norm(x.double(), (64,), eps=EPS)
    qkv = normed @ projection.weight.double() + projection.bias.double()
    q, k, v = qkv.view(2, 40, 3, 2, 32).permute(2, 0, 3, 1, 4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    out = layernorm_attention(guard(x, device), *(guard(t, device) for t in projection), 2, config=SMALL)
    assert relative(out, expected) < TOLERANCE[HALF]


@pytest.mark.parametrize("value", [float("nan"), INF])
def test_what_is_not_finite_stays_in_its_image(value: float, device: torch.device) -> None:
    torch.manual_seed(8)
    projection = layer(32, 1, 32)
    for row in (2, 36):
        x = torch.randn(3, 37, 32).half()
        x[1, row, 5] = value
        out = layernorm_attention(guard(x, device), *(guard(t, device) for t in projection), 1, config=SMALL)
        expected = reference.layernorm_attention(x, *projection, 1, 32**-0.5, EPS)
        assert out[1].isnan().all()
        assert expected[1].isnan().all()
        assert relative(out[[0, 2]], expected[[0, 2]]) < TOLERANCE[HALF]


@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_finite_stays_in_its_head(which: int, device: torch.device) -> None:
    """NaN in one head's weights or bias; 24 columns are filled up to 32."""
    torch.manual_seed(12)
    x, projection = torch.randn(1, 20, 32).half(), layer(32, 2, 24)
    projection[which].view(-1, 3, 2, 24)[:, :, 1] = float("nan")
    out = layernorm_attention(guard(x, device), *(guard(t, device) for t in projection), 2, config=SMALL)
    expected = reference.layernorm_attention(x, *projection, 2, 24**-0.5, EPS)
    assert out[..., 24:].isnan().all()
    assert relative(out[..., :24], expected[..., :24]) < TOLERANCE[HALF]


def test_rows_without_keys_are_nan(device: torch.device) -> None:
    torch.manual_seed(9)
    x, projection, mask = torch.randn(1, 40, 32).half(), layer(32, 1, 16), torch.zeros(1, 1, 40, 40)
    mask[0, 0, [3, 35]] = -INF
    out = layernorm_attention(
        guard(x, device), *(guard(t, device) for t in projection), 1, mask=guard(mask, device), config=SMALL
    )
    empty = out.cpu()[0].isnan().all(dim=1)
    assert empty.nonzero().flatten().tolist() == [3, 35]
    expected = reference.layernorm_attention(x, *projection, 1, 0.25, EPS, mask)
    assert relative(out.cpu()[:, ~empty], expected[:, ~empty]) < TOLERANCE[HALF]


def test_misaligned_and_apart(device: torch.device) -> None:
    torch.manual_seed(10)
    x, projection, mask = torch.randn(2, 21, 48).half(), layer(48, 2, 16), torch.randn(1, 2, 21, 21)
    expected = reference.layernorm_attention(x, *projection, 2, 0.3, EPS, mask)
    tensors = (x, *projection, mask)
    shifted = [guard(t, device, shift=1) for t in tensors]
    apart = [guard(t.movedim(0, -1), device).movedim(-1, 0) for t in tensors]
    for a, w, b, m in (shifted, apart):
        out = layernorm_attention(a, w, b, 2, scale=0.3, mask=m, config=SMALL)
        assert relative(out, expected) < TOLERANCE[HALF]


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(0, 2),
    length=st.integers(1, 50),
    width=st.integers(1, 70),
    heads=st.integers(1, 2),
    head=st.integers(16, 70),
    masks=st.integers(0, 2),
    dtype=st.sampled_from(sorted(TOLERANCE, key=str)),
    blocks=st.tuples(st.sampled_from([16, 32, 64]), st.sampled_from([16, 32, 64])),
)
def test_any_shape(
    count: int,
    length: int,
    width: int,
    heads: int,
    head: int,
    masks: int,
    dtype: torch.dtype,
    blocks: tuple[int, int],
    device: torch.device,
) -> None:
    torch.manual_seed(length)
    x, projection = torch.randn(count, length, width).to(dtype), layer(width, heads, head, dtype)
    mask = torch.randn(masks, heads, length, length) if masks else None
    out = layernorm_attention(
        guard(x, device), *(guard(t, device) for t in projection), heads,
        mask=mask if mask is None else guard(mask, device),
        config=Config(block_m=blocks[0], block_k=blocks[1]),
    )  # fmt: skip
    assert out.shape == (count, length, heads * head)
    if count:
        expected = reference.layernorm_attention(x, *projection, heads, head**-0.5, EPS, mask)
        # Of few and odd columns, some rows' results nearly cancel.
        error = (out.cpu().double() - expected).norm() / expected.norm()
        assert float(error) < TOLERANCE[dtype]


def test_compiles_and_exports(device: torch.device) -> None:
    class Attend(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return layernorm_attention(x, weight, bias, 2, config=SMALL)

    torch.manual_seed(11)
    inputs = tuple(t.to(device) for t in (torch.randn(2, 20, 32).half(), *layer(32, 2, 16)))
    out = Attend()(*inputs)
    compiled = torch.compile(Attend(), fullgraph=True, backend="eager")
    exported = torch.export.export(Attend(), inputs)
    assert torch.equal(compiled(*inputs), out)
    assert torch.equal(exported.module()(*inputs), out)
    operator = torch.ops.vitdeploy_kernels.layernorm_attention.default
    torch.library.opcheck(operator, (*inputs, 2, 0.25, EPS, None, SMALL.as_list()))


@pytest.mark.parametrize(
    "shape, columns, heads, dtype, keywords, reason",
    [
        ((8, 32), 96, 1, HALF, {}, "x must have the shape"),
        ((2, 8, 32), 96, 1, torch.float32, {}, "float16 or bfloat16"),
        ((2, 8, 32), 97, 1, HALF, {}, "97 columns"),
        ((2, 8, 32), 96, 0, HALF, {}, "0 heads"),
        ((2, 0, 32), 96, 1, HALF, {}, "1 to 256 tokens, not 0"),
        ((1, 257, 32), 96, 1, HALF, {}, "1 to 256 tokens, not 257"),
        ((1, 8, 513), 96, 1, HALF, {}, "1 to 512 wide, not 513"),
        ((1, 8, 32), 96, 4, HALF, {}, "16 to 128 wide, not 8"),
        ((1, 197, 32), 384, 1, HALF, {}, "197 tokens of heads 128 wide"),
        ((2, 8, 32), 96, 1, HALF, {"scale": 0.0}, "positive"),
        ((2, 8, 32), 96, 1, HALF, {"mask": torch.zeros(1, 1, 8, 9)}, "mask must have the shape"),
        ((2, 8, 32), 96, 1, HALF, {"mask": torch.zeros(0, 1, 8, 8)}, "mask is empty"),
    ],
)
def test_unsupported(
    shape: tuple[int, ...],
    columns: int,
    heads: int,
    dtype: torch.dtype,
    keywords: dict[str, object],
    reason: str,
    device: torch.device,
) -> None:
    x, weight, bias = (
        torch.zeros(shape, dtype=dtype),
        torch.zeros(shape[-1], columns, dtype=dtype),
        torch.zeros(columns),
    )
    with pytest.raises(UnsupportedError, match=reason):
        layernorm_attention(x.to(device), weight.to(device), bias.to(device), heads, **keywords)  # type: ignore[arg-type]


def test_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "interpreted", lambda: False)
    found = supports(torch.zeros(1, 4, 32, dtype=HALF), *layer(32, 1, 16), 1)
    assert isinstance(found, Unsupported)
    assert "TRITON_INTERPRET" in found.reason
