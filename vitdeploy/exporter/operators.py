"""What each function that deployed models call is in ONNX.

The operators are those of PyTorch's exporter, which tests hold these graphs against; attributes that say what
an operator does anyway are left out. A function here is given the graph and the arguments of PyTorch's
function of that name, and returns what that would return: tensors on the ``meta`` device, which have a shape
and a dtype and no values. Views are PyTorch's own. What else has another shape says so itself, as PyTorch's
rules for ``meta`` load its compiler, which takes longer than all of an export's graphs.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import Tensor

_GELU = 20
"""The first opset with the operator."""
_END = sys.maxsize
"""PyTorch's end of a slice that has none."""


class UnknownFunction(Exception):
    """A module calls a function that has no entry here, or calls it in a way that its entry does not know."""


class Recorded(ABC):
    """A graph that operators are added to; tensors stand for the values that they are bound to."""

    def __init__(self, opset: int) -> None:
        self.opset = opset

    @abstractmethod
    def bind(self, tensor: Tensor, value: ir.Value) -> None:
        """Let a tensor stand for a value."""

    @abstractmethod
    def value(self, tensor: Tensor) -> ir.Value:
        """What a tensor stands for."""

    @abstractmethod
    def constant(self, value: Any, dtype: torch.dtype) -> ir.Value:
        """A number, or a list of numbers."""

    @abstractmethod
    def node(
        self, op: str, inputs: Sequence[ir.Value | Tensor], outputs: Sequence[Tensor], **attributes: Any
    ) -> None:
        """Add an operator; the outputs give the shapes and dtypes, and are bound to its values."""

    def add(self, op: str, inputs: Sequence[ir.Value | Tensor], output: Tensor, **attributes: Any) -> Tensor:
        """Add an operator with one output."""
        self.node(op, inputs, [output], **attributes)
        return output

    def ints(self, *values: int) -> ir.Value:
        return self.constant(list(values), torch.int64)

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.dtype == dtype:
            return x
        return self.add("Cast", [x], empty(x.shape, dtype), to=from_torch_dtype(dtype).value)

    def operand(self, x: Tensor | float, dtype: torch.dtype) -> ir.Value | Tensor:
        """An operand of an operation in a dtype, to which PyTorch promotes."""
        return self.cast(x, dtype) if isinstance(x, Tensor) else self.constant(x, dtype)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor without values."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _like(x: Tensor) -> Tensor:
    return empty(x.shape, x.dtype)


def _binary(op: str) -> Callable[..., Tensor]:
    def write(graph: Recorded, a: Tensor | float, b: Tensor | float) -> Tensor:
        tensors = [x for x in (a, b) if isinstance(x, Tensor)]
        dtype = torch.promote_types(tensors[0].dtype, tensors[-1].dtype)
        result = empty(np.broadcast_shapes(*(x.shape for x in tensors)), dtype)
        return graph.add(op, [graph.operand(a, dtype), graph.operand(b, dtype)], result)

    return write


def _unary(op: str) -> Callable[..., Tensor]:
    def write(graph: Recorded, x: Tensor, *, inplace: bool = False) -> Tensor:
        if inplace:
            raise UnknownFunction(f"{op} in place")
        return graph.add(op, [x], _like(x))

    return write


def _reduction(op: str) -> Callable[..., Tensor]:
    def write(graph: Recorded, x: Tensor, *, dim: int, keepdim: bool = False) -> Tensor:
        shape = list(x.shape)
        shape[dim : dim % x.dim() + 1] = [1] if keepdim else []
        return graph.add(op, [x, graph.ints(dim)], empty(shape, x.dtype), keepdims=int(keepdim))

    return write


def _to(graph: Recorded, x: Tensor, dtype: torch.dtype) -> Tensor:
    return graph.cast(x, dtype)


def _reshape(graph: Recorded, x: Tensor, *shape: Any) -> Tensor:
    result = x.reshape(*shape)
    if result.shape == x.shape:
        return x
    return graph.add("Reshape", [x, graph.ints(*result.shape)], result)


def _transpose(graph: Recorded, x: Tensor, first: int, second: int) -> Tensor:
    order = list(range(x.dim()))
    order[first], order[second] = order[second], order[first]
    return graph.add("Transpose", [x], x.permute(order), perm=order)


