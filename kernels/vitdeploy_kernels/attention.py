"""Softmax attention over short sequences in one kernel; the odd tail costs a small tile, not a full one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitdeploy_kernels.config import Config, choose
from vitdeploy_kernels.gemm import dot, narrow
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

TOKENS = 1024
"""The longest sequence."""

WIDTHS = (16, 128)
"""The narrowest and the widest head."""

BIAS_DTYPES = (torch.float32, *DTYPES)

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def load_tile(
    ptr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """ROWS x COLUMNS elements whose rows are STRIDE apart, filled up with zeros."""
    row, column = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS)
    at = ptr + row[:, None] * STRIDE + column[None, :]
    if ROWS == BLOCK_ROWS and COLUMNS == BLOCK_COLUMNS:
        return tl.load(at)
    if COLUMNS == BLOCK_COLUMNS:
        return tl.load(at, mask=(row < ROWS)[:, None], other=0.0)
    return tl.load(at, mask=(row < ROWS)[:, None] & (column < COLUMNS)[None, :], other=0.0)


@triton.jit
def store_tile(
    ptr,
    values,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The first ROWS x COLUMNS of the values, in the dtype of the memory."""
    row, column = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS)
    at = ptr + row[:, None] * STRIDE + column[None, :]
    inside = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    tl.store(at, narrow(values, ptr.dtype.element_ty), mask=inside)


