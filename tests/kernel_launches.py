"""A small launch of every kernel, over meta tensors: what tests of compilation compile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vitdeploy_kernels import layernorm_linear
from vitdeploy_kernels.config import Config
from vitdeploy_kernels.launch import Launch

GEMM = Config(block_m=64, block_n=64, block_k=32, group=4, warps=4, stages=2)
HALF, SINGLE = torch.float16, torch.float32


def meta(*size: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(*size, dtype=dtype, device="meta")


def layernorm_linear_launch(rows: int = 394, dtype: torch.dtype = HALF) -> Launch:
    return layernorm_linear.launch(
        meta(rows, 128, dtype=dtype), meta(rows, 2, 2, dtype=SINGLE), meta(128, 256, dtype=dtype),
        meta(256, dtype=SINGLE), meta(256, dtype=SINGLE), meta(rows, 256, dtype=dtype),
        eps=1e-6, activation="gelu", config=GEMM,
    )  # fmt: skip


LAUNCHES: dict[str, Callable[[], Launch]] = {"layernorm_linear": layernorm_linear_launch}
