"""Layers of networks and of engines, and what the precision proof makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests.fakes.machines import FULL, NEW, RTX
from tests.fakes.tensorrt import make_tensorrt
from tests.fakes.tensorrt_builds import Built, attention
from vitdeploy.bundle.proofs import OpPrecision, PrecisionProof
from vitdeploy.config import Precision
from vitdeploy.errors import ExportError, PrecisionError
from vitdeploy.tensorrt.proof import (
    Layer,
    check_built,
    inspected_layers,
    network_layers,
    onnx_nodes,
    prove_network,
    require,
)

SHAPES = [(1, 3, 4), (2, 3, 4), (8, 3, 4)]


def layers_of(version: str, model: bytes) -> list[Layer]:
    return network_layers(Built(make_tensorrt(version), model, "x", SHAPES).network)


def quantised(*, weight: bool = True, through: str = "") -> bytes:
    """A MatMul whose operands come out of DequantizeLinear; ``through`` is an operator in between."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="d"),
        helper.make_node("DequantizeLinear", ["weight", "scale", "zero"], ["w"], name="w"),
    ]
    left, right = "d", "w" if weight else "plain"
    if through == "Transpose":
        nodes.append(helper.make_node("Transpose", ["d"], ["t"], name="t", perm=[0, 1, 2]))
        left = "t"
    elif through:
        nodes.append(helper.make_node(through, ["d"], ["t"], name="t"))
        left = "t"
    nodes.append(helper.make_node("MatMul", [left, right], ["y"], name="head"))
    constants = {
        "scale": np.float32(0.1),
        "zero": np.int8(0),
        "weight": np.ones((4, 4), np.int8),
        "plain": np.ones((4, 4), np.float32),
    }
    made = helper.make_graph(
        nodes,
        "quantised",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3, 4])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


@pytest.mark.parametrize("version", [*FULL, RTX])
def test_the_layers_of_a_network(version: str) -> None:
    found = {layer.name: layer for layer in layers_of(version, attention())}
    scores = found["attn/MatMul"]
    assert (scores.kind, scores.nodes) == ("MATRIX_MULTIPLY", ("attn/MatMul",))
    assert (scores.inputs, scores.outputs) == (("float16", "float16"), ("float16",))
    assert (scores.reads, scores.writes) == (("q", "k"), ("scores",))
    assert scores.columns == 4
    assert scores.quantised is None
    assert found["weight"].nodes == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, narrow",
    [
        ({}, "int8"),
        ({"through": "Transpose"}, "int8"),
        ({"through": "Relu"}, None),
        ({"weight": False}, None),
    ],
)
@pytest.mark.parametrize("version", [NEW, RTX])
def test_a_quantised_product(version: str, options: dict[str, Any], narrow: str | None) -> None:
    layers = layers_of(version, quantised(**options))
    (product,) = (layer for layer in layers if layer.kind == "MATRIX_MULTIPLY")
    assert product.quantised == narrow
    proof = prove_network(layers, "fp16", ())
    assert proof.ok == (narrow is not None)
    (gemm,) = (op for op in proof.ops if op.op == "MatMul")
    assert gemm.dtype == (narrow or "float32")


@pytest.mark.parametrize(
    "text, dtype",
    [
        ("Half", "float16"),
        ("FP16", "float16"),
        ("Row major linear FP16 format (kLINEAR)", "float16"),
        ("Channel major FP16 format where channel % 8 == 0", "float16"),
        ("Row-Major Half", "float16"),
        ("BFloat16", "bfloat16"),
        ("BF16", "bfloat16"),
        ("Row major linear BF16 format", "bfloat16"),
        ("Row major linear BFloat16 format", "bfloat16"),
        ("Float", "float32"),
        ("FP32", "float32"),
        ("Row major linear FP32 format (kLINEAR)", "float32"),
        ("FP8", "float8e4m3fn"),
        ("Row major linear FP8 format", "float8e4m3fn"),
        ("Int8", "int8"),
        ("Four wide channel vectorized row major Int8 format", "int8"),
        ("Int32", "int32"),
        ("Row major linear INT32 format", "int32"),
        ("Int64", "int64"),
        ("Bool", "undefined"),
        ("FP4E2M1", "undefined"),
        ("", "undefined"),
    ],
)
@pytest.mark.parametrize("keys", [("Format/Datatype",), ("Format", "Datatype"), ("DataType",), ("Type",)])
def test_how_reports_spell_a_type(keys: tuple[str, ...], text: str, dtype: str) -> None:
    tensor = dict.fromkeys(keys, text)
    report = {"Layers": [{"Name": "a", "LayerType": "kgen", "Inputs": [tensor], "Outputs": []}]}
    (layer,) = inspected_layers(json.dumps(report))
    assert layer.inputs == (dtype,)


