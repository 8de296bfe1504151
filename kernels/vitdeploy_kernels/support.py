"""Whether a fused kernel applies: ``Supported``, or ``Unsupported`` with the reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from vitdeploy_kernels.gemm import INTERPRETED

DTYPES = (torch.float16, torch.bfloat16)
"""What the kernels compute in, always with float32 accumulation and statistics."""

OLDEST = (8, 0)
"""The least compute capability: tensor cores with asynchronous copies and bfloat16."""


class UnsupportedError(ValueError):
    """A kernel was asked for something it does not compute; the message says what and why."""


@dataclass(frozen=True)
class Supported:
    """The kernel applies."""


@dataclass(frozen=True)
class Unsupported:
    """The kernel does not apply; ``reason`` is one line for people."""

    reason: str


Support: TypeAlias = Supported | Unsupported


def require(support: Support, kernel: str) -> None:
    """Raise an :class:`UnsupportedError` with the reason if a kernel does not apply."""
    if isinstance(support, Unsupported):
        raise UnsupportedError(f"{kernel}: {support.reason}")


def first_reason(reasons: Iterable[str | None]) -> Support:
    """Supported if every check passed (None), else the first reason."""
    reason = next((reason for reason in reasons if reason is not None), None)
    return Supported() if reason is None else Unsupported(reason)


def interpreted() -> bool:
    """Whether Triton's interpreter takes the GPU's place (``TRITON_INTERPRET=1`` at the first import)."""
    return bool(INTERPRETED.value)


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...] = DTYPES
) -> str | None:
    """None if a tensor has this shape (None is any size) and one of the dtypes, else what is wrong."""
    fits = tensor.dim() == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        return f"{name} must have the shape ({wanted}), not {tuple(tensor.shape)}"
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"{name} must be {wanted}, not {str(tensor.dtype).removeprefix('torch.')}"
    return None


def check_device(*tensors: Tensor | None) -> str | None:
    """None if the tensors lie together where the kernels run, else what is wrong.

    Meta and fake tensors pass: a launch that is only compiled, or only traced, has no memory.
    """
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        return f"tensors lie on different devices: {', '.join(sorted(map(str, devices)))}"
    device = next(iter(devices))
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < OLDEST:
            needed = ".".join(map(str, OLDEST))
            return f"needs compute capability {needed}, and this GPU has {'.'.join(map(str, found))}"
        return None
    if device.type == "meta" or (device.type == "cpu" and interpreted()):
        return None
    hint = "; TRITON_INTERPRET=1 runs them on the CPU, slowly" if device.type == "cpu" else ""
    return f"the kernels need an NVIDIA GPU, and the tensors are on {device.type}{hint}"


def autocast(tensor: Tensor) -> Tensor:
    """The tensor as ``torch.autocast`` has it: in the region's dtype, like the operands of torch's products.

    Only operands of the compute dtype go through here. Biases, statistics and column sums stay float32, and a
    float64 tensor is left alone, as torch leaves it; outside of a region nothing happens.
    """
    kind = tensor.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensor
    dtype = torch.get_autocast_dtype(kind)
    fits = dtype in DTYPES and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if fits else tensor


def rows_of(tensor: Tensor) -> Tensor:
    """The tensor with columns that lie next to each other; copied only if they do not."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
