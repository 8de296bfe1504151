"""Quantised GEMMs in a traced graph: QuantizeLinear and DequantizeLinear before each of its two inputs.

``x -> QuantizeLinear -> DequantizeLinear -> MatMul(DequantizeLinear(weight, scale)) -> Add`` is what ONNX
Runtime, OpenVINO and TensorRT fuse to one GEMM of 8 bits. Zero points are 0 and of the stored type: TensorRT
takes no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.convenience import replace_nodes_and_values

from vitdeploy.config import Precision
from vitdeploy.errors import ExportError
from vitdeploy.model.precision import DTYPES
from vitdeploy.quantisation.sites import FP8_LARGEST, AttentionScales, QuantisedSite

_GEMMS = ("MatMul", "Gemm")
_ON_SCORES = ("Mul", "Div", "Add", "Reshape")
"""What may stand between an attention's first product and its softmax."""
_OPSET = 19
"""The first in which QuantizeLinear stores fp8, and reads fp16 and bf16."""
_LEAVE_OUT = "leave it out of the quantised sites"


def insert(
    model: ir.Model,
    sites: Mapping[str, QuantisedSite],
    rest: Precision,
    attention: Mapping[str, AttentionScales] | None = None,
) -> None:
    """Make the GEMMs of ``sites`` quantised ones, in place.

    Args:
        model: traced and tidied: nodes are called ``SITE/MatMul``, weights ``SITE.weight``.
        rest: the precision of scales, and of what is not quantised.
        attention: attentions whose two products are to be fp8, by the name of their module.

    Raises:
        ExportError: a site has no GEMM of its own in the graph, or is in another precision than the rest; a
            scale does not fit into it; the opset has no form of it.
    """
    attention = attention or {}
    fp8 = attention or any(site.kind == "fp8" for site in sites.values())
    if model.opset_imports[""] < _OPSET and (fp8 or rest != "fp32"):
        what = "fp8" if fp8 else f"int8 beside {rest}"
        raise ExportError(
            f"{what} needs opset {_OPSET}, not {model.opset_imports['']}", hint=f"--opset {_OPSET} or more"
        )
    emitter = _Emitter(model.graph, rest)
    for site in sites.values():
        emitter.linear(site)
    for name, scales in attention.items():
        emitter.attention(name, scales)
    emitter.stop_scales()
    model.ir_version = max(model.ir_version, 9)  # the first with fp8


