"""The streaming writer against the ordinary one, byte for byte in what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitdeploy.bundle.protobuf import varint
from vitdeploy.exporter.onnx import save_streaming


def small_model(dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> ir.Model:
    """A sum of weights, in a graph as torch's exporter would hold it."""
    values = []
    for i, shape in enumerate(shapes):
        tensor = ir.tensor(torch.arange(int(np.prod(shape))).reshape(shape).to(dtype), name=f"w{i}")
        values.append(
            ir.Value(
                name=f"w{i}", const_value=tensor, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype)
            )
        )
    node = ir.node("Sum", values, name="sum")
    node.outputs[0].name = "y"
    node.outputs[0].type = values[0].type
    graph = ir.Graph(
        [], [node.outputs[0]], nodes=[node], initializers=values, name="g", opset_imports={"": 20}
    )
    return ir.Model(graph, ir_version=10, producer_name="test")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shapes", [[(3, 5), (1,)], [()], [(300, 300)], []])
def test_the_file_says_what_the_ordinary_writer_says(
    tmp_path: Path, dtype: torch.dtype, shapes: list[tuple[int, ...]]
) -> None:
    shapes = shapes or [(2,)] * 200
    ir.save(small_model(dtype, shapes), tmp_path / "ordinary.onnx")
    save_streaming(small_model(dtype, shapes), tmp_path / "streamed.onnx")
    ordinary, streamed = (onnx.load(tmp_path / f"{name}.onnx") for name in ("ordinary", "streamed"))
    del ordinary.graph.value_info[:]  # it repeats the weights' shapes there
    assert streamed.SerializeToString(deterministic=True) == ordinary.SerializeToString(deterministic=True)
    assert len(streamed.graph.initializer) == len(shapes)


@given(st.integers(0, 2**63 - 1))
def test_varints_are_protobufs(value: int) -> None:
    parsed = onnx.TensorProto()
    parsed.ParseFromString(b"\x10" + varint(value % 2**31))  # data_type, an int32 field
    assert parsed.data_type == value % 2**31
    dims = onnx.TensorProto()
    dims.ParseFromString(b"\x08" + varint(value))  # dims, an int64 field
    assert list(dims.dims) == [value]
