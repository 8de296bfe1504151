"""What the GEMM-like kernels share: the order of tiles, the product of a tile, row statistics, activations.

Device functions only. Row statistics travel between kernels as (rows, tiles, 2) float32: each tile of
columns has its own mean and its sum of squared distances from that mean, which combine without
cancellation (Chan, Golub & LeVeque 1983, https://doi.org/10.1080/00031305.1983.10483115).
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether Triton's interpreter runs these functions; decided when the package is imported."""

PART = tl.constexpr(64)
"""Columns that an epilogue with a second matrix finishes at a time."""

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "relu", "silu")


@triton.jit
def dot(a, b, acc):
    """``a @ b + acc`` with float32 products and sums; the interpreter multiplies bfloat16 as bit patterns."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 rounded to nearest even, as a GPU does; the interpreter would cut bfloat16 off."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, up, bits).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def tile_of(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of a program's tile; GROUP rows of tiles together, so that weights stay in L2."""
    per_group = GROUP * column_tiles
    first = (program // per_group) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    inside = program % per_group
    return first + inside % size, inside // size


@triton.jit
def row_statistics(
    stats_ptr,
    row,
    row_mask,
    eps,
    WIDTH: tl.constexpr,
    STATS_STRIDE: tl.constexpr,
    TILES: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Mean and reciprocal standard deviation of rows, from the statistics of their tiles."""
    tile = tl.arange(0, TILES_BLOCK)
    inside = row_mask[:, None] & (tile < TILES)[None, :]
    at = stats_ptr + (row * STATS_STRIDE)[:, None] + 2 * tile[None, :]
    means = tl.load(at, mask=inside, other=0.0)
    squares = tl.load(at + 1, mask=inside, other=0.0)
    counts = tl.maximum(tl.minimum(WIDTH - tile * TILE, TILE), 0).to(tl.float32)[None, :]
    mean = tl.sum(means * counts, axis=1) / WIDTH
    away = means - mean[:, None]
    variance = tl.sum(squares + counts * away * away, axis=1) / WIDTH
    return mean, tl.math.rsqrt(variance + eps)


@triton.jit
def tile_statistics(values, column_mask, count):
    """Mean of a tile's rows and their squared distances from it.

    ``values`` are float32, those of ``count`` columns, and zero outside of the mask.
    """
    mean = tl.sum(values, axis=1) / count
    away = tl.where(column_mask[None, :], values - mean[:, None], 0.0)
    return mean, tl.sum(away * away, axis=1)


@triton.jit
def combined(mean, squares, count, mean2, squares2, count2):
    """Statistics of two sets of columns together; the second may be empty."""
    both = count + count2
    share = count2.to(tl.float32) / tl.maximum(both, 1)
    away = mean2 - mean
    return mean + away * share, squares + squares2 + away * away * (share * count), both


@triton.jit
def halves(acc):
    """The left and the right half of a tile's columns."""
    parts = tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2))
    return tl.split(tl.permute(parts, (0, 2, 1)))