class _Emitter:
    """What inserts into one graph."""

    def __init__(self, graph: ir.Graph, rest: Precision) -> None:
        self.graph, self.rest = graph, rest
        self.floats = DTYPES[rest]
        self.for_cpus = rest == "fp32"
        self.read: dict[tuple[ir.Value, float, torch.dtype, str], ir.Value] = {}
        """What came out of DequantizeLinear already: sites that read one value with one scale share it."""

    def linear(self, site: QuantisedSite) -> None:
        """Quantise what a linear layer reads, and its weight."""
        name, weight = site.name, self.graph.initializers.get(f"{site.name}.weight")
        uses = [] if weight is None else list(weight.uses())
        if len(uses) > 1:
            raise ExportError(
                f"{name} is computed {len(uses)} times with one weight: it cannot be quantised",
                hint=_LEAVE_OUT,
            )
        node = uses[0].node if uses else None
        if weight is None or node is None or node.op_type not in _GEMMS or uses[0].idx != 1:
            raise ExportError(
                f"{name} is no GEMM of its own in the graph: it cannot be quantised", hint=_LEAVE_OUT
            )
        if tuple(weight.shape or ()) != tuple(site.weight.shape):
            raise ExportError(f"{name}: the graph's weight is {weight.shape}, not {tuple(site.weight.shape)}")
        x = self.rounded(name, node.inputs[0], site.input_scale, site.weight.dtype)
        del self.graph.initializers[f"{name}.weight"]
        numbers = self.constant(f"{name}.weight", site.weight)
        scale = self.scale(f"{name}.weight_scale", site.weight_scale)
        read = ir.node(
            "DequantizeLinear",
            [numbers, scale],
            {"axis": 1} if site.weight_scale.dim() else {},
            name=f"{name}.weight/DequantizeLinear",
        )
        self.graph.insert_before(node, read)
        w = _described(read, numbers.shape, scale.dtype)
        if node.op_type == "Gemm":
            node = self.split(name, node)
        node.replace_input_with(0, x)
        node.replace_input_with(1, w)
        if site.kind == "int8" and self.for_cpus:
            self.keep_apart(name, node)

    def split(self, name: str, gemm: ir.Node) -> ir.Node:
        """MatMul and Add in place of Gemm, which ONNX Runtime does not quantise beside a float bias."""
        if any(gemm.attributes.get_int(key, 0) for key in ("transA", "transB")):
            raise ExportError(f"{name}: its Gemm transposes, and cannot be quantised", hint=_LEAVE_OUT)
        old, bias = gemm.outputs[0], gemm.inputs[2] if len(gemm.inputs) > 2 else None
        product = ir.node("MatMul", gemm.inputs[:2], name=f"{name}/MatMul")
        made = [product]
        if bias is not None:
            _described(product, old.shape, old.dtype)
            made.append(ir.node("Add", [product.outputs[0], bias], name=f"{name}/Add"))
        new, label = made[-1].outputs[0], old.name if old.is_graph_output() else made[-1].name
        replace_nodes_and_values(self.graph, gemm, [gemm], made, [old], [new])
        new.name = label
        return product

    def keep_apart(self, name: str, product: ir.Node) -> None:
        """A Reshape to the same shape between a product and its bias, where ONNX Runtime would join them.

        It makes a Gemm of them before it looks for quantised products, wherever rows or a fixed batch let it;
        that Gemm is float.
        """
        value = product.outputs[0]
        users, shape = list(value.uses()), value.shape
        if shape is None or [use.node.op_type for use in users] != ["Add"]:
            return
        if len(shape) > 2 and not all(isinstance(size, int) for size in shape):
            return
        target = np.array([-1, *shape[1:]], np.int64)
        same = ir.node("Reshape", [value, self.constant(f"{name}/Reshape.1", target)], name=f"{name}/Reshape")
        self.graph.insert_after(product, same)
        users[0].node.replace_input_with(users[0].idx, _described(same, shape, value.dtype))

    def attention(self, name: str, scales: AttentionScales) -> None:
        """Quantise queries, keys, probabilities and values to fp8.

        TensorRT fuses it where DequantizeLinear stands directly before a product, and nothing casts.
        """
        softmaxes = [n for n in self.graph if n.op_type == "Softmax" and _site(n) == f"{name}.softmax"]
        if not softmaxes:
            raise ExportError(f"{name} has no softmax in the graph: it is no attention")
        for number, softmax in enumerate(softmaxes, start=1):
            scores, mixed = _products(name, softmax)
            suffix = f"_{number}" if number > 1 else ""
            for node, index, part, scale in (
                (scores, 0, "query", scales.query),
                (scores, 1, "key", scales.key),
                (mixed, 0, "probabilities", 1 / FP8_LARGEST),
                (mixed, 1, "value", scales.value),
            ):
                x = self.rounded(f"{name}.{part}{suffix}", node.inputs[index], scale, torch.float8_e4m3fn)
                node.replace_input_with(index, x)

    def stop_scales(self) -> None:
        """A Reshape before those that make tokens or windows of rows: it ends OpenVINO's way for scales.

        OpenVINO moves the scales of columns behind a Reshape wherever there are as many tokens, or more. It
        answers wrongly then where the one is a multiple of the other, and loads nothing where it is not.
        """
        for node in list(self.graph):
            x = node.inputs[0] if node.op_type == "Reshape" else None
            if x is None or x.shape is None or len(x.shape) != 2 or isinstance(x.shape[0], int):
                continue
            columns, target = x.shape[1], node.inputs[1]
            sizes = target.const_value.numpy().tolist() if target and target.const_value else []
            if len(sizes) < 3 or not isinstance(columns, int):
                continue
            if sizes[1] >= columns:
                name = f"{node.name}_apart"
                shape = self.constant(f"{name}.1", np.array([1, -1, columns], np.int64))
                apart = ir.node("Reshape", [x, shape], name=name)
                self.graph.insert_before(node, apart)
                node.replace_input_with(0, _described(apart, ir.Shape([1, None, columns]), x.dtype))

    def rounded(self, name: str, x: ir.Value | None, scale: float, dtype: torch.dtype) -> ir.Value:
        """``x`` by way of 8 bits; right behind what computes it, so that all who read it may share it."""
        assert x is not None
        if x.dtype is not None and x.dtype != ir.DataType[_ONNX[self.floats]]:
            raise ExportError(
                f"{name} reads {x.dtype.name.lower()} in a graph of {self.rest}", hint=_LEAVE_OUT
            )
        # ONNX Runtime computes in integers only where one product reads a value: on CPUs nothing is shared.
        key = x, scale, dtype, name if self.for_cpus and dtype == torch.int8 else ""
        if key not in self.read:
            step = self.scale(f"{name}.input_scale", torch.tensor(scale))
            zero = self.constant(f"{name}.input_zero", torch.zeros((), dtype=dtype))
            store = ir.node("QuantizeLinear", [x, step, zero], name=f"{name}/QuantizeLinear")
            stored = _described(store, x.shape, zero.dtype)
            load = ir.node("DequantizeLinear", [stored, step, zero], name=f"{name}/DequantizeLinear")
            self.read[key] = _described(load, x.shape, step.dtype)
            if (producer := x.producer()) is not None:
                self.graph.insert_after(producer, [store, load])
            else:
                self.graph.insert_before(self.graph[0], [store, load])
        return self.read[key]

    def scale(self, name: str, value: torch.Tensor) -> ir.Value:
        """A constant in the precision of the rest."""
        rounded = value.to(self.floats)
        if not (rounded.isfinite() & (rounded > 0)).all():
            worst = value.min().item() if (rounded <= 0).any() else value.max().item()
            raise ExportError(f"{name} of {worst:.3g} does not fit into {self.rest}")
        return self.constant(name, rounded)

    def constant(self, name: str, tensor: torch.Tensor | np.ndarray[Any, Any]) -> ir.Value:
        const = ir.tensor(tensor, name=name)
        value = ir.Value(
            name=name, shape=ir.Shape(const.shape.numpy()), type=ir.TensorType(const.dtype), const_value=const
        )
        self.graph.initializers[name] = value
        return value


