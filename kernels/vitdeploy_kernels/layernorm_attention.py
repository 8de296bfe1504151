"""LayerNorm, queries, keys, values and attention in one kernel, for small widths and Swin's windows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitdeploy_kernels.attention import LOG2_E, WIDTHS, softmax_step, store_tile
from vitdeploy_kernels.config import Config, choose
from vitdeploy_kernels.gemm import dot, narrow
from vitdeploy_kernels.launch import Constant, Launch, power_of_two
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

WIDTH = 512
"""The widest rows: every head's program reads all columns of its image."""

TOKENS = 256
"""The longest sequence."""

ON_CHIP = TOKENS * 64
"""The most tokens times columns of a head: its keys and values stay in the registers of one program."""

MASK_DTYPES = (torch.float32, *DTYPES)


@triton.jit
def append(values, value):
    """A tuple with one more value."""
    return values + (value,)  # noqa: RUF005


@triton.jit
def load_columns(
    ptr,
    start,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Columns from ``start`` on of ROWS x COLUMNS elements, as float32, and which of them are inside."""
    row, column = tl.arange(0, BLOCK_M), start + tl.arange(0, BLOCK_K)
    inside = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    x = tl.load(ptr + row[:, None] * STRIDE + column[None, :], mask=inside, other=0.0)
    return x.to(tl.float32), inside


@triton.jit
def row_moments(
    x_ptr, eps, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Mean and reciprocal standard deviation of rows, in two passes: nothing cancels."""
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        x, _ = load_columns(x_ptr, start, WIDTH, ROWS, WIDTH, BLOCK_M, BLOCK_K)
        total += tl.sum(x, axis=1)
    mean = total / WIDTH
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        x, inside = load_columns(x_ptr, start, WIDTH, ROWS, WIDTH, BLOCK_M, BLOCK_K)
        away = tl.where(inside, x - mean[:, None], 0.0)
        total += tl.sum(away * away, axis=1)
    return mean, tl.math.rsqrt(total / WIDTH + eps)


@triton.jit
def project(
    x_ptr,
    weight_ptr,
    bias_ptr,
    eps,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The parts FIRST to LAST - 1 of a head's queries, keys, values for ROWS rows, PART columns apart."""
    mean, rstd = row_moments(x_ptr, eps, WIDTH, ROWS, BLOCK_M, BLOCK_K)
    depth, column = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    at = weight_ptr + FIRST * PART + depth[:, None] * (3 * PART) + column[None, :]
    sums = ()
    for _part in tl.static_range(FIRST, LAST):
        sums = append(sums, tl.zeros((BLOCK_M, BLOCK_D), tl.float32))
    for start in range(0, WIDTH, BLOCK_K):
        x, inside = load_columns(x_ptr, start, WIDTH, ROWS, WIDTH, BLOCK_M, BLOCK_K)
        # What lies outside must be zero here too: normalised, it could overflow, and Inf times zero is NaN.
        x = narrow(tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0), weight_ptr.dtype.element_ty)
        inside = (depth < WIDTH - start)[:, None] & (column < HEAD)[None, :]
        previous, sums = sums, ()
        for i in tl.static_range(LAST - FIRST):
            w = tl.load(at + i * PART, mask=inside, other=0.0)
            sums = append(sums, dot(x, w, previous[i]))
        at += BLOCK_K * 3 * PART
    parts = ()
    for i in tl.static_range(LAST - FIRST):
        bias = tl.load(bias_ptr + (FIRST + i) * PART + column, mask=column < HEAD, other=0.0)
        parts = append(parts, narrow(sums[i] + bias[None, :], weight_ptr.dtype.element_ty))
    return parts


@triton.jit
def attend_tile(
    q,
    keys,
    values,
    mask_ptr,
    out_ptr,
    scale,
    MASK_ROW: tl.constexpr,
    TOKENS: tl.constexpr,
    QUERIES: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Attend with a tile of queries to all keys: tiles of BLOCK tokens, and a smaller last one."""
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for j in tl.static_range(len(keys)):
        scores = dot(q, tl.trans(keys[j]), tl.zeros((BLOCK_M, keys[j].shape[0]), tl.float32))
        weights, top, total, rescale = softmax_step(
            scores, None if mask_ptr is None else mask_ptr + j * BLOCK, top, total, scale,
            MASK_ROW, QUERIES, min(TOKENS - j * BLOCK, BLOCK), BLOCK_M, keys[j].shape[0],
        )  # fmt: skip
        acc = dot(narrow(weights, q.dtype), values[j], acc * rescale[:, None])
    store_tile(out_ptr, acc * (1.0 / total)[:, None], STRIDE, QUERIES, HEAD, BLOCK_M, BLOCK_D)


@triton.jit
def layernorm_attention_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mask_ptr,
    out_ptr,
    scale,
    eps,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    MASKS: tl.constexpr,
    MASK_IMAGE: tl.constexpr,
    MASK_HEAD: tl.constexpr,
    MASK_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    STRIDE: tl.constexpr = HEADS * HEAD
    # The heads of an image follow each other, so that its rows stay in the caches.
    head = tl.program_id(0) % HEADS
    image = (tl.program_id(0) // HEADS).to(tl.int64)
    x_ptr += image * (TOKENS * WIDTH)
    weight_ptr += head * HEAD
    bias_ptr += head * HEAD
    out_ptr += image * (TOKENS * STRIDE) + head * HEAD
    if mask_ptr is not None:
        mask_ptr += image % MASKS * MASK_IMAGE + head * MASK_HEAD
    FULL: tl.constexpr = TOKENS // BLOCK
    LEFT: tl.constexpr = TOKENS - FULL * BLOCK
    if FULL + (TAIL > 0) == 1:
        q, k, v = project(
            x_ptr, weight_ptr, bias_ptr, eps,
            WIDTH, STRIDE, HEAD, TOKENS, 0, 3, TAIL if TAIL > 0 else BLOCK, BLOCK_D, BLOCK_K,
        )  # fmt: skip
        attend_tile(
            q, (k,), (v,), mask_ptr, out_ptr, scale,
            MASK_ROW, TOKENS, TOKENS, STRIDE, HEAD, TAIL if TAIL > 0 else BLOCK, BLOCK_D, BLOCK,
        )  # fmt: skip
    else:
        keys, values = (), ()
        for i in tl.static_range(FULL + (TAIL > 0)):
            k, v = project(
                x_ptr + i * BLOCK * WIDTH, weight_ptr, bias_ptr, eps, WIDTH, STRIDE, HEAD,
                BLOCK if i < FULL else LEFT, 1, 3, BLOCK if i < FULL else TAIL, BLOCK_D, BLOCK_K,
            )  # fmt: skip
            keys, values = append(keys, k), append(values, v)
        for i in range(FULL):
            (q,) = project(
                x_ptr + i * BLOCK * WIDTH, weight_ptr, bias_ptr, eps,
                WIDTH, STRIDE, HEAD, BLOCK, 0, 1, BLOCK, BLOCK_D, BLOCK_K,
            )  # fmt: skip
            attend_tile(
                q, keys, values, None if mask_ptr is None else mask_ptr + i * BLOCK * MASK_ROW,
                out_ptr + i * BLOCK * STRIDE, scale,
                MASK_ROW, TOKENS, BLOCK, STRIDE, HEAD, BLOCK, BLOCK_D, BLOCK,
            )  # fmt: skip
        if TAIL > 0:
            (q,) = project(
                x_ptr + FULL * BLOCK * WIDTH, weight_ptr, bias_ptr, eps,
                WIDTH, STRIDE, HEAD, LEFT, 0, 1, TAIL, BLOCK_D, BLOCK_K,
            )  # fmt: skip
            attend_tile(
                q, keys, values, None if mask_ptr is None else mask_ptr + FULL * BLOCK * MASK_ROW,
                out_ptr + FULL * BLOCK * STRIDE, scale,
                MASK_ROW, TOKENS, LEFT, STRIDE, HEAD, TAIL, BLOCK_D, BLOCK,
            )  # fmt: skip


def supports(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    heads: int,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> Support:
    """Whether the kernel computes this; the shapes are :func:`layernorm_attention`'s."""
    _, length, width = x.shape if x.dim() == 3 else (0, 0, 0)
    columns = weight.shape[-1]
    head, odd = divmod(columns, 3 * max(heads, 1))
    narrowest, widest = WIDTHS
    return first_reason(
        (
            check_tensor("x", x, (None, None, None)),
            check_tensor("weight", weight, (width, None), (x.dtype,)),
            check_tensor("bias", bias, (columns,), (torch.float32,)),
            None
            if heads > 0 and not odd
            else f"{columns} columns are not queries, keys, values of {heads} heads",
            None if 1 <= length <= TOKENS else f"sequences have 1 to {TOKENS} tokens, not {length}",
            None if 1 <= width <= WIDTH else f"rows are 1 to {WIDTH} wide, not {width}",
            None if narrowest <= head <= widest else f"heads are {narrowest} to {widest} wide, not {head}",
            None
            if length * head <= ON_CHIP
            else f"{length} tokens of heads {head} wide do not fit one program",
            None if 0 < scale < math.inf else f"scale must be positive and finite, not {scale}",
            None if mask is None else check_tensor("mask", mask, (None, heads, length, length), MASK_DTYPES),
            None if mask is None or len(mask) else "mask is empty",
            check_device(x, weight, bias, mask),
        )
    )


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    *,
    heads: int,
    scale: float,
    eps: float,
    mask: Tensor | None = None,
    config: Config,
) -> Launch:
    """The launch that writes ``out`` (N, T, h d), contiguous; nothing is checked here."""
    count, length, width = x.shape
    head = weight.shape[1] // (3 * heads)
    left = length % config.block_m
    strides = (0, 0, 0, 0) if mask is None else mask.stride()
    arguments: dict[str, Tensor | int | float] = {
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "out_ptr": out,
        "scale": scale * LOG2_E.value,
        "eps": eps,
    }
    constants: dict[str, Constant] = {
        "TOKENS": length,
        "WIDTH": width,
        "HEADS": heads,
        "HEAD": head,
        "MASKS": 1 if mask is None else len(mask),
        "MASK_IMAGE": strides[0],
        "MASK_HEAD": strides[1],
        "MASK_ROW": strides[2],
        "BLOCK": config.block_m,
        "TAIL": power_of_two(left, 16) if left else 0,
        "BLOCK_D": power_of_two(head, 16),
        "BLOCK_K": config.block_k,
    }
    if mask is None:
        constants["mask_ptr"] = None
    else:
        arguments["mask_ptr"] = mask
    grid = (count * heads,)
    return Launch(layernorm_attention_kernel, grid, arguments, constants, config.warps, config.stages)


@torch.library.custom_op("vitdeploy_kernels::layernorm_attention", mutates_args=())
def _operator(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    heads: int,
    scale: float,
    eps: float,
    mask: Tensor | None,
    config: Sequence[int] | None,
) -> Tensor:
    count, length, width = x.shape
    out = x.new_empty(count, length, weight.shape[1] // 3)
    chosen = choose("layernorm_attention", (count * heads, length, width), x.device, config)
    if count:
        launch(x, weight, bias, out, heads=heads, scale=scale, eps=eps, mask=mask, config=chosen).run()
    return out


@_operator.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    heads: int,
    scale: float,
    eps: float,
    mask: Tensor | None,
    config: Sequence[int] | None,
) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], weight.shape[1] // 3)