@triton.jit
def write_columns(acc, bias_ptr, add_ptr, add_rows, out_ptr, row, row_mask, start, COLUMNS: tl.constexpr):
    """:func:`write_tile` for columns from ``start``: mean, squares and count of what was written."""
    column = start + tl.arange(0, acc.shape[1])
    column_mask = column < COLUMNS
    inside = row_mask[:, None] & column_mask[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=column_mask, other=0.0)[None, :]
    acc += tl.load(add_ptr + add_rows[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    rounded = narrow(acc, out_ptr.dtype.element_ty)
    tl.store(out_ptr + (row * COLUMNS)[:, None] + column[None, :], rounded, mask=inside)
    count = tl.maximum(tl.minimum(COLUMNS - start, acc.shape[1]), 0)
    mean, squares = tile_statistics(rounded.to(tl.float32), column_mask, tl.maximum(count, 1))
    return mean, squares, count


@triton.jit
def write_parts(acc, bias_ptr, add_ptr, add_rows, out_ptr, row, row_mask, start, COLUMNS: tl.constexpr):
    """:func:`write_columns`, in two parts if there are more than PART."""
    if acc.shape[1] > PART:
        left, right = halves(acc)
        mean, squares, count = write_columns(
            left, bias_ptr, add_ptr, add_rows, out_ptr, row, row_mask, start, COLUMNS
        )
        start += left.shape[1]
        mean2, squares2, count2 = write_columns(
            right, bias_ptr, add_ptr, add_rows, out_ptr, row, row_mask, start, COLUMNS
        )
        mean, squares, count = combined(mean, squares, count, mean2, squares2, count2)
    else:
        mean, squares, count = write_columns(
            acc, bias_ptr, add_ptr, add_rows, out_ptr, row, row_mask, start, COLUMNS
        )
    return mean, squares, count


@triton.jit
def write_tile(
    acc,
    bias_ptr,
    add_ptr,
    add_rows,
    out_ptr,
    stats_ptr,
    row,
    row_mask,
    j,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write ``acc + bias + add``, rounded, and the statistics of what was written.

    The j-th tile of columns; bias and stats may be None. ``add_rows`` are the offsets, in elements,
    of the rows that are added; the rows of out are contiguous. A wide tile is finished part by part: all
    that is added would not fit into registers beside it.
    """
    start = j * BLOCK_N
    if BLOCK_N > 2 * PART:
        left, right = halves(acc)
        mean, squares, count = write_parts(
            left, bias_ptr, add_ptr, add_rows, out_ptr, row, row_mask, start, COLUMNS
        )
        start += BLOCK_N // 2
        mean2, squares2, count2 = write_parts(
            right, bias_ptr, add_ptr, add_rows, out_ptr, row, row_mask, start, COLUMNS
        )
        mean, squares, count = combined(mean, squares, count, mean2, squares2, count2)
    else:
        mean, squares, count = write_parts(
            acc, bias_ptr, add_ptr, add_rows, out_ptr, row, row_mask, start, COLUMNS
        )
    if stats_ptr is not None:
        at = stats_ptr + (row * tl.cdiv(COLUMNS, BLOCK_N) + j) * 2
        tl.store(at, mean, mask=row_mask)
        tl.store(at + 1, squares, mask=row_mask)


@triton.jit
def product(
    a_ptr,
    a_rows,
    row_mask,
    w_ptr,
    column,
    column_mask,
    DEPTH: tl.constexpr,
    W_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``a @ w`` of one tile in float32.

    ``a_rows`` are the rows' offsets in elements (int64); w is (DEPTH, columns) with row stride W_STRIDE.
    """
    depth = tl.arange(0, BLOCK_K)
    a_at = a_ptr + a_rows[:, None] + depth[None, :]
    w_at = w_ptr + depth[:, None] * W_STRIDE + column[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, DEPTH, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            a = tl.load(a_at, mask=row_mask[:, None], other=0.0)
            w = tl.load(w_at, mask=column_mask[None, :], other=0.0)
        else:
            inside = depth < DEPTH - k
            a = tl.load(a_at, mask=row_mask[:, None] & inside[None, :], other=0.0)
            w = tl.load(w_at, mask=column_mask[None, :] & inside[:, None], other=0.0)
        acc = dot(a, w, acc)
        a_at += BLOCK_K
        w_at += BLOCK_K * W_STRIDE
    return acc


@triton.jit
def erf_tail(x):
    """1 - erf(x) for x >= 0 to 1.5e-7 (Abramowitz & Stegun 1964, 7.1.26): one exponential, no branches."""
    t = 1.0 / (1.0 + 0.3275911 * x)
    poly = 1.061405429 * t - 1.453152027
    poly = poly * t + 1.421413741
    poly = poly * t - 0.284496736
    poly = poly * t + 0.254829592
    return poly * t * tl.exp(-x * x)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """An activation in float32; infinities and NaN go through as they do in torch."""
    if ACTIVATION == "gelu":
        tail = 0.5 * erf_tail(tl.abs(x) * 0.7071067811865476)
        x = x * tl.where(x >= 0, 1.0 - tail, tail)
    elif ACTIVATION == "gelu_tanh":
        # tanh(u) = 2 sigmoid(2 u) - 1
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    elif ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    return x
