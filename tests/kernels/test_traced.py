"""Every operator as others take it into their models: exported with a dynamic batch, and under autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import interpreter  # noqa: F401  (before anything imports a kernel)
from vitdeploy_kernels.absorbed import absorbed_attention, head_linear
from vitdeploy_kernels.add_layernorm import add_layernorm, row_statistics
from vitdeploy_kernels.attention import attention
from vitdeploy_kernels.layernorm_attention import layernorm_attention
from vitdeploy_kernels.layernorm_linear import layernorm_linear
from vitdeploy_kernels.linear_residual import linear_residual
from vitdeploy_kernels.patch_embed import patch_embed

WIDTH, TOKENS, HEADS = 32, 5, 2
WIDE = 3 * WIDTH


class Operator(NamedTuple):
    """One of the public functions: ``call`` of the batch's tensors and of the weights, both as named."""

    call: Callable[[Tensor, dict[str, Tensor]], Tensor | tuple[Tensor, ...]]
    example: Callable[[int], Tensor]


def rows(width: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch * TOKENS, width)


def weights() -> dict[str, Tensor]:
    def half(*size: int) -> Tensor:
        return (torch.randn(size) * WIDTH**-0.5).half()

    return {
        "square": half(WIDTH, WIDTH),
        "wide": (wide := half(WIDTH, WIDE)),
        "colsum": wide.float().sum(dim=0),
        "pixels": half(3 * 8 * 8, WIDTH),
        "heads": half(HEADS, WIDTH // HEADS, WIDTH),
        "bias": torch.randn(WIDTH),
        "wide_bias": torch.randn(WIDE),
        "tokens": torch.randn(TOKENS, WIDTH),
    }


OPERATORS = {
    "patch_embed": Operator(
        lambda x, w: patch_embed(x, w["pixels"], w["tokens"], patch=8, prefix=1),
        lambda batch: torch.randn(batch, 3, 16, 16),
    ),
    "layernorm_linear": Operator(
        lambda x, w: layernorm_linear(x, row_statistics(x), w["wide"], w["colsum"], w["wide_bias"]),
        rows(WIDTH),
    ),
    "linear_residual": Operator(lambda x, w: linear_residual(x, w["square"], w["bias"], x), rows(WIDTH)),
    "add_layernorm": Operator(lambda x, w: add_layernorm(x, x, w["bias"]), rows(WIDTH)),
    "row_statistics": Operator(lambda x, w: row_statistics(x), rows(WIDTH)),
    "attention": Operator(lambda x, w: attention(x, HEADS), lambda batch: torch.randn(batch, TOKENS, WIDE)),
    "layernorm_attention": Operator(
        lambda x, w: layernorm_attention(x, w["wide"], w["wide_bias"], HEADS),
        lambda batch: torch.randn(batch, TOKENS, WIDTH),
    ),
    "head_linear": Operator(
        lambda x, w: head_linear(x, w["heads"]), lambda batch: torch.randn(batch, HEADS, WIDTH // HEADS)
    ),
    "absorbed_attention": Operator(
        lambda x, w: absorbed_attention(x[:, :HEADS].contiguous(), x, row_statistics(x.flatten(0, 1))),
        lambda batch: torch.randn(batch, TOKENS, WIDTH),
    ),
}


class Module(nn.Module):
    def __init__(self, operator: Operator, device: torch.device, cast: bool = True) -> None:
        super().__init__()
        self.operator, self.cast = operator, cast
        self.weights = {name: tensor.to(device) for name, tensor in weights().items()}

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        made = self.operator.call(x.half() if self.cast else x, self.weights)
        return made if isinstance(made, tuple) else (made,)


@pytest.mark.parametrize("name", OPERATORS)
def test_export_with_a_dynamic_batch(device: torch.device, name: str) -> None:
    """Traced with 3 images, run with 1 and 7: the same as called, to the bit."""
    torch.manual_seed(0)
    operator = OPERATORS[name]
    module = Module(operator, device)
    images = torch.export.Dim("images", min=1, max=64)
    length = operator.example(1).shape[0]
    dynamic = {0: images if length == 1 else length * images}
    program = torch.export.export(module, (operator.example(3).to(device),), dynamic_shapes=(dynamic,))
    assert f"vitdeploy_kernels.{name}" in program.graph_module.code
    for batch in (1, 7):
        x = operator.example(batch).to(device)
        for traced, called in zip(program.module()(x), module(x), strict=True):
            assert torch.equal(traced, called)


class Block(nn.Module):
    """Operators one behind the other, as in a model: statistics of one are the next one's."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.weights = {name: tensor.to(device) for name, tensor in weights().items()}

    def forward(self, image: Tensor) -> Tensor:
        w = self.weights
        x, stats = patch_embed(image, w["pixels"], w["tokens"], patch=8, prefix=1)
        qkv = layernorm_linear(x.flatten(0, 1), stats, w["wide"], w["colsum"], w["wide_bias"])
        mixed = attention(qkv.unflatten(0, (-1, TOKENS)), HEADS).flatten(0, 1)
        out, stats = linear_residual(mixed, w["square"], w["bias"], x.flatten(0, 1))
        return layernorm_linear(out, stats, w["wide"], w["colsum"], w["wide_bias"], activation="gelu")


def test_export_of_a_block_with_a_dynamic_batch(device: torch.device) -> None:
    torch.manual_seed(0)
    module = Block(device)
    images = torch.export.Dim("images", min=1, max=64)
    example = torch.randn(3, 3, 16, 16, device=device)
    program = torch.export.export(module, (example,), dynamic_shapes=({0: images},))
    for batch in (1, 5):
        image = torch.randn(batch, 3, 16, 16, device=device)
        assert torch.equal(program.module()(image), module(image))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_rounds_operands_and_keeps_what_is_float32(
    device: torch.device, name: str, dtype: torch.dtype
) -> None:
    """In a region of autocast operands may be float32 or of the other half type; biases stay as they are."""
    torch.manual_seed(0)
    operator = OPERATORS[name]
    module = Module(operator, device, cast=False)
    x = operator.example(2).to(device)
    if name == "patch_embed":
        assert x.dtype == torch.float32  # images are; the kernel rounds them
    halves = {key: t.to(dtype) if t.dtype == torch.float16 else t for key, t in module.weights.items()}
    expected = operator.call(x if name == "patch_embed" else x.to(dtype), halves)
    with torch.autocast(device.type, dtype=dtype):
        got = module(x)
    for one, other in zip(got, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
