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
def late(value):
    """An integer as it is, but for the compiler another one, which it knows only where this is called.

    What is computed from it stays behind the product, which then has these registers for itself; and ptxas
    lets products of sm_90 overlap only if no comparison stands between the last and the wait for it.
    """
    if INTERPRETED:
        return value
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], tl.int32, is_pure=False, pack=1)


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
def halves(acc):
    """The left and the right half of a tile's columns."""
    parts = tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2))
    return tl.split(tl.permute(parts, (0, 2, 1)))


@triton.jit
def write_columns(acc, add_ptr, add_rows, out_ptr, row, row_mask, start, COLUMNS: tl.constexpr):
    """:func:`write_tile` for columns from ``start``: their sum, and the sum of their squares."""
    column = start + tl.arange(0, acc.shape[1])
    inside = row_mask[:, None] & (column < COLUMNS)[None, :]
    if add_ptr is not None:
        acc += tl.load(add_ptr + add_rows[:, None] + column[None, :], mask=inside, other=0.0)
    rounded = narrow(acc, out_ptr.dtype.element_ty)
    tl.store(out_ptr + (row * COLUMNS)[:, None] + column[None, :], rounded, mask=inside)
    values = rounded.to(tl.float32)
    return tl.sum(values, axis=1), tl.sum(values * values, axis=1)


@triton.jit
def write_parts(acc, add_ptr, add_rows, out_ptr, row, row_mask, start, COLUMNS: tl.constexpr):
    """:func:`write_columns`, in two parts if there are more than PART and something is added."""
    if add_ptr is not None and acc.shape[1] > PART:
        left, right = halves(acc)
        total, squares = write_columns(left, add_ptr, add_rows, out_ptr, row, row_mask, start, COLUMNS)
        start += left.shape[1]
        total2, squares2 = write_columns(right, add_ptr, add_rows, out_ptr, row, row_mask, start, COLUMNS)
        total, squares = total + total2, squares + squares2
    else:
        total, squares = write_columns(acc, add_ptr, add_rows, out_ptr, row, row_mask, start, COLUMNS)
    return total, squares


@triton.jit
def write_tile(
    acc,
    add_ptr,
    out_ptr,
    stats_ptr,
    i,
    j,
    rows,
    PERIOD: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write a tile, rounded, and the statistics of what was written, unless stats is None.

    The tile in row i and column j of tiles; zero in columns that are not there. The rows of out are
    contiguous. Row r of ``add`` (PERIOD, COLUMNS) float32, or None, is added to rows r, r + PERIOD and so
    on: part by part in a wide tile, since all of it would not fit into registers beside the sums.

    Sums and sums of squares are taken in one pass, as the accumulator lies in registers. The squared
    distances from the mean are a difference, which cancels where the mean dwarfs the deviation; in a
    centred residual stream it does not.
    """
    i, j = late(i), late(j)
    row = i * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < rows
    add_rows = row % PERIOD * COLUMNS
    row = row.to(tl.int64)
    start = j * BLOCK_N
    if add_ptr is not None and BLOCK_N > 2 * PART:
        left, right = halves(acc)
        total, squares = write_parts(left, add_ptr, add_rows, out_ptr, row, row_mask, start, COLUMNS)
        start += BLOCK_N // 2
        total2, squares2 = write_parts(right, add_ptr, add_rows, out_ptr, row, row_mask, start, COLUMNS)
        total, squares = total + total2, squares + squares2
    else:
        total, squares = write_parts(acc, add_ptr, add_rows, out_ptr, row, row_mask, start, COLUMNS)
    if stats_ptr is not None:
        mean = total / tl.minimum(COLUMNS - j * BLOCK_N, BLOCK_N)
        squares -= total * mean
        at = stats_ptr + (row * tl.cdiv(COLUMNS, BLOCK_N) + j) * 2
        tl.store(at, mean, mask=row_mask)
        # What is left is not negative but for rounding; NaN stays NaN.
        tl.store(at + 1, tl.where(squares < 0, 0.0, squares), mask=row_mask)


@triton.jit
def product(
    acc,
    a_ptr,
    a_rows,
    row_mask,
    w_ptr,
    column,
    column_mask,
    DEPTH: tl.constexpr,
    W_STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``acc + a @ w`` of one tile in float32.

    ``a_rows`` are the rows' offsets in elements (int64); w is (DEPTH, columns) with row stride W_STRIDE.
    """
    depth = tl.arange(0, BLOCK_K)
    a_at = a_ptr + a_rows[:, None] + depth[None, :]
    w_at = w_ptr + depth[:, None] * W_STRIDE + column[None, :]
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
def normal_tail(x):
    """1 - Φ(x), Φ the normal distribution function, for x >= 0; times x, exact to 6e-7.

    Two to the power of a polynomial that falls for ever: one exponential, no quotient, no branches. Its
    coefficients are those whose largest error times max(x, 0.3) is the least, found by reweighted least
    squares (Lawson 1961).
    """
    power = -0.0004876073 * x + 0.007194246
    power = power * x - 0.052131355
    power = power * x - 0.4596204
    power = power * x - 1.1509821
    power = power * x - 1.0000051
    return tl.exp2(power)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """An activation in float32; infinities and NaN go through as they do in torch."""
    if ACTIVATION == "gelu":
        # x Φ(x) in a form that leaves infinities and NaN what they are in torch.
        x = tl.abs(x) * (0.5 - normal_tail(tl.abs(x))) + 0.5 * x
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
