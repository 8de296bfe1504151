"""An image's patches times the projection, plus position embeddings and class tokens, as one GEMM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitdeploy_kernels.config import Config, choose, statistics_tile
from vitdeploy_kernels.gemm import dot, narrow, tile_of, write_tile
from vitdeploy_kernels.launch import Constant, Launch, tiles
from vitdeploy_kernels.support import (
    DTYPES,
    Support,
    autocast,
    check_device,
    check_tensor,
    first_reason,
    require,
)

IMAGES = (torch.float32, *DTYPES)
"""What an (N, C, H, W) image may be; (N, H, W, C) is uint8."""


@triton.jit
def patch_offset(
    k,
    NHWC: tl.constexpr,
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Where elements of a patch lie behind its first one.

    Quotients and remainders of constants: the compiler sees runs of as many contiguous elements as the
    largest power of two in PATCH * CHANNELS (or PATCH), and loads them together.
    """
    if NHWC:
        RUN: tl.constexpr = PATCH * CHANNELS
        return k // RUN * (WIDTH * CHANNELS) + k % RUN
    return k // (PATCH * PATCH) * (HEIGHT * WIDTH) + k // PATCH % PATCH * WIDTH + k % PATCH


@triton.jit(do_not_specialize=["rows"])
def patch_embed_kernel(
    image_ptr,
    weight_ptr,
    tokens_ptr,
    out_ptr,
    stats_ptr,
    rows,
    scale,
    NHWC: tl.constexpr,
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PREFIX: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    ACROSS: tl.constexpr = WIDTH // PATCH
    TOKENS: tl.constexpr = PREFIX + HEIGHT // PATCH * ACROSS
    DEPTH: tl.constexpr = PATCH * PATCH * CHANNELS
    BESIDE: tl.constexpr = CHANNELS if NHWC else 1
    i, j = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(COLUMNS, BLOCK_N), GROUP)
    row = i * BLOCK_M + tl.arange(0, BLOCK_M)
    column = j * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = row < rows, column < COLUMNS
    token = row % TOKENS
    patch = token - PREFIX
    has_patch = (row_mask & (patch >= 0))[:, None]
    corner = (row // TOKENS).to(tl.int64) * (CHANNELS * HEIGHT * WIDTH)
    corner += (patch // ACROSS * WIDTH + patch % ACROSS) * (PATCH * BESIDE)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, DEPTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        offset = patch_offset(k, NHWC, PATCH, CHANNELS, HEIGHT, WIDTH)
        a_at = image_ptr + corner[:, None] + offset[None, :]
        w_at = weight_ptr + k[:, None] * COLUMNS + column[None, :]
        if DEPTH % BLOCK_K == 0:
            a_mask, w_mask = has_patch, column_mask[None, :]
        else:
            a_mask, w_mask = has_patch & (k < DEPTH)[None, :], column_mask[None, :] & (k < DEPTH)[:, None]
        w = tl.load(w_at, mask=w_mask, other=0.0)
        if NHWC:
            a = (tl.load(a_at, mask=a_mask, other=128).to(tl.float16) - 128).to(w.dtype)
        else:
            a = narrow(tl.load(a_at, mask=a_mask, other=0.0).to(tl.float32), w.dtype)
        acc = dot(a, w, acc)
    write_tile(acc * scale, tokens_ptr, out_ptr, stats_ptr, i, j, rows, TOKENS, COLUMNS, BLOCK_M, BLOCK_N)


def sides(image: Tensor) -> tuple[int, int, int]:
    """Channels, height and width of images: (N, H, W, C) if uint8, else (N, C, H, W)."""
    if image.dtype == torch.uint8:
        _, height, width, channels = image.shape
    else:
        _, channels, height, width = image.shape
    return channels, height, width


def supports(image: Tensor, weight: Tensor, tokens: Tensor, *, patch: int, prefix: int) -> Support:
    """Whether the kernel computes this; the shapes are :func:`patch_embed`'s."""
    wrong = check_tensor("image", image, (None, None, None, None), (torch.uint8, *IMAGES))
    if wrong is None and (patch < 1 or prefix < 0):
        wrong = f"patch must be positive and prefix not negative, not {patch} and {prefix}"
    if wrong is not None:
        return first_reason((wrong,))
    channels, height, width = sides(image)
    count = prefix + (height // patch) * (width // patch)
    return first_reason(
        (
            None
            if height % patch == 0 and width % patch == 0
            else f"patches of {patch} do not divide an image of {height} by {width}",
            check_tensor("weight", weight, (patch * patch * channels, None)),
            check_tensor("tokens", tokens, (count, weight.shape[-1]), (torch.float32,)),
            check_device(image, weight, tokens),
        )
    )


def launch(
    image: Tensor,
    weight: Tensor,
    tokens: Tensor,
    out: Tensor,
    stats: Tensor | None,
    *,
    patch: int,
    prefix: int,
    scale: float = 1.0,
    config: Config,
) -> Launch:
    """The launch that writes ``out`` (N * T, columns) and ``stats`` (N * T, tiles, 2), both contiguous.

    ``stats`` may be None: not wanted. Nothing is checked here.
    """
    channels, height, width = sides(image)
    rows, columns = image.shape[0] * tokens.shape[0], weight.shape[1]
    grid = (tiles(rows, config.block_m) * tiles(columns, config.block_n),)
    arguments: dict[str, Tensor | int | float] = {
        "image_ptr": image,
        "weight_ptr": weight,
        "tokens_ptr": tokens,
        "out_ptr": out,
        "rows": rows,
        "scale": scale,
    }
    constants: dict[str, Constant] = {
        "NHWC": image.dtype == torch.uint8,
        "PATCH": patch,
        "CHANNELS": channels,
        "HEIGHT": height,
        "WIDTH": width,
        "PREFIX": prefix,
        "COLUMNS": columns,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": config.group,
    }
    if stats is None:
        constants["stats_ptr"] = None
    else:
        arguments["stats_ptr"] = stats
    return Launch(patch_embed_kernel, grid, arguments, constants, config.warps, config.stages)


def _tile(weight: Tensor, config: Sequence[int] | None) -> int:
    depth, columns = weight.shape
    return statistics_tile("patch_embed", int(columns), int(depth), weight.device, config and tuple(config))


def _outputs(
    image: Tensor, weight: Tensor, tokens: Tensor, config: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    count, length, columns = image.shape[0], tokens.shape[0], weight.shape[1]
    parts = tiles(columns, _tile(weight, config))
    stats = weight.new_empty(count * length, parts, 2, dtype=torch.float32)
    return weight.new_empty(count, length, columns), stats


@torch.library.custom_op("vitdeploy_kernels::patch_embed", mutates_args=())
def _operator(
    image: Tensor,
    weight: Tensor,
    tokens: Tensor,
    patch: int,
    prefix: int,
    scale: float,
    config: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    shape = (image.shape[0] * tokens.shape[0], weight.shape[1], weight.shape[0])
    chosen = choose("patch_embed", shape, image.device, config, tile=_tile(weight, config))
    out, stats = _outputs(image, weight, tokens, config)
    launch(image, weight, tokens, out, stats, patch=patch, prefix=prefix, scale=scale, config=chosen).run()
    return out, stats


@_operator.register_fake
def _(
    image: Tensor,
    weight: Tensor,
    tokens: Tensor,
    patch: int,
    prefix: int,
    scale: float,
    config: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    return _outputs(image, weight, tokens, config)


def patch_embed(
    image: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    patch: int,
    prefix: int,
    scale: float = 1.0,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Patches of images times the projection, plus tokens; and the row statistics of the result.

    The convolution of non-overlapping patches is a GEMM whose left side is read from the image where it
    lies: no patches are written. Bias, position embeddings and the rows before the patches (class token,
    registers) arrive as ``tokens`` and are added in float32 before the one rounding, beside ``scale``.

    Args:
        image: (N, C, H, W) float32, float16 or bfloat16, rounded to weight's dtype; or (N, H, W, C) uint8,
            of which the kernel takes ``u - 128``, exact in both dtypes. Mean and deviation of the images,
            and the 128, are the caller's to fold into weight, tokens and scale. Copied if not contiguous.
        weight: (C * patch * patch, columns) float16 or bfloat16, rows in the order (C, patch, patch); for
            uint8 images (patch, patch, C).
        tokens: (T, columns) float32: ``prefix`` rows, then bias plus position embedding of every patch.
        patch: side of a patch; divides H and W.
        prefix: rows before the patches, any number from 0.
        scale: of the product.
        config: the tables' choice for this shape when omitted; its block_n is the width of a tile of the
            statistics.

    Returns:
        (N, T, columns) in weight's dtype, contiguous, and the statistics (N * T, tiles, 2) float32 of these
        rounded values: the mean of each tile of block_n columns and its sum of squared distances from it.

    Error: against float64 on the same inputs (float32 images as rounded), relative error of a row below
    1e-3 in float16 and 8e-3 in bfloat16, the rounding of the output. NaN and Inf stay in their own patch.

    Raises:
        UnsupportedError: a shape, dtype or device that the kernel does not take.

    Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words" (https://arxiv.org/abs/2010.11929).
    """
    weight = autocast(weight)
    require(supports(image, weight, tokens, patch=patch, prefix=prefix), "patch_embed")
    out, stats = _operator(
        image.contiguous(), weight.contiguous(), tokens.contiguous(),
        patch, prefix, scale, config and config.as_list(),
    )  # fmt: skip
    return out, stats
