"""What each function that deployed models call is in ONNX.

The operators are those of PyTorch's exporter, which tests hold these graphs against; attributes that say what an
operator does anyway are left out.
A function here is given the recording, what PyTorch's function returned, and the arguments as they were
passed. Its tensors are on the ``meta`` device: they have shapes and dtypes only.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import Tensor

_GELU = 20
"""The first opset with the operator."""
_END = sys.maxsize
"""PyTorch's end of a slice that has none."""


class UnknownFunction(Exception):
    """A module calls a function that has no entry here, or calls it in a way that the entry does not know."""


class Recorded(ABC):
    """A graph that operators are added to; tensors stand for the values of the graph that they are bound to."""

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
        return self.add("Cast", [x], torch.empty_like(x, dtype=dtype), to=from_torch_dtype(dtype).value)

    def operand(self, x: Tensor | float, dtype: torch.dtype) -> ir.Value | Tensor:
        """An operand of an operation in a dtype, to which PyTorch promotes."""
        return self.cast(x, dtype) if isinstance(x, Tensor) else self.constant(x, dtype)


def _binary(op: str) -> Callable[..., None]:
    def write(graph: Recorded, result: Tensor, a: Tensor | float, b: Tensor | float) -> None:
        graph.add(op, [graph.operand(a, result.dtype), graph.operand(b, result.dtype)], result)

    return write


def _unary(op: str) -> Callable[..., None]:
    def write(graph: Recorded, result: Tensor, x: Tensor, *, inplace: bool = False) -> None:
        if inplace:
            raise UnknownFunction(f"{op} in place")
        graph.add(op, [x], result)

    return write


def _reduction(op: str) -> Callable[..., None]:
    def write(graph: Recorded, result: Tensor, x: Tensor, *, dim: int, keepdim: bool = False) -> None:
        graph.add(op, [x, graph.ints(dim)], result, keepdims=int(keepdim))

    return write


