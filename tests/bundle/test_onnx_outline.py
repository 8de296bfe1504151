"""Outlines of ONNX files against what onnx itself reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vitdeploy.bundle.onnx_outline import LEAST, read_outline, weights_as_inputs
from vitdeploy.errors import UsageError

SIDE = 200


def small_file(path: Path) -> onnx.ModelProto:
    """One product with a large weight, and a Reshape with a small constant."""
    weight = numpy_helper.from_array(np.ones((SIDE, SIDE), np.float32), "weight")
    shape = numpy_helper.from_array(np.array([-1, SIDE], np.int64), "shape")
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["rows"], name="rows"),
        helper.make_node("MatMul", ["rows", "weight"], ["y"], name="product"),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", SIDE]) for name in "xy")
    graph = helper.make_graph(nodes, "graph", [x], [y], [weight, shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model.metadata_props.add(key="known", value="yes")
    onnx.save(model, path)
    return model


def test_an_outline_lacks_large_numbers_only(tmp_path: Path) -> None:
    model = small_file(tmp_path / "m.onnx")
    outline = read_outline(tmp_path / "m.onnx")
    assert len(model.graph.initializer[0].raw_data) > LEAST
    model.graph.initializer[0].ClearField("raw_data")
    assert outline == model


def test_an_outline_is_checked_as_the_whole_is(tmp_path: Path) -> None:
    small_file(tmp_path / "m.onnx")
    outline = read_outline(tmp_path / "m.onnx")
    whole = weights_as_inputs(outline)
    assert [value.name for value in whole.graph.input] == ["x", "weight"]
    assert [tensor.name for tensor in whole.graph.initializer] == ["shape"]
    onnx.checker.check_model(whole, full_check=True)
    outline.graph.initializer[0].dims[0] = SIDE + 1  # no product of these is possible
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.checker.check_model(weights_as_inputs(outline), full_check=True)


@pytest.mark.parametrize("cut", [1, 1000, 100_000])
def test_a_file_that_ends_too_early(tmp_path: Path, cut: int) -> None:
    small_file(tmp_path / "m.onnx")
    data = (tmp_path / "m.onnx").read_bytes()
    (tmp_path / "m.onnx").write_bytes(data[:-cut])
    with pytest.raises(UsageError, match="not a readable ONNX file"):
        read_outline(tmp_path / "m.onnx")
