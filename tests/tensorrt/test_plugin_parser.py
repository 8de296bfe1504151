"""Marked graphs in NVIDIA's own parser, that of TensorRT for RTX: it finds the plugin by the node alone.

TensorRT for RTX takes none that is compiled ahead of time, so a creator of the older kind stands in, and the
test ends when it is asked for the plugin.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
import pytest
import tensorrt_rtx as trt
from onnx import TensorProto, helper

from vitdeploy.config import ViTConfig
from vitdeploy.tensorrt.plugin_graph import (
    ATTENTION,
    DOMAIN,
    attention_function,
    mark_plugins,
    strip_functions,
)

TOKENS, HEADS, WIDTH = 17, 2, 16


def attention() -> onnx.ModelProto:
    """A model of one block that is nothing but its attention, nodes and names as the export writes them."""
    function = attention_function(20)
    shapes = {
        "split_shape": [-1, TOKENS, 3 * HEADS, WIDTH],
        "joined_shape": [-1, TOKENS, HEADS * WIDTH],
    }
    nodes = [node for node in function.node if node.op_type != "Constant"]
    for index, node in enumerate(nodes):
        node.name = f"blocks.0.attn/{node.op_type}_{index}"
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("qkv", TensorProto.FLOAT16, ["N", TOKENS, 3 * HEADS * WIDTH])],
        [helper.make_tensor_value_info("mixed", TensorProto.FLOAT16, ["N", TOKENS, HEADS * WIDTH])],
        [helper.make_tensor(name, TensorProto.INT64, [len(shape)], shape) for name, shape in shapes.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
    def __init__(self) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self.name, self.plugin_namespace, self.plugin_version = ATTENTION, DOMAIN, "1"
        self.field_names = trt.PluginFieldCollection([])
        self.made: list[tuple[str, int]] = []

    def create_plugin(self, name: str, fields: Any, phase: object) -> None:
        self.made.append((name, len(fields)))


@pytest.fixture
def creator() -> Iterator[Creator]:
    made, registry = Creator(), trt.get_plugin_registry()
    assert registry.register_creator(made, DOMAIN)
    yield made
    assert registry.deregister_creator(made)


@pytest.fixture(scope="module")
def marked() -> onnx.ModelProto:
    config = ViTConfig(image_size=(64, 64), width=HEADS * WIDTH, depth=1, heads=HEADS)
    model, report = mark_plugins(attention(), config, lambda spec: None)
    assert len(report.marked) == 1
    return model


class Parsed:
    """What the parser makes of a graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.logger = trt.Logger(trt.Logger.ERROR)
        self.builder = trt.Builder(self.logger)
        self.network = self.builder.create_network(0)
        self.parser = trt.OnnxParser(self.network, self.logger)
        self.ok = self.parser.parse(model.SerializeToString())
        errors = (self.parser.get_error(index) for index in range(self.parser.num_errors))
        self.errors = [(error.node_name(), error.desc()) for error in errors]
        layers = (self.network.get_layer(index) for index in range(self.network.num_layers))
        self.layers = [(layer.name, layer.type.name) for layer in layers]


def test_the_parser_asks_for_the_plugin(marked: onnx.ModelProto, creator: Creator) -> None:
    parsed = Parsed(strip_functions(marked))
    assert creator.made == [("blocks.0.attn/fused_attention", 0)]
    assert not parsed.ok
    assert parsed.errors[0][0] == "blocks.0.attn/fused_attention"
    assert "Could not create the plugin" in parsed.errors[0][1]


def test_functions_are_bodies_where_there_is_no_plugin(marked: onnx.ModelProto) -> None:
    parsed = Parsed(marked)
    assert parsed.ok, parsed.errors
    assert [kind for _, kind in parsed.layers].count("MATRIX_MULTIPLY") == 2
    tensor = parsed.network.get_output(0)
    assert (tensor.dtype.name, tuple(tensor.shape)) == ("HALF", (-1, TOKENS, HEADS * WIDTH))


def test_without_the_plugin_it_names_the_node(marked: onnx.ModelProto) -> None:
    parsed = Parsed(strip_functions(marked))
    assert not parsed.ok
    assert [name for name, _ in parsed.errors] == ["blocks.0.attn/fused_attention"]
    assert "Plugin not found" in parsed.errors[0][1]
