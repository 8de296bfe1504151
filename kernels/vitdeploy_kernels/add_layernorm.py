"""``x + branch + bias`` and LayerNorm of the sum in one pass over memory; also plain row statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitdeploy_kernels.config import Config, choose
from vitdeploy_kernels.gemm import narrow, tile_statistics
from vitdeploy_kernels.launch import Constant, Launch, power_of_two, tiles
from vitdeploy_kernels.support import (
    Support,
    autocast,
    check_device,
    check_tensor,
    first_reason,
    require,
    rows_of,
)

WIDEST = 8192
"""A row is held in registers, and no vision transformer is wider."""


@triton.jit(do_not_specialize=["rows"])
def add_layernorm_kernel(
    x_ptr,
    branch_ptr,
    bias_ptr,
    total_ptr,
    normed_ptr,
    stats_ptr,
    rows,
    eps,
    X_STRIDE: tl.constexpr,
    BRANCH_STRIDE: tl.constexpr,
    TOTAL_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = tl.arange(0, BLOCK_N)
    row_mask, column_mask = row < rows, column < WIDTH
    inside = row_mask[:, None] & column_mask[None, :]
    x = tl.load(x_ptr + (row * X_STRIDE)[:, None] + column[None, :], mask=inside, other=0.0)
    y = x.to(tl.float32)
    if branch_ptr is not None:
        at = branch_ptr + (row * BRANCH_STRIDE)[:, None] + column[None, :]
        y += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=column_mask, other=0.0)[None, :]
    rounded = narrow(y, x.dtype)
    if total_ptr is not None:
        tl.store(total_ptr + (row * TOTAL_STRIDE)[:, None] + column[None, :], rounded, mask=inside)
    y = rounded.to(tl.float32)
    mean, squares = tile_statistics(y, column_mask, WIDTH)
    if stats_ptr is not None:
        tl.store(stats_ptr + 2 * row, mean, mask=row_mask)
        tl.store(stats_ptr + 2 * row + 1, squares, mask=row_mask)
    if normed_ptr is not None:
        rstd = tl.math.rsqrt(squares / WIDTH + eps)
        normed = (y - mean[:, None]) * rstd[:, None]
        at = normed_ptr + (row * WIDTH)[:, None] + column[None, :]
        tl.store(at, narrow(normed, normed_ptr.dtype.element_ty), mask=inside)


def supports(x: Tensor, branch: Tensor | None = None, bias: Tensor | None = None) -> Support:
    """Whether the kernel computes this; the shapes are :func:`add_layernorm`'s, None where there is none."""
    rows, width = x.shape[0], x.shape[-1]
    return first_reason(
        (
            check_tensor("x", x, (None, None)),
            None if width <= WIDEST else f"rows are at most {WIDEST} columns wide, not {width}",
            None if branch is None else check_tensor("branch", branch, (rows, width), (x.dtype,)),
            None if bias is None else check_tensor("bias", bias, (width,), (torch.float32,)),
            check_device(x, branch, bias),
        )
    )


def launch(
    x: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    total: Tensor | None,
    normed: Tensor | None,
    stats: Tensor | None,
    *,
    eps: float,
    config: Config,
) -> Launch:
    """The launch that writes those of total, normed and stats that are not None; nothing is checked here.

    ``total`` (rows, width) has x's dtype and may be x's own memory; ``normed`` (rows, width) and ``stats``
    (rows, 1, 2) are contiguous.
    """
    rows, width = x.shape
    arguments: dict[str, Tensor | int | float] = {"x_ptr": x, "rows": rows, "eps": eps}
    constants: dict[str, Constant] = {
        "X_STRIDE": x.stride(0),
        "BRANCH_STRIDE": 0 if branch is None else branch.stride(0),
        "TOTAL_STRIDE": 0 if total is None else total.stride(0),
        "WIDTH": width,
        "BLOCK_M": config.block_m,
        "BLOCK_N": power_of_two(width),
    }
    optional = {"branch": branch, "bias": bias, "total": total, "normed": normed, "stats": stats}
    for name, tensor in optional.items():
        if tensor is None:
            constants[f"{name}_ptr"] = None
        else:
            arguments[f"{name}_ptr"] = tensor
    grid = (tiles(rows, config.block_m),)
    return Launch(add_layernorm_kernel, grid, arguments, constants, config.warps, config.stages)


