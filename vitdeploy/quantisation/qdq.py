"""Quantised GEMMs in a traced graph: QuantizeLinear and DequantizeLinear before each of its two inputs.

``x -> QuantizeLinear -> DequantizeLinear -> MatMul(DequantizeLinear(weight, scale)) -> Add`` is what ONNX Runtime,
OpenVINO and TensorRT fuse to one GEMM of 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch

from vitdeploy.config import Precision
from vitdeploy.errors import ExportError
from vitdeploy.model.precision import DTYPES
from vitdeploy.quantisation.sites import QuantisedSite

_GEMMS = ("MatMul", "Gemm")


def insert(model: ir.Model, sites: Mapping[str, QuantisedSite], rest: Precision) -> None:
    """Make the GEMMs of ``sites`` quantised ones, in place.

    Args:
        model: traced and tidied: nodes are called ``SITE/MatMul``, weights ``SITE.weight``.
        rest: the precision of scales, and of what is not quantised.

    Raises:
        ExportError: a site has no GEMM of its own in the graph.
    """
    graph = model.graph
    nodes = {node.name: node for node in graph}
    for name, site in sites.items():
        node = next((nodes[f"{name}/{op}"] for op in _GEMMS if f"{name}/{op}" in nodes), None)
        weight = graph.initializers.get(f"{name}.weight")
        if node is None or weight is None or node.inputs[1] is not weight or len(list(weight.uses())) != 1:
            raise ExportError(f"{name} is no GEMM of its own in the graph, and cannot be quantised")
        _quantise(graph, node, weight, site, rest)


def _quantise(graph: ir.Graph, node: ir.Node, weight: ir.Value, site: QuantisedSite, rest: Precision) -> None:
    def constant(name: str, tensor: torch.Tensor) -> ir.Value:
        const = ir.tensor(tensor, name=name)
        value = ir.Value(
            name=name, shape=ir.Shape(const.shape.numpy()), type=ir.TensorType(const.dtype), const_value=const
        )
        graph.initializers[name] = value
        return value

    def op(
        kind: str, inputs: list[ir.Value], name: str, like: ir.Value, dtype: ir.Value, **attributes: int
    ) -> ir.Value:
        made = ir.node(kind, inputs, attributes, name=name)
        made.outputs[0].name, made.outputs[0].shape, made.outputs[0].type = name, like.shape, dtype.type
        graph.insert_before(node, made)
        return made.outputs[0]

    name, x, floats = site.name, node.inputs[0], DTYPES[rest]
    assert x is not None
    scale = constant(f"{name}.input_scale", torch.tensor(site.input_scale, dtype=floats))
    zero = constant(f"{name}.input_zero", torch.zeros((), dtype=site.weight.dtype))
    stored = op("QuantizeLinear", [x, scale, zero], f"{name}/QuantizeLinear", x, zero)
    read = op("DequantizeLinear", [stored, scale, zero], f"{name}/DequantizeLinear", x, scale)
    del graph.initializers[f"{name}.weight"]
    numbers = constant(f"{name}.weight", site.weight)
    steps = constant(f"{name}.weight_scale", site.weight_scale.to(floats))
    axis = {"axis": 1} if site.weight_scale.dim() else {}
    weights = op(
        "DequantizeLinear", [numbers, steps], f"{name}.weight/DequantizeLinear", numbers, steps, **axis
    )
    node.replace_input_with(0, read)
    node.replace_input_with(1, weights)
