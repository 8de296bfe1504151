"""Small ONNX graphs for builders of engines: quantised, with foreign operators, with one GEMM too wide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH = 64


def quantised(element_type: int) -> onnx.ModelProto:
    """One fp16 product whose operands pass through QuantizeLinear and DequantizeLinear."""
    scale = numpy_helper.from_array(np.array(0.1, np.float16), "scale")
    zero = helper.make_tensor("zero", element_type, [], [0])
    weight = numpy_helper.from_array(np.eye(WIDTH, dtype=np.float16), "weight")
    nodes = []
    for name in ("x", "weight"):
        narrow, back = [f"{name}_q", "scale", "zero"], [f"{name}_d"]
        nodes.append(
            helper.make_node("QuantizeLinear", [name, "scale", "zero"], narrow[:1], name=f"{name}/Q")
        )
        nodes.append(helper.make_node("DequantizeLinear", narrow, back, name=f"{name}/DQ"))
    nodes.append(helper.make_node("MatMul", ["x_d", "weight_d"], ["y"], name="fc/MatMul"))
    return _model(nodes, [scale, zero, weight])


def foreign() -> onnx.ModelProto:
    """Three operators that TensorRT lacks, one of them of another domain, between two that it has."""
    weight = numpy_helper.from_array(np.eye(WIDTH, dtype=np.float16), "weight")
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["a"], name="blocks.0.fc/MatMul"),
        helper.make_node("Magic", ["a"], ["b"], name="blocks.0.magic/Magic", domain="my.domain"),
        helper.make_node("Unique", ["b"], ["c"], name="blocks.1/Unique"),
        helper.make_node("Bernoulli", ["c"], ["d"], name="blocks.2.noise/Bernoulli"),
        helper.make_node("MatMul", ["d", "weight"], ["y"], name="head/MatMul"),
    ]
    return _model(nodes, [weight])


def widen(path: Path, node_name: str) -> None:
    """Doctor a file: this node's GEMM in fp32, with casts around it, as a careless tool would leave it."""
    model = onnx.load(path)
    position = next(i for i, node in enumerate(model.graph.node) if node.name == node_name)
    gemm = model.graph.node[position]
    before = []
    for index, value in enumerate(gemm.input):
        wide = f"{value}/wide"
        before.append(helper.make_node("Cast", [value], [wide], name=f"{wide}/Cast", to=TensorProto.FLOAT))
        gemm.input[index] = wide
    result = gemm.output[0]
    gemm.output[0] = f"{result}/wide"
    after = helper.make_node(
        "Cast", [gemm.output[0]], [result], name=f"{result}/Cast", to=TensorProto.FLOAT16
    )
    nodes = [*model.graph.node[:position], *before, gemm, after, *model.graph.node[position + 1 :]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    kept = [info for info in model.graph.value_info if info.name != result]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    onnx.save(model, path)


def in_bfloat16() -> onnx.ModelProto:
    """One bf16 product."""
    weight = helper.make_tensor(
        "weight", TensorProto.BFLOAT16, (WIDTH, WIDTH), np.eye(WIDTH).ravel().tolist()
    )
    model = _model([helper.make_node("MatMul", ["x", "weight"], ["y"], name="fc/MatMul")], [weight])
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    return model


def _model(nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["N", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["N", WIDTH])],
        constants,
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("my.domain", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)