@triton.jit
def softmax_step(
    scores,
    bias_ptr,
    top,
    total,
    scale,
    BIAS_ROW: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Take a tile of products into a running softmax: its weights, the new top and total, and the factor
    for what was summed so far. ``scale`` includes log2(e). A row that has seen only -inf keeps zeros."""
    unit = scale
    if bias_ptr is not None:
        bias = load_tile(bias_ptr, BIAS_ROW, QUERIES, KEYS, BLOCK_M, BLOCK_N)
        scores = scores * scale + bias.to(tl.float32) * LOG2_E
        unit = 1.0
    if KEYS < BLOCK_N:
        scores = tl.where((tl.arange(0, BLOCK_N) < KEYS)[None, :], scores, -float("inf"))
    new = tl.maximum(top, tl.max(scores, axis=1))
    finite = tl.where(new == -float("inf"), 0.0, new)
    weights = tl.exp2(tl.fma(scores, unit, (-finite * unit)[:, None]))
    rescale = tl.exp2((top - finite) * unit)
    return weights, new, total * rescale + tl.sum(weights, axis=1), rescale


@triton.jit
def attend_keys(
    q,
    q_rest,
    k_ptr,
    bias_ptr,
    state,
    scale,
    STRIDE: tl.constexpr,
    BIAS_ROW: tl.constexpr,
    VALUES: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    """One tile of KEYS keys, filled up to BLOCK_N; the values lie VALUES elements behind the keys."""
    top, total, acc, acc_rest = state
    k = load_tile(k_ptr, STRIDE, KEYS, MAIN, BLOCK_N, MAIN)
    scores = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    if REST > 0:
        k_rest = load_tile(k_ptr + MAIN, STRIDE, KEYS, REST, BLOCK_N, REST_BLOCK)
        scores = dot(q_rest, tl.trans(k_rest), scores)
    weights, top, total, rescale = softmax_step(
        scores, bias_ptr, top, total, scale, BIAS_ROW, QUERIES, KEYS, BLOCK_M, BLOCK_N
    )
    v = load_tile(k_ptr + VALUES, STRIDE, KEYS, MAIN, BLOCK_N, MAIN)
    acc = dot(narrow(weights, v.dtype), v, acc * rescale[:, None])
    if REST > 0:
        v_rest = load_tile(k_ptr + VALUES + MAIN, STRIDE, KEYS, REST, BLOCK_N, REST_BLOCK)
        acc_rest = dot(narrow(weights, v.dtype), v_rest, acc_rest * rescale[:, None])
    return top, total, acc, acc_rest


@triton.jit
def attend(
    q_ptr,
    k_ptr,
    bias_ptr,
    out_ptr,
    scale,
    STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    BIAS_ROW: tl.constexpr,
    TOKENS: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    """One tile of QUERIES queries, filled up to BLOCK_M, against all keys of their head."""
    FULL: tl.constexpr = TOKENS // BLOCK_N * BLOCK_N
    q = load_tile(q_ptr, STRIDE, QUERIES, MAIN, BLOCK_M, MAIN)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, MAIN), tl.float32)
    q_rest, acc_rest = q, acc
    if REST > 0:
        q_rest = load_tile(q_ptr + MAIN, STRIDE, QUERIES, REST, BLOCK_M, REST_BLOCK)
        acc_rest = tl.zeros((BLOCK_M, REST_BLOCK), tl.float32)
    state = (top, total, acc, acc_rest)
    for key in range(0, FULL, BLOCK_N):
        state = attend_keys(
            q, q_rest, k_ptr + key * STRIDE, None if bias_ptr is None else bias_ptr + key, state, scale,
            STRIDE, BIAS_ROW, OUT_STRIDE, QUERIES, BLOCK_N, BLOCK_M, BLOCK_N, MAIN, REST, REST_BLOCK,
        )  # fmt: skip
    if TAIL_N > 0:
        state = attend_keys(
            q, q_rest, k_ptr + FULL * STRIDE, None if bias_ptr is None else bias_ptr + FULL, state, scale,
            STRIDE, BIAS_ROW, OUT_STRIDE, QUERIES, TOKENS - FULL, BLOCK_M, TAIL_N, MAIN, REST, REST_BLOCK,
        )  # fmt: skip
    top, total, acc, acc_rest = state
    share = 1.0 / total
    store_tile(out_ptr, acc * share[:, None], OUT_STRIDE, QUERIES, MAIN, BLOCK_M, MAIN)
    if REST > 0:
        store_tile(out_ptr + MAIN, acc_rest * share[:, None], OUT_STRIDE, QUERIES, REST, BLOCK_M, REST_BLOCK)


@triton.jit
def attention_kernel(
    qkv_ptr,
    bias_ptr,
    out_ptr,
    scale,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BIASES: tl.constexpr,
    BIAS_IMAGE: tl.constexpr,
    BIAS_HEAD: tl.constexpr,
    BIAS_ROW: tl.constexpr,
    MAIN: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    TAIL_REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_M: tl.constexpr,
    TAIL_N: tl.constexpr,
):
    OUT_STRIDE: tl.constexpr = HEADS * WIDTH
    STRIDE: tl.constexpr = 3 * OUT_STRIDE
    FULL: tl.constexpr = TOKENS // BLOCK_M
    # The tiles of a head follow each other, so that its keys and values stay in the caches.
    TILES: tl.constexpr = FULL + (TAIL_M > 0)
    tile = tl.program_id(0) % TILES
    head = tl.program_id(0) // TILES % HEADS
    image = tl.program_id(0) // (TILES * HEADS)
    row = image.to(tl.int64) * TOKENS
    first = tile * BLOCK_M
    k_ptr = qkv_ptr + row * STRIDE + OUT_STRIDE + head * WIDTH
    q_ptr = k_ptr - OUT_STRIDE + first * STRIDE
    out_ptr += (row + first) * OUT_STRIDE + head * WIDTH
    if bias_ptr is not None:
        bias_ptr += (image % BIASES).to(tl.int64) * BIAS_IMAGE + head * BIAS_HEAD + first * BIAS_ROW
    if tile < FULL:
        attend(
            q_ptr, k_ptr, bias_ptr, out_ptr, scale, STRIDE, OUT_STRIDE, BIAS_ROW,
            TOKENS, BLOCK_M, BLOCK_M, BLOCK_N, TAIL_N, MAIN, WIDTH - MAIN, REST_BLOCK,
        )  # fmt: skip
    elif TAIL_M > 0:
        attend(
            q_ptr, k_ptr, bias_ptr, out_ptr, scale, STRIDE, OUT_STRIDE, BIAS_ROW,
            TOKENS, TOKENS - FULL * BLOCK_M, TAIL_M, BLOCK_N, TAIL_N, MAIN, WIDTH - MAIN, TAIL_REST,
        )  # fmt: skip


def supports(qkv: Tensor, heads: int, scale: float, bias: Tensor | None = None) -> Support:
    """Whether the kernel computes this; the shapes are :func:`attention`'s."""
    _, length, columns = qkv.shape if qkv.dim() == 3 else (0, 0, 0)
    width, odd = divmod(columns, 3 * max(heads, 1))
    narrowest, widest = WIDTHS
    return first_reason(
        (
            check_tensor("qkv", qkv, (None, None, None)),
            None
            if heads > 0 and not odd
            else f"{columns} columns are not queries, keys, values of {heads} heads",
            None if 1 <= length <= TOKENS else f"sequences have 1 to {TOKENS} tokens, not {length}",
            None if narrowest <= width <= widest else f"heads are {narrowest} to {widest} wide, not {width}",
            None if 0 < scale < math.inf else f"scale must be positive and finite, not {scale}",
            None if bias is None else check_tensor("bias", bias, (None, heads, length, length), BIAS_DTYPES),
            None if bias is None or len(bias) else "bias is empty",
            check_device(qkv, bias),
        )
    )


def _tile(size: int, least: int = 16) -> int:
    """The tile for what is left over; no tile if nothing is."""
    return power_of_two(size, least) if size else 0


def launch(
    qkv: Tensor, out: Tensor, *, heads: int, scale: float, bias: Tensor | None = None, config: Config
) -> Launch:
    """The launch that writes ``out`` (N, T, h d), contiguous; nothing is checked here."""
    count, length, columns = qkv.shape
    width = columns // (3 * heads)
    main = power_of_two(width + 1) // 2
    rest, tail_m, tail_n = width - main, length % config.block_m, length % config.block_n
    grid = (count * heads * tiles(length, config.block_m),)
    strides = (0, 0, 0, 0) if bias is None else bias.stride()
    arguments: dict[str, Tensor | int | float] = {"qkv_ptr": qkv, "out_ptr": out}
    arguments["scale"] = scale * LOG2_E.value
    constants: dict[str, Constant] = {
        "TOKENS": length,
        "HEADS": heads,
        "WIDTH": width,
        "BIASES": 1 if bias is None else len(bias),
        "BIAS_IMAGE": strides[0],
        "BIAS_HEAD": strides[1],
        "BIAS_ROW": strides[2],
        "MAIN": main,
        "REST_BLOCK": _tile(rest),
        # Triton deals a tile that is wider than high to the warps by columns, and would have each of them
        # compute a square one.
        "TAIL_REST": _tile(rest, 32 if tail_m <= 16 else 16),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "TAIL_M": _tile(tail_m),
        "TAIL_N": _tile(tail_n),
    }
    if bias is None:
        constants["bias_ptr"] = None
    else:
        arguments["bias_ptr"] = bias
    return Launch(attention_kernel, grid, arguments, constants, config.warps, config.stages)


@torch.library.custom_op("vitdeploy_kernels::attention", mutates_args=())
def _operator(
    qkv: Tensor, heads: int, scale: float, bias: Tensor | None, config: Sequence[int] | None
) -> Tensor:
    count, length, columns = qkv.shape
    out = qkv.new_empty(count, length, columns // 3)
    chosen = choose("attention", (count * heads, length, columns // (3 * heads)), qkv.device, config)
    if count:
        launch(qkv, out, heads=heads, scale=scale, bias=bias, config=chosen).run()
    return out


@_operator.register_fake
def _(qkv: Tensor, heads: int, scale: float, bias: Tensor | None, config: Sequence[int] | None) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)


def attention(
    qkv: Tensor,
    heads: int,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """``softmax(scale * q @ k^T + bias) @ v`` for every image and head; the scores are never written.

    One program per tile of queries of one head walks over the head's keys and values with a running
    softmax. Keys and queries that are left over from full tiles get a tile of the next power of two (at
    least 16), so that 197 tokens cost 208 rows and columns and not 256; full tiles carry no mask. A head
    whose width is no power of two is cut in two (80 = 64 + 16). Products are float32, weights are rounded
    to qkv's dtype before they meet the values, the softmax and its sums are float32 and use powers of two.

    Args:
        qkv: (N, T, 3 h d) float16 or bfloat16, columns in the order (3, h, d) as one linear layer leaves
            them; T from 1 to 1024, d from 16 to 128. Copied if not contiguous.
        heads: h.
        scale: of the scores, positive; d^-0.5 when omitted.
        bias: (W, h, T, T) float32, float16 or bfloat16, added to the scaled scores; image i has the bias
            i % W (W is 1 for BEiT, the number of windows for Swin). -inf excludes a key. Windows, heads and
            rows may be apart (rows padded to a multiple of 8 load faster) or expanded; columns that are
            apart are copied.
        config: the tables' choice for (N h, T, d) when omitted; block_m queries and block_n keys, at least
            16 each.

    Returns:
        (N, T, h d), contiguous, in qkv's dtype.

    Error: against float64 on the same inputs, relative error of a row below 1e-3 in float16 and 8e-3 in
    bfloat16: the rounding of the weights and of the output. NaN and Inf propagate as in torch; a row whose
    keys are all excluded becomes NaN.

    Raises:
        UnsupportedError: a shape, dtype, device or scale that the kernel does not take.

    Source: Dao et al. 2022, "FlashAttention" (https://arxiv.org/abs/2205.14135); Milakov & Gimelshein 2018,
    "Online normalizer calculation for softmax" (https://arxiv.org/abs/1805.02867).
    """
    if scale is None:
        scale = (max(qkv.shape[-1], 1) / (3 * max(heads, 1))) ** -0.5
    qkv = autocast(qkv)
    require(supports(qkv, heads, scale, bias), "attention")
    result: Tensor = _operator(
        qkv.contiguous(), heads, scale, bias if bias is None else rows_of(bias), config and config.as_list()
    )
    return result
