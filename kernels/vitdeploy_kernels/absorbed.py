"""The last block when only the first tokens are read: products per head, and attention to LayerNorm(x).

The key projection is part of the queries (``u = q @ w_k`` per head), the value projection follows the
pooling, so that no token is ever projected: what remains is one pass over the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitdeploy_kernels.config import Config, choose
from vitdeploy_kernels.gemm import dot, narrow, product, row_statistics, tile_of
from vitdeploy_kernels.launch import Constant, Launch, power_of_two, tiles
from vitdeploy_kernels.layernorm_attention import append
from vitdeploy_kernels.support import (
    Support,
    autocast,
    check_device,
    check_tensor,
    first_reason,
    require,
    rows_of,
)

WIDEST = 2048
"""The most columns of the residual stream: a program holds 16 rows of that many sums."""


@triton.jit(do_not_specialize=["rows"])
def head_linear_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    rows,
    X_STRIDE: tl.constexpr,
    X_HEAD_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    program = tl.program_id(0)
    head = program % HEADS
    i, j = tile_of(program // HEADS, tl.cdiv(rows, BLOCK_M), tl.cdiv(COLUMNS, BLOCK_N), GROUP)
    row = (i * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = j * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = row < rows, column < COLUMNS
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = product(
        acc, x_ptr + head * X_HEAD_STRIDE, row * X_STRIDE, row_mask, weight_ptr + head * (DEPTH * COLUMNS),
        column, column_mask, DEPTH, COLUMNS, BLOCK_K,
    )  # fmt: skip
    out = out_ptr + ((row * HEADS + head) * COLUMNS)[:, None] + column[None, :]
    tl.store(out, narrow(acc, out_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def normalised(x_ptr, token, token_mask, column, mean, rstd, X_STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    """A tile of LayerNorm(x), rounded to x's dtype: (parts, tokens, columns of a part)."""
    at = x_ptr + (token * X_STRIDE)[None, :, None] + column[:, None, :]
    column_mask = (column < WIDTH)[:, None, :]
    x = tl.load(at, mask=token_mask[None, :, None] & column_mask, other=0.0).to(tl.float32)
    # Beyond the columns, too: what is normalised there could overflow, and Inf times zero is NaN.
    x = tl.where(column_mask, (x - mean[None, :, None]) * rstd[None, :, None], 0.0)
    return narrow(x, x_ptr.dtype.element_ty)


