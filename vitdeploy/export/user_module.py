"""The generic path: a module of the user's, exported as it is."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitdeploy.errors import ExportError
from vitdeploy.precision import PrecisionPlan


class Wrapped(nn.Module):
    """A user's module with one tensor in, one float tensor out, in a chosen dtype inside."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, output_dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.dtype, self.output_dtype = dtype, output_dtype

    def forward(self, pixel_values: Tensor) -> Tensor:
        return only_tensor(self.module(pixel_values.to(self.dtype))).to(self.output_dtype)


class IslandNorm(nn.Module):
    """A LayerNorm that computes in fp32 between two casts, inside a model of reduced precision."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias = _widened(norm.weight), _widened(norm.bias)
        self.shape, self.eps = norm.normalized_shape, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.shape, self.weight, self.bias, self.eps).to(x.dtype)


def _widened(value: Tensor | None) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(value.detach().float(), requires_grad=False)


def only_tensor(output: object) -> Tensor:
    """The one tensor of a module's output: itself, ``.logits``, ``["logits"]`` or a tuple's first.

    Raises:
        ExportError: there is none.
    """
    if isinstance(output, dict):
        output = output.get("logits", next(iter(output.values()), None))
    output = getattr(output, "logits", output)
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise ExportError(
            f"the model returns {type(output).__name__}, not a tensor",
            hint="wrap it in a module whose forward returns the logits",
        )
    return output


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


def _with_island_norms(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.LayerNorm):
        return IslandNorm(module)
    for name, child in module.named_children():
        setattr(module, name, _with_island_norms(child))
    return module


def island_norms(wrapped: nn.Module) -> tuple[str, ...]:
    """The modules that stay in fp32, as their nodes are named."""
    return tuple(name for name, module in wrapped.named_modules() if isinstance(module, IslandNorm))