def _to(graph: Recorded, result: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    if result is not x:
        graph.add("Cast", [x], result, to=from_torch_dtype(dtype).value)


def _reshape(graph: Recorded, result: Tensor, x: Tensor, *_: Any) -> None:
    if result.shape == x.shape:
        graph.bind(result, graph.value(x))
    else:
        graph.add("Reshape", [x, graph.ints(*result.shape)], result)


def _transpose(graph: Recorded, result: Tensor, x: Tensor, first: int, second: int) -> None:
    order = list(range(x.dim()))
    order[first], order[second] = order[second], order[first]
    graph.add("Transpose", [x], result, perm=order)


def _permute(graph: Recorded, result: Tensor, x: Tensor, *order: Any) -> None:
    places = order if isinstance(order[0], int) else order[0]
    graph.add("Transpose", [x], result, perm=[place % x.dim() for place in places])


def _split(graph: Recorded, result: Sequence[Tensor], x: Tensor, sizes: Any, dim: int = 0) -> None:
    axis, parts = dim % x.dim(), len(result)
    if isinstance(sizes, int) and x.shape[dim] % sizes == 0:
        graph.node("Split", [x], result, axis=axis, num_outputs=parts)
    else:
        graph.node("Split", [x, graph.ints(*(part.shape[dim] for part in result))], result, axis=axis)


def _getitem(graph: Recorded, result: Tensor, x: Tensor, index: Any) -> None:
    places = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in places:
        at = places.index(Ellipsis)
        places[at : at + 1] = [slice(None)] * (x.dim() - len(places) + 1)
    dim = 0
    for place in places:
        if isinstance(place, int):
            picked = x.select(dim, place)
            x = graph.add("Gather", [x, graph.constant(place, torch.int64)], picked, axis=dim)
            continue
        if not isinstance(place, slice) or place.step is not None:
            raise UnknownFunction(f"indexing with {place!r}")
        if place != slice(None):
            start, stop = place.start or 0, _END if place.stop is None else place.stop
            cut = x[(slice(None),) * dim + (place,)]
            bounds = [graph.ints(number) for number in (start, stop, dim, 1)]
            x = graph.add("Slice", [x, *bounds], cut)
        dim += 1
    graph.bind(result, graph.value(x))


def _index_select(graph: Recorded, result: Tensor, x: Tensor, dim: int, index: Tensor) -> None:
    graph.add("Gather", [x, index], result, axis=dim)


def _pad(
    graph: Recorded,
    result: Tensor,
    x: Tensor,
    pad: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
) -> None:
    if mode != "constant" or value is not None:
        raise UnknownFunction("a pad with anything but zeros")
    around = [*pad, *[0] * (2 * x.dim() - len(pad))]  # from the last axis to the first
    graph.add("Pad", [x, graph.ints(*around[-2::-2], *around[-1::-2])], result, mode="constant")


def _cat(graph: Recorded, result: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> None:
    graph.add("Concat", [graph.cast(x, result.dtype) for x in tensors], result, axis=dim)


def _stack(graph: Recorded, result: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> None:
    rows = [graph.add("Unsqueeze", [x, graph.ints(dim)], x.unsqueeze(dim)) for x in tensors]
    graph.add("Concat", rows, result, axis=dim)


def _addmm(graph: Recorded, result: Tensor, bias: Tensor, x: Tensor, weight: Tensor) -> None:
    graph.add("Gemm", [x, weight, bias], result)


def _matmul(graph: Recorded, result: Tensor, a: Tensor, b: Tensor) -> None:
    graph.add("MatMul", [a, b], result)


def _layer_norm(
    graph: Recorded,
    result: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> None:
    axis = -len(normalized_shape)
    graph.add("LayerNormalization", [x, weight, bias], result, axis=axis, epsilon=eps)


def _softmax(graph: Recorded, result: Tensor, x: Tensor, dim: int) -> None:
    graph.add("Softmax", [x], result, axis=dim)


def _silu(graph: Recorded, result: Tensor, x: Tensor, *, inplace: bool = False) -> None:
    if inplace:
        raise UnknownFunction("silu in place")
    graph.add("Mul", [x, graph.add("Sigmoid", [x], torch.empty_like(x))], result)


def _gelu(graph: Recorded, result: Tensor, x: Tensor, *, approximate: str = "none") -> None:
    if graph.opset >= _GELU:
        graph.add("Gelu", [x], result, approximate=approximate)
        return

    def step(op: str, *operands: Tensor | float) -> Tensor:
        return graph.add(op, [graph.operand(each, x.dtype) for each in operands], torch.empty_like(x))

    if approximate == "tanh":
        inner = step("Add", x, step("Mul", 0.044715, step("Pow", x, 3.0)))
        share = step("Tanh", step("Mul", math.sqrt(2 / math.pi), inner))
    else:
        share = step("Erf", step("Div", x, math.sqrt(2)))
    half = step("Mul", 0.5, step("Add", share, 1.0))
    graph.add("Mul", [x, half], result)


def _vector_norm(
    graph: Recorded, result: Tensor, x: Tensor, *, dim: int, keepdim: bool = False
) -> None:
    graph.add("ReduceL2", [x, graph.ints(dim)], result, keepdims=int(keepdim))


def _clamp(graph: Recorded, result: Tensor, x: Tensor, *, min: float) -> None:
    graph.add("Clip", [x, graph.constant(min, x.dtype)], result)


def _conv2d(
    graph: Recorded,
    result: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
) -> None:
    """A convolution; the zeros that a Pad before it adds are its own."""
    pads, read = [*_pair(padding), *_pair(padding)], graph.value(x)
    before = read.producer()
    if before is not None and before.op_type == "Pad" and before.inputs[0] is not None:
        read, zeros = before.inputs[0], before.inputs[1]
        assert zeros is not None and zeros.const_value is not None
        around = zeros.const_value.numpy().tolist()
        if any((*around[:2], *around[4:6])):
            raise UnknownFunction("conv2d behind a pad of images or channels")
        pads = [own + more for own, more in zip(pads, (*around[2:4], *around[6:]), strict=True)]
    graph.add(
        "Conv",
        [read, weight],
        result,
        strides=_pair(stride),
        pads=pads,
        dilations=[1, 1],
        kernel_shape=list(weight.shape[2:]),
    )


def _max_pool2d(
    graph: Recorded,
    result: Tensor,
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> None:
    if return_indices:
        raise UnknownFunction("max_pool2d with indices")
    graph.add(
        "MaxPool",
        [x],
        result,
        ceil_mode=int(ceil_mode),
        dilations=_pair(dilation),
        kernel_shape=_pair(kernel_size),
        pads=[*_pair(padding), *_pair(padding)],
        strides=_pair(stride),
    )


def _pair(sizes: int | Sequence[int]) -> list[int]:
    return [sizes, sizes] if isinstance(sizes, int) else list(sizes)


FUNCTIONS: Mapping[str, Callable[..., None]] = {
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
    "linalg_vector_norm": _vector_norm,
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