_ONNX: Mapping[torch.dtype, str] = {
    torch.float32: "FLOAT",
    torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
}


def _described(node: ir.Node, shape: ir.Shape | None, dtype: ir.DataType | None) -> ir.Value:
    """The only output of a new node, named after it."""
    value = node.outputs[0]
    value.name, value.shape = node.name, shape
    value.type = None if dtype is None else ir.TensorType(dtype)
    return value


def _site(node: ir.Node) -> str:
    return (node.name or "").rsplit("/", 1)[0]


def _products(name: str, softmax: ir.Node) -> tuple[ir.Node, ir.Node]:
    """The product of queries and keys before a softmax, and that of probabilities and values behind it."""
    users = [use.node for use in softmax.outputs[0].uses()]
    scores = next((node for node in _upwards(softmax) if node.op_type not in _ON_SCORES), None)
    if scores is None or scores.op_type != "MatMul" or [user.op_type for user in users] != ["MatMul"]:
        between = ", ".join(node.op_type for node in (scores, *users) if node and node.op_type != "MatMul")
        raise ExportError(
            f"{name}: {between or 'nothing'} stands where its softmax meets a product: it cannot be fp8"
        )
    return scores, users[0]


def _upwards(node: ir.Node) -> Iterator[ir.Node]:
    """What computes the first input of a node that is computed, and so on."""
    producers = (value.producer() for value in node.inputs if value is not None)
    producer = next((found for found in producers if found is not None), None)
    if producer is not None:
        yield producer
        yield from _upwards(producer)