@triton.jit
def absorbed_attention_kernel(
    queries_ptr,
    x_ptr,
    stats_ptr,
    out_ptr,
    scale,
    eps,
    X_IMAGE_STRIDE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    STATS_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Blocks of COLUMNS columns, three of 256 for 768: little or nothing of them is padding. Each warp has a
    # part of every block, for all products: otherwise every warp would hold all queries.
    BLOCKS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    SIZE: tl.constexpr = COLUMNS // PARTS
    column = (tl.arange(0, PARTS) * SIZE)[:, None] + tl.arange(0, SIZE)[None, :]
    groups: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    image = (tl.program_id(0) // groups).to(tl.int64)
    row = tl.program_id(0) % groups * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = (row < ROWS)[None, :, None]
    at = ((image * ROWS + row) * WIDTH)[None, :, None] + column[:, None, :]
    q, acc = (), ()
    for i in tl.static_range(BLOCKS):
        inside = row_mask & (column < WIDTH - i * COLUMNS)[:, None, :]
        q = append(q, tl.load(queries_ptr + i * COLUMNS + at, mask=inside, other=0.0))
        acc = append(acc, tl.zeros((PARTS, BLOCK_M, SIZE), tl.float32))
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    x_ptr += image * X_IMAGE_STRIDE
    for start in range(0, TOKENS, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        token_mask = token < TOKENS
        mean, rstd = row_statistics(
            stats_ptr, image * TOKENS + token, token_mask, eps, WIDTH, STATS_STRIDE, TILES, TILES_BLOCK, TILE
        )
        x = ()
        sums = tl.zeros((PARTS, BLOCK_M, BLOCK_N), tl.float32)
        for i in tl.static_range(BLOCKS):
            tile = normalised(x_ptr, token, token_mask, column + i * COLUMNS, mean, rstd, X_STRIDE, WIDTH)
            sums = dot(q[i], tl.permute(tile, (0, 2, 1)), sums)
            x = append(x, tile)
        scores = tl.sum(sums, axis=0) * (scale * 1.4426950408889634)
        scores = tl.where(token_mask[None, :], scores, float("-inf"))
        new = tl.maximum(most, tl.max(scores, axis=1))
        decay = tl.exp2(most - new)
        # The sum is of the weights as rounded, so that they sum to one as they are used.
        p = narrow(tl.exp2(scores - new[:, None]), x_ptr.dtype.element_ty)
        total = total * decay + tl.sum(p.to(tl.float32), axis=1)
        weights = tl.broadcast_to(p[None, :, :], (PARTS, BLOCK_M, BLOCK_N))
        before, acc = acc, ()
        for i in tl.static_range(BLOCKS):
            acc = append(acc, dot(weights, x[i], before[i] * decay[None, :, None]))
        most = new
    for i in tl.static_range(BLOCKS):
        inside = row_mask & (column < WIDTH - i * COLUMNS)[:, None, :]
        pooled = narrow(acc[i] * (1.0 / total)[None, :, None], out_ptr.dtype.element_ty)
        tl.store(out_ptr + i * COLUMNS + at, pooled, mask=inside)


def supports_head_linear(x: Tensor, weight: Tensor) -> Support:
    """Whether the kernel computes this; the shapes are :func:`head_linear`'s."""
    heads, depth = x.shape[-2] if x.dim() > 1 else 0, x.shape[-1]
    return first_reason(
        (
            check_tensor("x", x, (None, None, None)),
            check_tensor("weight", weight, (heads, depth, None), (x.dtype,)),
            check_device(x, weight),
        )
    )


def supports_absorbed_attention(queries: Tensor, x: Tensor, stats: Tensor) -> Support:
    """Whether the kernel computes this; the shapes are :func:`absorbed_attention`'s."""
    images, tokens, width = (*x.shape, 0, 0, 0)[:3]
    return first_reason(
        (
            check_tensor("x", x, (None, None, None)),
            check_tensor("queries", queries, (images, None, width), (x.dtype,)),
            check_tensor("stats", stats, (images * tokens, None, 2), (torch.float32,)),
            None if width <= WIDEST else f"width {width} is more than {WIDEST}",
            None if tokens else "there are no tokens to attend to",
            check_device(queries, x, stats),
        )
    )


def launch_head_linear(x: Tensor, weight: Tensor, out: Tensor, *, config: Config) -> Launch:
    """The launch that writes ``out`` (rows, heads, columns), contiguous; nothing is checked here."""
    (rows, heads, depth), columns = x.shape, weight.shape[2]
    grid = (tiles(rows, config.block_m) * tiles(columns, config.block_n) * heads,)
    arguments: dict[str, Tensor | int | float] = {
        "x_ptr": x,
        "weight_ptr": weight,
        "out_ptr": out,
        "rows": rows,
    }
    constants: dict[str, Constant] = {
        "X_STRIDE": x.stride(0),
        "X_HEAD_STRIDE": x.stride(1),
        "HEADS": heads,
        "DEPTH": depth,
        "COLUMNS": columns,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": config.group,
    }
    return Launch(head_linear_kernel, grid, arguments, constants, config.warps, config.stages)


def column_block(width: int) -> int:
    """The block of columns that pads least, the widest of these; at most ten of them."""
    blocks = [block for block in (256, 128, 64, 32, 16) if tiles(width, block) <= 10]
    return min(blocks, key=lambda block: tiles(width, block) * block)


def launch_absorbed_attention(
    queries: Tensor, x: Tensor, stats: Tensor, out: Tensor, *, scale: float, eps: float, config: Config
) -> Launch:
    """The launch that writes ``out`` (N, R, D), contiguous like the queries; nothing is checked here."""
    (images, length, width), rows, parts = x.shape, queries.shape[1], stats.shape[1]
    columns = column_block(width)
    arguments: dict[str, Tensor | int | float] = {
        "queries_ptr": queries,
        "x_ptr": x,
        "stats_ptr": stats,
        "out_ptr": out,
        "scale": scale,
        "eps": eps,
    }
    constants: dict[str, Constant] = {
        "X_IMAGE_STRIDE": x.stride(0),
        "X_STRIDE": x.stride(1),
        "STATS_STRIDE": stats.stride(0),
        "ROWS": rows,
        "TOKENS": length,
        "WIDTH": width,
        "TILES": parts,
        "TILES_BLOCK": power_of_two(parts),
        "TILE": power_of_two(tiles(width, parts)),
        "COLUMNS": columns,
        "PARTS": min(power_of_two(config.group), columns // 16),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    grid = (images * tiles(rows, config.block_m),)
    return Launch(absorbed_attention_kernel, grid, arguments, constants, config.warps, config.stages)


@torch.library.custom_op("vitdeploy_kernels::head_linear", mutates_args=())
def _head_linear(x: Tensor, weight: Tensor, config: Sequence[int] | None) -> Tensor:
    rows, heads, depth = x.shape
    out = x.new_empty(rows, heads, weight.shape[2])
    chosen = choose("head_linear", (rows, weight.shape[2], depth), x.device, config)
    if out.numel():
        launch_head_linear(x, weight, out, config=chosen).run()
    return out


@_head_linear.register_fake
def _(x: Tensor, weight: Tensor, config: Sequence[int] | None) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], weight.shape[2])


def head_linear(x: Tensor, weight: Tensor, *, config: Config | None = None) -> Tensor:
    """One product per head, ``out[r, h] = x[r, h] @ weight[h]``: the heads are one launch.

    It absorbs the key projection into the queries, and projects pooled tokens to values.

    Args:
        x: (rows, heads, in) float16 or bfloat16; rows and heads may be apart.
        weight: (heads, in, out) in x's dtype.
        config: the tables' choice for (rows, out, in) when omitted.

    Returns:
        (rows, heads, out) in x's dtype, contiguous.

    Error: against float64 on the same inputs, relative error of a row below 1e-3 in float16 and 8e-3 in
    bfloat16: the rounding of the output. Sums are float32.

    Raises:
        UnsupportedError: a shape, dtype or device that the kernel does not take.
    """
    x, weight = autocast(x), autocast(weight)
    require(supports_head_linear(x, weight), "head_linear")
    result: Tensor = _head_linear(rows_of(x), weight.contiguous(), config and config.as_list())
    return result


@torch.library.custom_op("vitdeploy_kernels::absorbed_attention", mutates_args=())
def _absorbed_attention(
    queries: Tensor, x: Tensor, stats: Tensor, scale: float, eps: float, config: Sequence[int] | None
) -> Tensor:
    out = torch.empty_like(queries)
    chosen = choose("absorbed_attention", x.shape, x.device, config)
    if out.numel():
        launch_absorbed_attention(queries, x, stats, out, scale=scale, eps=eps, config=chosen).run()
    return out


@_absorbed_attention.register_fake
def _(
    queries: Tensor, x: Tensor, stats: Tensor, scale: float, eps: float, config: Sequence[int] | None
) -> Tensor:
    return torch.empty_like(queries)


def absorbed_attention(
    queries: Tensor,
    x: Tensor,
    stats: Tensor,
    *,
    scale: float = 1.0,
    eps: float = 1e-6,
    config: Config | None = None,
) -> Tensor:
    """``softmax(scale * queries @ LayerNorm(x)^T) @ LayerNorm(x)``, keys and values in one.

    The attention of a block whose key projection is part of the queries and whose value projection comes
    after. LayerNorm has no gain and shift here (they are part of the projections); it is applied to each
    tile of tokens in float32, as the tile is read. Each token is read once for every 16 rows of queries,
    and the softmax is computed as the tokens come by.

    Args:
        queries: (N, R, D) float16 or bfloat16, R rows for each image: queries times heads.
        x: (N, T, D) in the same dtype, not normalised; images and tokens may be apart.
        stats: (N*T, tiles, 2) float32, the row statistics of x.
        scale: of the scores; 1 where it is part of the queries.
        eps: LayerNorm's.
        config: the tables' choice for (N, T, D) when omitted: block_m rows and block_n tokens; blocks of
            columns are dealt to warps in ``group`` parts, best as many as there are warps.

    Returns:
        (N, R, D) in x's dtype, contiguous.

    Error: against float64 on the same inputs, relative error of a row below 2e-3 in float16 and 1.6e-2 in
    bfloat16: the rounding of the normalised tokens, of the weights and of the output. Statistics, scores and
    sums are float32. NaN or Inf in a token makes its image's rows NaN, and no other image's.

    Raises:
        UnsupportedError: a shape, dtype or device that the kernel does not take.

    Sources: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"
    (https://arxiv.org/abs/1805.02867); the absorbed projections: DeepSeek-AI 2024, "DeepSeek-V2", 2.1.2
    (https://arxiv.org/abs/2405.04434).
    """
    queries, x = autocast(queries), autocast(x)
    require(supports_absorbed_attention(queries, x, stats), "absorbed_attention")
    result: Tensor = _absorbed_attention(
        queries.contiguous(), rows_of(x), stats.contiguous(), scale, eps, config and config.as_list()
    )
    return result