def _permute(graph: Recorded, x: Tensor, *order: Any) -> Tensor:
    places = order if isinstance(order[0], int) else order[0]
    return graph.add("Transpose", [x], x.permute(*order), perm=[place % x.dim() for place in places])


def _split(graph: Recorded, x: Tensor, sizes: Any, dim: int = 0) -> tuple[Tensor, ...]:
    parts, axis = tuple(x.split(sizes, dim)), dim % x.dim()
    if isinstance(sizes, int) and x.shape[dim] % sizes == 0:
        graph.node("Split", [x], parts, axis=axis, num_outputs=len(parts))
    else:
        graph.node("Split", [x, graph.ints(*(part.shape[dim] for part in parts))], parts, axis=axis)
    return parts


def _getitem(graph: Recorded, x: Tensor, index: Any) -> Tensor:
    places = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in places:
        at = places.index(Ellipsis)
        places[at : at + 1] = [slice(None)] * (x.dim() - len(places) + 1)
    dim = 0
    for place in places:
        if isinstance(place, int):
            x = graph.add("Gather", [x, graph.constant(place, torch.int64)], x.select(dim, place), axis=dim)
            continue
        if not isinstance(place, slice) or place.step is not None:
            raise UnknownFunction(f"indexing with {place!r}")
        if place != slice(None):
            stop = _END if place.stop is None else place.stop
            bounds = [graph.ints(number) for number in (place.start or 0, stop, dim, 1)]
            x = graph.add("Slice", [x, *bounds], x[(slice(None),) * dim + (place,)])
        dim += 1
    return x


def _index_select(graph: Recorded, x: Tensor, dim: int, index: Tensor) -> Tensor:
    shape = list(x.shape)
    shape[dim] = len(index)
    return graph.add("Gather", [x, index], empty(shape, x.dtype), axis=dim)