@pytest.mark.parametrize(
    "metadata, nodes",
    [
        ("", ()),
        ("[ONNX Layer: blocks.0.attn/MatMul]", ("blocks.0.attn/MatMul",)),
        ("[ONNX Layer: a]\x1f[ONNX Layer: b]\x1f[ONNX Layer: a]", ("a", "b")),
        ("[ONNX Layer: a] [ONNX Layer: b]", ("a", "b")),
        ("something else", ()),
    ],
)
def test_the_nodes_that_metadata_names(metadata: str, nodes: tuple[str, ...]) -> None:
    assert onnx_nodes(metadata) == nodes


@pytest.mark.slow
@given(st.lists(st.text(st.characters(exclude_characters="[]\x1f"), min_size=1), max_size=8))
def test_any_nodes_are_found_again(names: list[str]) -> None:
    metadata = "\x1f".join(f"[ONNX Layer: {name}]" for name in names)
    assert onnx_nodes(metadata) == tuple(dict.fromkeys(names))


@pytest.mark.parametrize(
    "report",
    [
        "",
        "junk",
        "{}",
        "[]",
        '{"Layers": 3}',
        '{"Layers": ["name only"]}',
        '{"Layers": [{"Name": "a"}]}',
        "null",
    ],
)
def test_what_is_no_report(report: str) -> None:
    with pytest.raises(ExportError, match="another form than expected"):
        inspected_layers(report)


def layer(name: str, *inputs: str, kind: str = "MATRIX_MULTIPLY", **more: Any) -> Layer:
    return Layer(name, kind, inputs, ("float16",), (name,), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "layers, precision, islands, wide",
    [
        ([layer("head", "float16")], "fp16", (), None),
        ([layer("head", "bfloat16")], "bf16", (), None),
        ([layer("head", "float32")], "fp32", (), None),
        ([layer("head", "float32")], "fp16", (), "head (float32)"),
        ([layer("head", "bfloat16")], "fp16", (), "head (bfloat16)"),
        ([layer("head", "float32")], "fp16", ("head",), None),
        ([layer("header/MatMul", "float32")], "fp16", ("head",), "header/MatMul (float32)"),
        ([layer("head", "float32", quantised="int8")], "fp16", (), None),
        ([layer("a", "float32"), layer("b", "float32")], "fp16", (), "a (float32), b (float32)"),
        ([layer("conv", "float32", kind="CONVOLUTION")], "fp16", (), "conv (float32)"),
        ([layer("head", "float16"), layer("n", "float32", kind="NORMALIZATION")], "fp16", (), None),
        ([], "fp16", (), "no GEMM found"),
        ([layer("a", "float16", kind="ELEMENTWISE")], "fp16", (), "no GEMM found"),
    ],
)
def test_the_proof(
    layers: list[Layer], precision: Precision, islands: tuple[str, ...], wide: str | None
) -> None:
    proof = prove_network(layers, precision, islands)
    assert proof.ok == (wide is None)
    if wide is None:
        require(proof, precision, "an engine")
    else:
        with pytest.raises(PrecisionError) as caught:
            require(proof, precision, "an engine")
        assert caught.value.message == f"an engine would not be {precision} everywhere: {wide}"


@pytest.mark.parametrize(
    "kernel, refused",
    [
        (layer("head", "float32"), True),
        (layer("head", "float32", "int32"), True),
        (layer("head", "float32", "float16"), False),
        (layer("head", "float16"), False),
        (layer("head", "undefined"), False),
        (layer("norm", "float32"), False),
        (Layer("fused", "kgen", ("float32",), (), ("norm", "head")), True),
        (Layer("fused", "kgen", ("float32",), (), ("head", "patch_embed/Cast")), False),
    ],
)
def test_a_built_engine_is_held_against_the_proof(kernel: Layer, refused: bool) -> None:
    ops: list[Mapping[str, Any]] = [
        {"name": "head", "op": "MatMul", "dtype": "float16"},
        {"name": "norm", "op": "LayerNormalization", "dtype": "float16"},
    ]
    proof = PrecisionProof(ops=tuple(OpPrecision(**op) for op in ops), ok=True)
    if refused:
        with pytest.raises(PrecisionError, match=r"computes head in fp32"):
            check_built([kernel], proof, "model.plan")
    else:
        check_built([kernel], proof, "model.plan")
