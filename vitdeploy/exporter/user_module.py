"""The generic path: a module of the user's, exported as it is."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from vitdeploy.model.precision import PrecisionPlan
from vitdeploy.model.user_module import only_tensor


class Wrapped(nn.Module):
    """A user's module with one tensor in, one float tensor out, in a chosen dtype inside."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, output_dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.dtype, self.output_dtype = dtype, output_dtype

    def forward(self, pixel_values: Tensor) -> Tensor:
        return only_tensor(self.module(pixel_values.to(self.dtype))).to(self.output_dtype)


class IslandNorm(nn.Module):
    """A LayerNorm that computes in fp32 between two casts, inside a model of reduced precision.

    A class of its own may be derived from LayerNorm, as those of timm and torchvision for (N, C, H, W) are:
    its own code runs.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm.float()

    def forward(self, x: Tensor) -> Tensor:
        widened: Tensor = self.norm(x.float())
        return widened.to(x.dtype)


def wrap(module: nn.Module, plan: PrecisionPlan) -> Wrapped:
    """Return a copy of ``module`` in the plan's dtype; LayerNorm stays in fp32 below fp32."""
    inner = copy.deepcopy(module).eval().requires_grad_(False)
    if plan.default in (torch.float16, torch.bfloat16):
        inner = _with_island_norms(inner)
        keep = {id(p) for m in inner.modules() if isinstance(m, IslandNorm) for p in m.parameters()}
        for tensor in (*inner.parameters(), *inner.buffers()):
            if tensor.is_floating_point() and id(tensor) not in keep:
                tensor.data = tensor.data.to(plan.default)
    else:
        inner = inner.to(plan.default)
    return Wrapped(inner, plan.default, plan.output_dtype).eval()


class _Rounding(TorchDispatchMode):
    """Rounds what every operation computes to a narrower dtype, as hardware that stores it there does."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return result if func.is_view else tree_map_only(Tensor, self._rounded, result)

    def _rounded(self, value: Tensor) -> Tensor:
        # In place, because an operation may have written into one of its arguments.
        return value.copy_(value.to(self.dtype)) if value.is_floating_point() else value


@torch.inference_mode()
def rehearse(module: nn.Module, plan: PrecisionPlan, inputs: Tensor) -> Tensor:
    """The wrapped module's output in the plan's dtype, computed in fp32 with every result rounded."""
    wrapped = wrap(module, plan).float()
    wrapped.dtype = torch.float32
    with _Rounding(plan.default):
        result: Tensor = wrapped(inputs.to(plan.default).float())
        return result


def _with_island_norms(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.LayerNorm):
        return IslandNorm(module)
    for name, child in module.named_children():
        setattr(module, name, _with_island_norms(child))
    return module


def island_norms(wrapped: nn.Module) -> tuple[str, ...]:
    """The modules that stay in fp32, as their nodes are named."""
    return tuple(name for name, module in wrapped.named_modules() if isinstance(module, IslandNorm))
