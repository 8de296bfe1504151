"""``activation(LayerNorm(x) @ weight + bias)`` as one GEMM; the normalised rows are never written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitdeploy_kernels.config import Config, choose
from vitdeploy_kernels.gemm import ACTIVATIONS, activate, late, narrow, product, row_statistics, tile_of
from vitdeploy_kernels.launch import Constant, Launch, power_of_two, tiles
from vitdeploy_kernels.support import (
    DTYPES,
    Support,
    autocast,
    check_device,
    check_tensor,
    first_reason,
    require,
    rows_of,
)


@triton.jit(do_not_specialize=["rows"])
def layernorm_linear_kernel(
    x_ptr,
    stats_ptr,
    weight_ptr,
    colsum_ptr,
    bias_ptr,
    out_ptr,
    rows,
    eps,
    X_STRIDE: tl.constexpr,
    STATS_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    i, j = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(COLUMNS, BLOCK_N), GROUP)
    row = (i * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = j * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = row < rows, column < COLUMNS
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = product(
        acc, x_ptr, row * X_STRIDE, row_mask, weight_ptr, column, column_mask, WIDTH, COLUMNS, BLOCK_K
    )
    # Read here, the statistics keep no copy of the first tiles waiting.
    i, j = late(i), late(j)
    row = (i * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = j * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = row < rows, column < COLUMNS
    mean, rstd = row_statistics(stats_ptr, row, row_mask, eps, WIDTH, STATS_STRIDE, TILES, TILES_BLOCK, TILE)
    # (x - mean) rstd @ w = rstd (x @ w - mean colsum(w)): exact, but it cancels where the mean dwarfs the
    # deviation, which it does not in a centred residual stream.
    colsum = tl.load(colsum_ptr + column, mask=column_mask, other=0.0)
    acc = (acc - mean[:, None] * colsum[None, :]) * rstd[:, None]
    acc += tl.load(bias_ptr + column, mask=column_mask, other=0.0)[None, :]
    acc = activate(acc, ACTIVATION)
    out = out_ptr + (row * COLUMNS)[:, None] + column[None, :]
    tl.store(out, narrow(acc, out_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


def supports(
    x: Tensor, stats: Tensor, weight: Tensor, colsum: Tensor, bias: Tensor, activation: str = "none"
) -> Support:
    """Whether the kernel computes this; the shapes are :func:`layernorm_linear`'s."""
    rows, width, columns = x.shape[0], x.shape[-1], weight.shape[-1]
    known = ", ".join(ACTIVATIONS)
    return first_reason(
        (
            check_tensor("x", x, (None, None)),
            check_tensor("weight", weight, (width, None), (x.dtype,)),
            check_tensor("stats", stats, (rows, None, 2), (torch.float32,)),
            check_tensor("colsum", colsum, (columns,), (torch.float32,)),
            check_tensor("bias", bias, (columns,), (torch.float32,)),
            None if activation in ACTIVATIONS else f"unknown activation {activation!r} (known: {known})",
            check_device(x, stats, weight, colsum, bias),
        )
    )


def launch(
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    colsum: Tensor,
    bias: Tensor,
    out: Tensor,
    *,
    eps: float,
    activation: str = "none",
    config: Config,
) -> Launch:
    """The launch that writes ``out`` (rows, columns), contiguous; nothing is checked here."""
    (rows, width), columns, parts = x.shape, weight.shape[1], stats.shape[1]
    grid = (tiles(rows, config.block_m) * tiles(columns, config.block_n),)
    arguments: dict[str, Tensor | int | float] = {
        "x_ptr": x,
        "stats_ptr": stats,
        "weight_ptr": weight,
        "colsum_ptr": colsum,
        "bias_ptr": bias,
        "out_ptr": out,
        "rows": rows,
        "eps": eps,
    }
    constants: dict[str, Constant] = {
        "X_STRIDE": x.stride(0),
        "STATS_STRIDE": stats.stride(0),
        "WIDTH": width,
        "COLUMNS": columns,
        "TILES": parts,
        "TILES_BLOCK": power_of_two(parts),
        "TILE": power_of_two(tiles(width, parts)),
        "ACTIVATION": activation,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": config.group,
    }
    return Launch(layernorm_linear_kernel, grid, arguments, constants, config.warps, config.stages)