def layernorm_attention(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    heads: int,
    *,
    scale: float | None = None,
    eps: float = 1e-6,
    mask: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Attention of ``normalise(x) @ weight + bias`` for every image and head; only the result is written.

    One program per head of an image: it computes the row statistics in two passes, projects the normalised
    rows to the head's queries, keys and values tile by tile, keeps them on the chip, and lets each tile of
    queries attend to all keys with a running softmax. LayerNorm's gain and shift are already in ``weight``
    and ``bias`` (:func:`vitdeploy_kernels.layernorm_linear.fold_layernorm`). Statistics, products and sums
    are float32; normalised rows, queries, keys, values and softmax weights are rounded to x's dtype.

    Args:
        x: (N, T, D) float16 or bfloat16, images or Swin's windows; T up to 256, D up to 512.
        weight: (D, 3 h d) in x's dtype, columns in the order (3, h, d); d from 16 to 128.
        bias: (3 h d) float32.
        heads: h.
        scale: of the scores, positive; d^-0.5 when omitted.
        eps: LayerNorm's.
        mask: (W, h, T, T) float32, float16 or bfloat16, added to the scaled scores; image i has the mask
            i % W. -inf excludes a key. Its columns are copied if they are apart.
        config: the tables' choice for (N h, T, D) when omitted; block_m tokens at a time and block_k of
            x's columns, at least 16 each.

    Returns:
        (N, T, h d), contiguous, in x's dtype.

    Error: against float64 on the same inputs, relative error of a row below 3e-3 in float16 and 1.6e-2 in
    bfloat16, from the five roundings named above. A row with NaN or Inf makes its image NaN, as in torch.

    Raises:
        UnsupportedError: a shape, dtype, device or scale that the kernel does not take.

    Source: Ba et al. 2016, "Layer Normalization" (https://arxiv.org/abs/1607.06450); Dao et al. 2022,
    "FlashAttention" (https://arxiv.org/abs/2205.14135).
    """
    if scale is None:
        scale = (max(weight.shape[-1], 1) / (3 * max(heads, 1))) ** -0.5
    x, weight = autocast(x), autocast(weight)
    require(supports(x, weight, bias, heads, mask, scale), "layernorm_attention")
    result: Tensor = _operator(
        x.contiguous(), weight.contiguous(), bias.contiguous(), heads, scale, eps,
        mask if mask is None else rows_of(mask), config and config.as_list(),
    )  # fmt: skip
    return result
