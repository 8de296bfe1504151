"""A small launch of every kernel, over meta tensors: what tests of compilation compile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vitdeploy_kernels import (
    absorbed,
    add_layernorm,
    attention,
    fp8,
    layernorm_attention,
    layernorm_linear,
    linear_residual,
    patch_embed,
)
from vitdeploy_kernels.config import Config
from vitdeploy_kernels.launch import Launch

GEMM = Config(block_m=64, block_n=64, block_k=32, group=4, warps=4, stages=2)
ROW = Config(block_m=16, block_n=32, block_k=32, warps=4, stages=2)
HALF, SINGLE = torch.float16, torch.float32


def meta(*size: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(*size, dtype=dtype, device="meta")


def layernorm_linear_launch(rows: int = 394, dtype: torch.dtype = HALF) -> Launch:
    return layernorm_linear.launch(
        meta(rows, 128, dtype=dtype), meta(rows, 2, 2, dtype=SINGLE), meta(128, 256, dtype=dtype),
        meta(256, dtype=SINGLE), meta(256, dtype=SINGLE), meta(rows, 256, dtype=dtype),
        eps=1e-6, activation="gelu", config=GEMM,
    )  # fmt: skip


def linear_residual_launch() -> Launch:
    return linear_residual.launch(
        meta(394, 256), meta(256, 128), meta(128, dtype=SINGLE), meta(394, 128), meta(394, 128),
        meta(394, 2, 2, dtype=SINGLE), config=GEMM,
    )  # fmt: skip


def plain_linear_residual_launch() -> Launch:
    """Without bias and statistics."""
    return linear_residual.launch(
        meta(394, 256), meta(256, 128), None, meta(394, 128), meta(394, 128), None, config=GEMM
    )


def patch_embed_launch() -> Launch:
    return patch_embed.launch(
        meta(2, 3, 64, 64, dtype=SINGLE), meta(768, 128), meta(17, 128, dtype=SINGLE), meta(34, 128),
        meta(34, 2, 2, dtype=SINGLE), patch=16, prefix=1, config=GEMM,
    )  # fmt: skip


def pixels_launch() -> Launch:
    return patch_embed.launch(
        meta(2, 64, 64, 3, dtype=torch.uint8), meta(768, 128), meta(17, 128, dtype=SINGLE), meta(34, 128),
        meta(34, 2, 2, dtype=SINGLE), patch=16, prefix=1, scale=1 / 64, config=GEMM,
    )  # fmt: skip


def attention_launch() -> Launch:
    return attention.launch(meta(2, 197, 384), meta(2, 197, 128), heads=2, scale=0.125, config=GEMM)


def biased_attention_launch() -> Launch:
    bias = meta(1, 2, 197, 197, dtype=SINGLE)
    return attention.launch(
        meta(2, 197, 384), meta(2, 197, 128), heads=2, scale=0.125, bias=bias, config=GEMM
    )


def layernorm_attention_launch() -> Launch:
    return layernorm_attention.launch(
        meta(2, 65, 128), meta(128, 384), meta(384, dtype=SINGLE), meta(2, 65, 128),
        heads=2, scale=0.125, eps=1e-6, config=GEMM,
    )  # fmt: skip


def add_layernorm_launch() -> Launch:
    return add_layernorm.launch(
        meta(394, 128), meta(394, 128), meta(128, dtype=SINGLE), meta(394, 128), meta(394, 128),
        meta(394, 1, 2, dtype=SINGLE), eps=1e-6, config=ROW,
    )  # fmt: skip


def head_linear_launch() -> Launch:
    return absorbed.launch_head_linear(meta(64, 2, 64), meta(2, 64, 128), meta(64, 2, 128), config=GEMM)


def absorbed_attention_launch() -> Launch:
    return absorbed.launch_absorbed_attention(
        meta(2, 2, 128), meta(2, 197, 128), meta(394, 2, 2, dtype=SINGLE), meta(2, 2, 128),
        scale=0.125, eps=1e-6, config=ROW,
    )  # fmt: skip


def fp8_linear() -> fp8.Fp8Linear:
    scale = meta(1, dtype=SINGLE)
    weight, vector = meta(256, 128, dtype=fp8.E4M3).T, meta(128, dtype=SINGLE)
    return fp8.Fp8Linear(weight, meta(256), scale, scale, 1.0, vector, vector)


def norm_quantise_launch() -> Launch:
    return fp8.launch_norm_quantise(
        meta(394, 128), meta(394, 128), meta(394, 128), fp8_linear(), meta(394, 128, dtype=fp8.E4M3),
        eps=1e-6, config=ROW,
    )  # fmt: skip


def quantise_launch() -> Launch:
    return fp8.launch_quantise(meta(394, 256), meta(394, 256, dtype=fp8.E4M3), 1.0, "gelu")


LAUNCHES: dict[str, Callable[[], Launch]] = {
    "layernorm_linear": layernorm_linear_launch,
    "linear_residual": linear_residual_launch,
    "linear_residual, plain": plain_linear_residual_launch,
    "patch_embed": patch_embed_launch,
    "patch_embed, uint8": pixels_launch,
    "attention": attention_launch,
    "attention, biased": biased_attention_launch,
    "layernorm_attention": layernorm_attention_launch,
    "add_layernorm": add_layernorm_launch,
    "head_linear": head_linear_launch,
    "absorbed_attention": absorbed_attention_launch,
    "norm_quantise": norm_quantise_launch,
    "quantise": quantise_launch,
}