@torch.library.custom_op("vitdeploy_kernels::add_layernorm", mutates_args=())
def _operator(
    x: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    eps: float,
    config: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    total, normed = x.new_empty(x.shape), x.new_empty(x.shape)
    chosen = choose("add_layernorm", tuple(x.shape), x.device, config)
    launch(x, branch, bias, total, normed, None, eps=eps, config=chosen).run()
    return total, normed


@_operator.register_fake
def _(
    x: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    eps: float,
    config: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def add_layernorm(
    x: Tensor,
    branch: Tensor | None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """``total = x + branch + bias`` and its LayerNorm, in one pass over memory.

    The companion of a plain GEMM: it adds the residual and normalises, reading and writing every element
    once. LayerNorm has no gain and shift here (they are part of the layer behind it). Sums and statistics are
    float32; the variance is that of the distances from the mean, taken from registers, so that it does not
    cancel. LayerNorm sees the total as rounded, which is what a later kernel reads.

    Args:
        x: (rows, width) float16 or bfloat16, at most 8192 wide; rows may be apart, columns that are apart
            are copied.
        branch: (rows, width) in x's dtype, rows may be apart; or None.
        bias: (width) float32, or None.
        eps: LayerNorm's.
        config: the tables' choice for this shape when omitted; block_m rows are one program's.

    Returns:
        The total and the normalised rows, (rows, width) in x's dtype, contiguous.

    Error: against float64 on the same inputs, relative error of a row below 1e-3 in float16 and 8e-3 in
    bfloat16, one rounding (of the total, LayerNorm is that of the rounded total). What is too large becomes
    infinite; a row whose total has NaN or Inf is normalised to NaN.

    Raises:
        UnsupportedError: a shape, dtype or device that the kernel does not take.

    Source: Ba et al. 2016, "Layer Normalization" (https://arxiv.org/abs/1607.06450).
    """
    x, branch = autocast(x), None if branch is None else autocast(branch)
    require(supports(x, branch, bias), "add_layernorm")
    total, normed = _operator(
        rows_of(x),
        None if branch is None else rows_of(branch),
        None if bias is None else bias.contiguous(),
        eps,
        config and config.as_list(),
    )
    return total, normed


@torch.library.custom_op("vitdeploy_kernels::row_statistics", mutates_args=())
def _statistics(x: Tensor, config: Sequence[int] | None) -> Tensor:
    stats = x.new_empty(x.shape[0], 1, 2, dtype=torch.float32)
    chosen = choose("add_layernorm", tuple(x.shape), x.device, config)
    launch(x, None, None, None, None, stats, eps=0.0, config=chosen).run()
    return stats


@_statistics.register_fake
def _(x: Tensor, config: Sequence[int] | None) -> Tensor:
    return x.new_empty(x.shape[0], 1, 2, dtype=torch.float32)


def row_statistics(x: Tensor, *, config: Config | None = None) -> Tensor:
    """The row statistics that ``layernorm_linear`` takes, of rows that no fused kernel has written.

    Args:
        x: (rows, width) float16 or bfloat16, at most 8192 wide; rows may be apart.
        config: the tables' choice for add_layernorm at this shape when omitted.

    Returns:
        (rows, 1, 2) float32, contiguous: mean and sum of squared distances from it, as one tile.

    Error: float32's, about 1e-6 of the row's largest value.

    Raises:
        UnsupportedError: a shape, dtype or device that the kernel does not take.

    Source: Chan, Golub & LeVeque 1983 (https://doi.org/10.1080/00031305.1983.10483115).
    """
    x = autocast(x)
    require(supports(x), "row_statistics")
    stats: Tensor = _statistics(rows_of(x), config and config.as_list())
    return stats