@torch.library.custom_op("vitdeploy_kernels::layernorm_linear", mutates_args=())
def _operator(
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    colsum: Tensor,
    bias: Tensor,
    eps: float,
    activation: str,
    out_dtype: torch.dtype,
    config: Sequence[int] | None,
) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[1], dtype=out_dtype)
    chosen = choose("layernorm_linear", (x.shape[0], weight.shape[1], x.shape[1]), x.device, config)
    launch(x, stats, weight, colsum, bias, out, eps=eps, activation=activation, config=chosen).run()
    return out


@_operator.register_fake
def _(
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    colsum: Tensor,
    bias: Tensor,
    eps: float,
    activation: str,
    out_dtype: torch.dtype,
    config: Sequence[int] | None,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1], dtype=out_dtype)


def layernorm_linear(
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    colsum: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-6,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> Tensor:
    """``activation(LayerNorm(x) @ w + b)`` with LayerNorm folded into the product.

    LayerNorm's gain and shift are part of ``weight``, ``colsum`` and ``bias`` (:func:`fold_layernorm`), its
    mean and deviation are the row statistics that the kernel before has left. What remains is
    ``rstd * (x @ weight - mean * colsum) + bias``: one GEMM whose epilogue is the normalisation, the bias
    and the activation. Products, sums and statistics are float32.

    Args:
        x: (rows, width) float16 or bfloat16, each row's mean at most about 64 deviations from zero, as in a
            model whose residual stream is centred; rows may be apart (a view of the first token of each
            image, say), columns that are apart are copied.
        stats: (rows, tiles, 2) float32, from ``linear_residual``, ``patch_embed`` or ``add_layernorm``.
        weight: (width, columns) in x's dtype.
        colsum: (columns) float32, the column sums of ``weight`` as rounded.
        bias: (columns) float32.
        eps: LayerNorm's.
        activation: none, gelu (with erf, to 1e-6), gelu_tanh, quick_gelu, relu or silu.
        out_dtype: float16, bfloat16 or float32; x's dtype when omitted.
        config: the tables' choice for this shape when omitted.

    Returns:
        (rows, columns), contiguous.

    Error: against float64 on the same rounded inputs, relative error of a row below 1e-3 in float16 and
    8e-3 in bfloat16; that is the rounding of the output. Beyond 64 deviations the subtraction of the mean
    cancels, and the error grows with their number.
    A row with NaN or Inf becomes NaN, as LayerNorm makes it.

    Raises:
        UnsupportedError: a shape, dtype, device or activation that the kernel does not take.

    Source: Ba et al. 2016, "Layer Normalization" (https://arxiv.org/abs/1607.06450).
    """
    x, weight = autocast(x), autocast(weight)
    require(supports(x, stats, weight, colsum, bias, activation), "layernorm_linear")
    result: Tensor = _operator(
        rows_of(x), stats.contiguous(), weight.contiguous(), colsum.contiguous(), bias.contiguous(),
        eps, activation, out_dtype or x.dtype, config and config.as_list(),
    )  # fmt: skip
    return result


class Folded(NamedTuple):
    """A linear layer that has taken in the LayerNorm before it."""

    weight: Tensor
    """(width, columns) in the dtype of the product."""
    colsum: Tensor
    """(columns) float32, of the rounded weight."""
    bias: Tensor
    """(columns) float32."""


def fold_layernorm(
    gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype = DTYPES[0]
) -> Folded:
    """Fold LayerNorm's gain and shift into the linear layer behind it, in float64, and round once.

    Args:
        gain: (width).
        shift: (width).
        weight: (width, columns), input first.
        bias: (columns) or None.
        dtype: of the folded weight.
    """
    exact = weight.double()
    folded = (gain.double()[:, None] * exact).to(dtype)
    offset = shift.double() @ exact
    return Folded(
        folded.contiguous(),
        folded.double().sum(dim=0).float(),
        (offset if bias is None else offset + bias.double()).float(),
    )