def _pad(
    graph: Recorded, x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Tensor:
    if mode != "constant" or value is not None:
        raise UnknownFunction("a pad with anything but zeros")
    around = [*pad, *[0] * (2 * x.dim() - len(pad))]  # before and behind, from the last axis to the first
    before, behind = around[-2::-2], around[-1::-2]
    shape = [sum(sizes) for sizes in zip(before, x.shape, behind, strict=True)]
    return graph.add("Pad", [x, graph.ints(*before, *behind)], empty(shape, x.dtype), mode="constant")


def _cat(graph: Recorded, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    dtype, shape = tensors[0].dtype, list(tensors[0].shape)
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
        shape[dim] += x.shape[dim]
    return graph.add("Concat", [graph.cast(x, dtype) for x in tensors], empty(shape, dtype), axis=dim)


def _stack(graph: Recorded, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return _cat(graph, [graph.add("Unsqueeze", [x, graph.ints(dim)], x.unsqueeze(dim)) for x in tensors], dim)


def _matmul(graph: Recorded, a: Tensor, b: Tensor) -> Tensor:
    _require_product(a, b)
    stacked = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return graph.add("MatMul", [a, b], empty((*stacked, a.shape[-2], b.shape[-1]), a.dtype))


def _addmm(graph: Recorded, bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    _require_product(x, weight)
    return graph.add("Gemm", [x, weight, bias], empty((x.shape[0], weight.shape[1]), x.dtype))


def _require_product(a: Tensor, b: Tensor) -> None:
    """Leave to PyTorch what it has to say of a product that there is not."""
    if min(a.dim(), b.dim()) < 2 or a.shape[-1] != b.shape[-2] or a.dtype != b.dtype:
        raise UnknownFunction(f"a product of {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}")


def _layer_norm(
    graph: Recorded,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    axis = -len(normalized_shape)
    return graph.add("LayerNormalization", [x, weight, bias], _like(x), axis=axis, epsilon=eps)


def _softmax(graph: Recorded, x: Tensor, dim: int) -> Tensor:
    return graph.add("Softmax", [x], _like(x), axis=dim)


def _silu(graph: Recorded, x: Tensor, *, inplace: bool = False) -> Tensor:
    if inplace:
        raise UnknownFunction("silu in place")
    return graph.add("Mul", [x, graph.add("Sigmoid", [x], _like(x))], _like(x))


def _gelu(graph: Recorded, x: Tensor, *, approximate: str = "none") -> Tensor:
    if graph.opset >= _GELU:
        return graph.add("Gelu", [x], _like(x), approximate=approximate)

    def step(op: str, *operands: Tensor | float) -> Tensor:
        return graph.add(op, [graph.operand(each, x.dtype) for each in operands], _like(x))

    if approximate == "tanh":
        inner = step("Add", x, step("Mul", 0.044715, step("Pow", x, 3.0)))
        share = step("Tanh", step("Mul", math.sqrt(2 / math.pi), inner))
    else:
        share = step("Erf", step("Div", x, math.sqrt(2)))
    return step("Mul", x, step("Mul", 0.5, step("Add", share, 1.0)))


def _clamp(graph: Recorded, x: Tensor, *, min: float) -> Tensor:
    return graph.add("Clip", [x, graph.constant(min, x.dtype)], _like(x))


def _conv2d(
    graph: Recorded,
    x: Tensor,
    weight: Tensor,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
) -> Tensor:
    """A convolution; the zeros that a Pad before it adds are its own."""
    pads, read = [*_pair(padding), *_pair(padding)], graph.value(x)
    kernel, strides = list(weight.shape[2:]), _pair(stride)
    sides = _windows(x.shape[2:], kernel, strides, pads)
    before = read.producer()
    if before is not None and before.op_type == "Pad" and before.inputs[0] is not None:
        read, zeros = before.inputs[0], before.inputs[1]
        assert zeros is not None
        assert zeros.const_value is not None
        around = zeros.const_value.numpy().tolist()
        if any((*around[:2], *around[4:6])):
            raise UnknownFunction("conv2d behind a pad of images or channels")
        pads = [own + more for own, more in zip(pads, (*around[2:4], *around[6:]), strict=True)]
    return graph.add(
        "Conv",
        [read, weight],
        empty((x.shape[0], weight.shape[0], *sides), x.dtype),
        strides=strides,
        pads=pads,
        dilations=[1, 1],
        kernel_shape=kernel,
    )


def _max_pool2d(
    graph: Recorded,
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    if return_indices or _pair(dilation) != [1, 1]:
        raise UnknownFunction("max_pool2d with indices or dilation")
    kernel, strides, pads = _pair(kernel_size), _pair(stride), [*_pair(padding), *_pair(padding)]
    return graph.add(
        "MaxPool",
        [x],
        empty((*x.shape[:2], *_windows(x.shape[2:], kernel, strides, pads, ceil=ceil_mode)), x.dtype),
        ceil_mode=int(ceil_mode),
        dilations=[1, 1],
        kernel_shape=kernel,
        pads=pads,
        strides=strides,
    )


def _windows(
    sides: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    *,
    ceil: bool = False,
) -> list[int]:
    """How many windows there are on each side; with ``ceil`` also one that begins inside and ends outside."""
    counts = []
    for side, size, stride, before, behind in zip(sides, kernel, strides, pads[:2], pads[2:], strict=True):
        count = (
            -(-(side + before + behind - size) // stride)
            if ceil
            else (side + before + behind - size) // stride
        )
        counts.append(count + (not ceil or count * stride < side + before))
    return counts


def _pair(sizes: int | Sequence[int]) -> list[int]:
    return [sizes, sizes] if isinstance(sizes, int) else list(sizes)


FUNCTIONS: Mapping[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "add": _binary("Add"),
    "addmm": _addmm,
    "cat": _cat,
    "clamp": _clamp,
    "conv2d": _conv2d,
    "div": _binary("Div"),
    "gelu": _gelu,
    "__getitem__": _getitem,
    "index_select": _index_select,
    "layer_norm": _layer_norm,
    "linalg_vector_norm": _reduction("ReduceL2"),
    "matmul": _matmul,
    "max_pool2d": _max_pool2d,
    "mean": _reduction("ReduceMean"),
    "mul": _binary("Mul"),
    "neg": _unary("Neg"),
    "pad": _pad,
    "permute": _permute,
    "pow": _binary("Pow"),
    "relu": _unary("Relu"),
    "reshape": _reshape,
    "sigmoid": _unary("Sigmoid"),
    "silu": _silu,
    "softmax": _softmax,
    "split": _split,
    "sqrt": _unary("Sqrt"),
    "stack": _stack,
    "sub": _binary("Sub"),
    "sum": _reduction("ReduceSum"),
    "tanh": _unary("Tanh"),
    "to": _to,
    "transpose": _transpose,
}
"""By the name that PyTorch gives the function, whatever spells it: ``x @ y`` is ``matmul``."""
