"""``residual + x @ weight + bias`` as one GEMM, and the row statistics of what it writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitdeploy_kernels.config import Config, choose, statistics_tile
from vitdeploy_kernels.gemm import product, tile_of, write_tile
from vitdeploy_kernels.launch import Constant, Launch, tiles
from vitdeploy_kernels.support import (
    Support,
    autocast,
    check_device,
    check_tensor,
    first_reason,
    require,
    rows_of,
)


@triton.jit(do_not_specialize=["rows"])
def linear_residual_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    stats_ptr,
    rows,
    X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    i, j = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(COLUMNS, BLOCK_N), GROUP)
    row = (i * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = j * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = row < rows, column < COLUMNS
    # A tile of the residual is read by the program that writes it, and before: out may be its memory. The
    # sums start from it: behind the product it would need registers beside them.
    at = residual_ptr + (row * RESIDUAL_STRIDE)[:, None] + column[None, :]
    acc = tl.load(at, mask=row_mask[:, None] & column_mask[None, :], other=0.0).to(tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=column_mask, other=0.0)[None, :]
    acc = product(
        acc, x_ptr, row * X_STRIDE, row_mask, weight_ptr, column, column_mask, DEPTH, COLUMNS, BLOCK_K
    )
    write_tile(acc, None, out_ptr, stats_ptr, i, j, rows, 1, COLUMNS, BLOCK_M, BLOCK_N)


def supports(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Support:
    """Whether the kernel computes this; the shapes are :func:`linear_residual`'s."""
    columns = weight.shape[-1]
    return first_reason(
        (
            check_tensor("x", x, (None, None)),
            check_tensor("weight", weight, (x.shape[-1], None), (x.dtype,)),
            check_tensor("residual", residual, (x.shape[0], columns), (x.dtype,)),
            None if bias is None else check_tensor("bias", bias, (columns,), (torch.float32,)),
            check_device(x, weight, bias, residual),
        )
    )


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    out: Tensor,
    stats: Tensor | None,
    *,
    config: Config,
) -> Launch:
    """The launch that writes ``out`` (rows, columns), contiguous, which may be the residual's own memory.

    ``stats`` (rows, tiles, 2) is contiguous, too, or None: not wanted. Nothing is checked here.
    """
    (rows, depth), columns = x.shape, weight.shape[1]
    grid = (tiles(rows, config.block_m) * tiles(columns, config.block_n),)
    arguments: dict[str, Tensor | int | float] = {
        "x_ptr": x,
        "weight_ptr": weight,
        "residual_ptr": residual,
        "out_ptr": out,
        "rows": rows,
    }
    constants: dict[str, Constant] = {
        "X_STRIDE": x.stride(0),
        "RESIDUAL_STRIDE": residual.stride(0),
        "DEPTH": depth,
        "COLUMNS": columns,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": config.group,
    }
    for name, tensor in (("bias_ptr", bias), ("stats_ptr", stats)):
        if tensor is None:
            constants[name] = None
        else:
            arguments[name] = tensor
    return Launch(linear_residual_kernel, grid, arguments, constants, config.warps, config.stages)


def _tile(weight: Tensor, config: Sequence[int] | None) -> int:
    depth, columns = weight.shape
    return statistics_tile(
        "linear_residual", int(columns), int(depth), weight.device, config and tuple(config)
    )


def _outputs(x: Tensor, weight: Tensor, config: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape[0], weight.shape[1]
    stats = x.new_empty(rows, tiles(columns, _tile(weight, config)), 2, dtype=torch.float32)
    return x.new_empty(rows, columns), stats


@torch.library.custom_op("vitdeploy_kernels::linear_residual", mutates_args=())
def _operator(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    config: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], weight.shape[1], x.shape[1])
    chosen = choose("linear_residual", shape, x.device, config, tile=_tile(weight, config))
    out, stats = _outputs(x, weight, config)
    launch(x, weight, bias, residual, out, stats, config=chosen).run()
    return out, stats


@_operator.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    config: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    return _outputs(x, weight, config)


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """``residual + x @ weight + bias`` and its row statistics, in one kernel.

    Residual and bias are what the GEMM's sums start from, the statistics that the next LayerNorm needs are
    its epilogue; each output is written once and nothing is read back. Products, sums and statistics are
    float32, with one rounding at the end.

    Args:
        x: (rows, depth) float16 or bfloat16; rows may be apart, columns that are apart are copied.
        weight: (depth, columns) in x's dtype.
        bias: (columns) float32, or None.
        residual: (rows, columns) in x's dtype; rows may be apart.
        config: the tables' choice for this shape when omitted; its block_n is the width of a tile of the
            statistics.

    Returns:
        (rows, columns) in x's dtype, contiguous, and the statistics (rows, tiles, 2) float32 of these
        rounded values: the mean of each tile of block_n columns and its sum of squared distances from it.

    Error: against float64 on the same inputs, relative error of a row below 1e-3 in float16 and 8e-3 in
    bfloat16, the rounding of the output. What is too large becomes infinite, NaN stays in its own row. The
    squared distances are exact to 2e-6 of the sum of squares: of rows that are centred, as exact as float32.

    Raises:
        UnsupportedError: a shape, dtype or device that the kernel does not take.

    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks" (https://arxiv.org/abs/1603.05027).
    """
    x, weight, residual = autocast(x), autocast(weight), autocast(residual)
    require(supports(x, weight, bias, residual), "linear_residual")
    out, stats = _operator(
        rows_of(x),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        rows_of(residual),
        config and config.as_list(),
    )
    return out, stats
