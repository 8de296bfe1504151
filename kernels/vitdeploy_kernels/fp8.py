"""Products of 8-bit floats (E4M3) with one scale for each side, and what makes their inputs of 16-bit rows.

A GEMM ``y = x @ w + bias`` becomes ``(q(x / a) @ q(w / b)) a b + bias``, with q rounding to E4M3
(Micikevicius et al. 2022, "FP8 Formats for Deep Learning", https://arxiv.org/abs/2209.05433). Rows are
quantised where they are written last: in the kernel that normalises them, or with the activation. The product
is cuBLASLt's, which computes it from compute capability 8.9 on; everywhere else it is computed from the same
8-bit numbers, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitdeploy_kernels.config import Config
from vitdeploy_kernels.gemm import INTERPRETED, activate, narrow
from vitdeploy_kernels.launch import Constant, Launch, power_of_two, tiles

E4M3 = torch.float8_e4m3fn
"""The format, whose largest number is 448 and which has no infinity."""
LARGEST = tl.constexpr(448.0)
OLDEST = (8, 9)
"""The least compute capability with such products."""
MULTIPLE = 16
"""Columns and depth of a product are multiples of this."""
BLOCK = 4096
"""Elements that one program of :func:`launch_quantise` rounds, 16 for each thread."""


@dataclass(frozen=True)
class Fp8Linear:
    """A linear layer in 8 bits.

    Attributes:
        weight: (in, out) E4M3, its columns one after the other in memory, which is how cuBLASLt takes it.
        bias: (out) in the dtype of the output.
        scale: () float32, what a number of the weight counts.
        input_scale: () float32, what a number of its input counts.
        inverse: one over that.
        gain: (in) float32, of the LayerNorm before the layer, times ``inverse``; None where there is none.
        shift: (in) float32, the same of its shift.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor
    input_scale: Tensor
    inverse: float
    gain: Tensor | None = None
    shift: Tensor | None = None


@triton.jit
def to_e4m3(x):
    """float32 cut off at the largest number and rounded to nearest even; NaN stays NaN."""
    x = tl.where(x > LARGEST, LARGEST, tl.where(x < -LARGEST, -LARGEST, x))
    if INTERPRETED:
        # The interpreter's own conversion loses a carry into the exponent, and NaN: it is given what fits.
        bits = x.to(tl.uint32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000).to(tl.float32, bitcast=True)
        small = (tl.abs(x) + 16384.0) - 16384.0
        small = tl.where(x < 0, -small, small)
        fits = tl.where(x == x, tl.where(tl.abs(x) < 0.015625, small, normal), 0.0)
        stored = fits.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        return tl.where(x == x, stored, 0x7F).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return x.to(tl.float8e4nv)


@triton.jit(do_not_specialize=["rows"])
def norm_quantise_kernel(
    x_ptr,
    branch_ptr,
    total_ptr,
    gain_ptr,
    shift_ptr,
    out_ptr,
    rows,
    eps,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = tl.arange(0, BLOCK_N)
    column_mask = column < WIDTH
    inside = (row < rows)[:, None] & column_mask[None, :]
    at = (row * WIDTH)[:, None] + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    y = x.to(tl.float32)
    if branch_ptr is not None:
        y += tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
        # Only LayerNorm reads the stream, which the other kernels take to be centred.
        y = tl.where(inside, y - (tl.sum(y, axis=1) / WIDTH)[:, None], 0.0)
        rounded = narrow(y, x.dtype)
        tl.store(total_ptr + at, rounded, mask=inside)
        y = rounded.to(tl.float32)
    if out_ptr is not None:
        mean = tl.sum(y, axis=1) / WIDTH
        away = tl.where(column_mask[None, :], y - mean[:, None], 0.0)
        rstd = tl.math.rsqrt(tl.sum(away * away, axis=1) / WIDTH + eps)
        gain = tl.load(gain_ptr + column, mask=column_mask, other=0.0)
        shift = tl.load(shift_ptr + column, mask=column_mask, other=0.0)
        normed = away * rstd[:, None] * gain[None, :] + shift[None, :]
        tl.store(out_ptr + at, to_e4m3(normed), mask=inside)


@triton.jit(do_not_specialize=["count"])
def quantise_kernel(x_ptr, out_ptr, count, inverse, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, to_e4m3(activate(x, ACTIVATION) * inverse), mask=inside)


def launch_norm_quantise(
    x: Tensor,
    branch: Tensor | None,
    total: Tensor | None,
    linear: Fp8Linear | None,
    out: Tensor | None,
    *,
    eps: float,
    config: Config,
) -> Launch:
    """The launch that adds a branch to the residual stream and makes a layer's 8-bit input of the sum.

    Args:
        x: (rows, width) float16 or bfloat16, contiguous, as all of these.
        branch: (rows, width) in x's dtype, or None; with one, ``total`` is ``x + branch``, its rows centred.
        total: may be x's own memory.
        linear: the layer behind LayerNorm, with gain and shift, or None.
        out: (rows, width) E4M3, ``q(LayerNorm(total) gain + shift)``, where there is a layer.
        eps: LayerNorm's.
        config: of ``add_layernorm``.
    """
    rows, width = x.shape
    arguments: dict[str, Tensor | int | float] = {"x_ptr": x, "rows": rows, "eps": eps}
    constants: dict[str, Constant] = {
        "WIDTH": width,
        "BLOCK_M": config.block_m,
        "BLOCK_N": power_of_two(width),
    }
    optional: dict[str, Tensor | None] = {
        "branch_ptr": branch,
        "total_ptr": total,
        "gain_ptr": None if linear is None else linear.gain,
        "shift_ptr": None if linear is None else linear.shift,
        "out_ptr": out,
    }
    for name, tensor in optional.items():
        if tensor is None:
            constants[name] = None
        else:
            arguments[name] = tensor
    grid = (tiles(rows, config.block_m),)
    return Launch(norm_quantise_kernel, grid, arguments, constants, config.warps, config.stages)


def launch_quantise(x: Tensor, out: Tensor, inverse: float, activation: str = "none") -> Launch:
    """The launch that writes ``q(activation(x) * inverse)``.

    Args:
        x: float16 or bfloat16, contiguous.
        out: E4M3, as many, contiguous.
        inverse: one over the scale.
        activation: of :data:`vitdeploy_kernels.gemm.ACTIVATIONS`.
    """
    arguments: dict[str, Tensor | int | float] = {
        "x_ptr": x,
        "out_ptr": out,
        "count": x.numel(),
        "inverse": inverse,
    }
    constants: dict[str, Constant] = {"ACTIVATION": activation, "BLOCK": BLOCK}
    return Launch(quantise_kernel, (tiles(x.numel(), BLOCK),), arguments, constants, 8, 1)


def scaled_mm(x: Tensor, linear: Fp8Linear, out: Tensor) -> None:
    """Write ``(x @ weight) input_scale scale + bias``, rounded once.

    Args:
        x: (rows, in) E4M3.
        out: (rows, columns) float16 or bfloat16.

    Error: products of E4M3 are exact in float32; what is left is the order of float32 sums, and the rounding
    of the output. A GPU does not take the faster sums of fewer bits.
    """
    if x.device.type == "cuda":
        return library_mm(x, linear, out)
    product = x.float() @ linear.weight.float()
    out.copy_(product * (linear.input_scale * linear.scale) + linear.bias.float())
    return None


def library_mm(x: Tensor, linear: Fp8Linear, out: Tensor) -> None:
    """:func:`scaled_mm` by the device's own library: cuBLASLt, or oneDNN on a CPU."""
    scales, fast = (linear.input_scale, linear.scale), False
    torch.ops.aten._scaled_mm.out(x, linear.weight, *scales, linear.bias, None, out.dtype, fast, out=out)
