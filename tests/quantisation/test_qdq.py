"""The graph of a quantised model: what it holds, what runtimes make of it, and what cannot be quantised."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.models import CONFIGS, pixels, random_vit
from tests.helpers.quantised import HEAD, declared, graph_of, quantised, quantised_file, quantised_vit
from tests.helpers.swins import SWINS, random_swin
from tests.helpers.traces import RANGE, SPREAD
from vitdeploy.bundle.dtypes import Quantised
from vitdeploy.bundle.onnx_graph import prove_precision, undeclared
from vitdeploy.bundle.quantisation import QuantisedGemms
from vitdeploy.config import BatchRange, Precision, ViTConfig
from vitdeploy.errors import ExportError
from vitdeploy.exporter.graph import trace
from vitdeploy.exporter.onnx import save_streaming
from vitdeploy.exporter.shared_weights import SharedWeights
from vitdeploy.model.precision import PrecisionPlan
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.registry import architecture_of
from vitdeploy.quantisation.qdq import insert
from vitdeploy.quantisation.sites import AttentionScales, QuantisedSite
from vitdeploy.verification.gemms import check_gemms

CONFIG = dataclasses.replace(CONFIGS["vit"], depth=2)
GATED = dataclasses.replace(CONFIGS["dinov2"], depth=2)
STORED = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}
FLOATS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}


def opened(
    path: Path, config: ViTConfig, kind: Quantised, rest: Precision = "fp32", attention: bool = False
) -> onnx.ModelProto:
    path.write_bytes(quantised_file(config, kind, rest, attention))
    onnx.checker.check_model(str(path), full_check=True)
    return onnx.load(path)


def on_onnxruntime(path: Path, config: ViTConfig, optimised: Path | None = None) -> float:
    """The relative error against the float model in float64."""
    settings = onnxruntime.SessionOptions()
    if optimised is None:
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
    else:
        settings.optimized_model_filepath = str(optimised)
        settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    x = pixels(config, 3)
    (got,) = session.run(None, {"pixel_values": x.numpy()})
    return off(got, config)


def off(got: np.ndarray, config: ViTConfig) -> float:  # type: ignore[type-arg]
    expected = forward_float64(random_vit(config, spread=SPREAD), pixels(config, 3)).numpy()
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, GATED], ids=["vit", "gated"])
@pytest.mark.parametrize("rest", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_file_holds_the_integers_and_scales_of_its_sites(
    tmp_path: Path, kind: Quantised, rest: Precision, config: ViTConfig
) -> None:
    model = opened(tmp_path / "m.onnx", config, kind, rest)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}
    assert len(nodes) == len(model.graph.node)
    for name, site in quantised_vit(config, kind).sites.items():
        weight, scale = constants[f"{name}.weight"], constants[f"{name}.weight_scale"]
        assert (weight.data_type, scale.data_type) == (STORED[kind], FLOATS[rest])
        stored = numpy_helper.to_array(weight)
        assert (stored.astype(np.float32) == site.weight.float().numpy()).all()
        assert (numpy_helper.to_array(scale).astype(np.float32) == site.weight_scale.numpy()).all()
        assert f"{name}/MatMul" in nodes
        read = next(n for n in model.graph.node if n.output[0] == nodes[f"{name}/MatMul"].input[0])
        assert float(numpy_helper.to_array(constants[read.input[1]])) == site.input_scale
        zero = constants[read.input[2]]
        assert (zero.data_type, bytes(zero.raw_data or b"\0")) == (STORED[kind], b"\0")
    assert f"{HEAD}/Gemm" in nodes
    # Nothing else is cast: as many Casts as in the float file.
    float_model = graph_of(quantised_vit(config, kind), config, rest)
    casts = sum(node.op_type == "Cast" for node in float_model.graph)
    assert sum(node.op_type == "Cast" for node in model.graph.node) == casts
    assert prove_precision(model, rest, NORMS, declared(config, kind)).ok


NORMS = ("norm", *(f"blocks.{i}.norm{j}" for i in range(2) for j in (1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("kind, rest, shares", [("int8", "fp16", 2), ("fp8", "fp32", 2), ("int8", "fp32", 0)])
def test_sites_that_read_the_same_share_it(
    tmp_path: Path, kind: Quantised, rest: Precision, shares: int
) -> None:
    """But in int8 on CPUs, where ONNX Runtime wants a value for each product."""
    model = opened(tmp_path / "m.onnx", GATED, kind, rest)
    nodes = {node.name: node for node in model.graph.node}
    gate, fc1 = (nodes[f"blocks.0.mlp.{part}/MatMul"].input[0] for part in ("gate", "fc1"))
    assert (gate == fc1) == bool(shares)
    sites = len(quantised_vit(GATED, kind).sites)
    operators = Counter(node.op_type for node in model.graph.node)
    assert operators["QuantizeLinear"] == sites - shares  # one of gate and fc1 in each block
    assert operators["DequantizeLinear"] == 2 * sites - shares


@pytest.mark.slow
@pytest.mark.parametrize("batch", [RANGE, BatchRange(3, 3, 3)], ids=["dynamic", "fixed"])
@pytest.mark.parametrize("config", [CONFIG, GATED], ids=["vit", "gated"])
def test_onnxruntime_computes_in_integers(tmp_path: Path, config: ViTConfig, batch: BatchRange) -> None:
    """Over rows and with a fixed batch too, where it would make float Gemms of products and biases."""
    made = quantised_vit(config, "int8")
    model = graph_of(made, config, "fp32", batch=batch)
    insert(model, made.sites, "fp32")
    ir.save(model, tmp_path / "m.onnx")
    assert on_onnxruntime(tmp_path / "m.onnx", config, tmp_path / "optimised.onnx") < 0.1
    fused = onnx.load(tmp_path / "optimised.onnx").graph
    operators = Counter(node.op_type for node in fused.node)
    assert operators["MatMulIntegerToFloat"] == len(quantised_vit(config, "int8").sites)
    assert operators["DequantizeLinear"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("rest", ["fp32", "fp16"])
@pytest.mark.parametrize("attention", [False, True])
def test_onnxruntime_reads_fp8(tmp_path: Path, attention: bool, rest: Precision) -> None:
    opened(tmp_path / "m.onnx", CONFIG, "fp8", rest, attention)
    assert on_onnxruntime(tmp_path / "m.onnx", CONFIG) < (0.25 if attention else 0.15)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_openvino_reads_both_and_computes_int8_in_integers(tmp_path: Path, kind: Quantised) -> None:
    openvino = pytest.importorskip("openvino")
    opened(tmp_path / "m.onnx", CONFIG, kind)
    core = openvino.Core()
    compiled = core.compile_model(str(tmp_path / "m.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    (got,) = compiled([pixels(CONFIG, 3).numpy()]).values()
    assert off(got, CONFIG) < {"int8": 0.1, "fp8": 0.15}[kind]
    infos = [operation.get_rt_info() for operation in compiled.get_runtime_model().get_ops()]
    gemms = Counter(
        info["runtimePrecision"].astype(str)
        for info in infos
        if info["layerType"].astype(str) == "FullyConnected"
    )
    if kind == "int8":
        assert gemms["i8"] == len(quantised_vit(CONFIG, "int8").sites)


@pytest.mark.slow
def test_the_products_of_an_attention_are_fp8_without_casts(tmp_path: Path) -> None:
    model = opened(tmp_path / "m.onnx", CONFIG, "fp8", "fp16", attention=True)
    producers = {output: node for node in model.graph.node for output in node.output}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    made = quantised_vit(CONFIG, "fp8")
    assert list(made.attention) == ["blocks.0.attn"]  # the last block's is absorbed
    nodes = {node.name: node for node in model.graph.node}
    scores, mixed = nodes["blocks.0.attn/MatMul"], nodes["blocks.0.attn/MatMul_2"]
    scales = made.attention["blocks.0.attn"]
    expected = (scales.query, scales.key, 1 / 448, scales.value)
    for value, scale in zip((*scores.input, *mixed.input), expected, strict=True):
        load = producers[value]
        store = producers[load.input[0]]
        assert (load.op_type, store.op_type) == ("DequantizeLinear", "QuantizeLinear")
        assert constants[load.input[1]] == np.float16(scale)
        assert producers[store.input[0]].op_type != "Cast"
    assert prove_precision(model, "fp16", NORMS, declared(CONFIG, "fp8", attention=True)).ok
    # Undeclared, they are found by name.
    proof = prove_precision(model, "fp16", NORMS, declared(CONFIG, "fp8"))
    assert not proof.ok
    wrong = undeclared(proof.ops, "fp16", declared(CONFIG, "fp8"))
    assert [row.name for row in wrong] == ["blocks.0.attn/MatMul", "blocks.0.attn/MatMul_2"]


@pytest.mark.slow
def test_scales_of_an_attention_are_its_largest_magnitudes() -> None:
    made = quantised_vit(CONFIG, "fp8")
    model, found = quantised_vit(CONFIG, "fp8").model, {}
    attention = model.blocks[0].attn

    def look(_: object, args: object, qkv: torch.Tensor) -> None:
        for name, part in zip(("query", "key", "value"), qkv.chunk(3, dim=-1), strict=True):
            found[name] = part.abs().max().item() / 448

    hook = attention.qkv.register_forward_hook(look)  # type: ignore[union-attr]
    with torch.no_grad():
        model(pixels(CONFIG, 4, seed=5))
    hook.remove()
    # The scales were taken before the weights were rounded.
    assert dataclasses.asdict(made.attention["blocks.0.attn"]) == pytest.approx(found, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v1", "padded"])
def test_a_swin_is_int8_on_both(tmp_path: Path, name: str) -> None:
    """All its GEMMs are over rows, whose scales OpenVINO would move to tokens."""
    config, path = SWINS[name], tmp_path / "m.onnx"
    plan = PrecisionPlan.of("fp32")
    deployed = architecture_of(config).deploy(
        random_swin(config), plan, outputs=("logits",), input_kind="float", preprocess=None
    )  # type: ignore[arg-type]
    made = quantised(deployed, pixels(config, 4, seed=5), "int8")
    model = trace(made.model, pixels(config, 1), batch=RANGE, opset=20, names=("pixel_values", "logits"))
    insert(model, made.sites, "fp32")
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    settings.log_severity_level = 3
    onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
    assert sum(node.op_type == "MatMulIntegerToFloat" for node in nodes) == len(made.sites)
    for backend in ("onnxruntime", "openvino"):
        records = check_gemms(path, None, backend, pixels(config, 2).numpy())
        assert {record.site for record in records if record.passed} == set(made.sites)
    # With its GEMMs shown OpenVINO fuses less, so the whole is looked at, too.
    openvino = pytest.importorskip("openvino")
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    (answers,) = session.run(None, {"pixel_values": pixels(config, 2).numpy()})
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    others = compiled([pixels(config, 2).numpy()])[0]
    assert np.linalg.norm(others - answers) < 0.1 * np.linalg.norm(answers)


def rows_to_tokens(tokens: int, columns: int) -> ir.Model:
    """A norm over rows, which become tokens before they are multiplied."""
    generator = np.random.default_rng(0)
    constants = {
        "gain": generator.uniform(0.5, 1.5, columns).astype(np.float32),
        "shape": np.array([-1, tokens, columns], np.int64),
        "fc.weight": generator.standard_normal((columns, 24)).astype(np.float32),
    }
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gain"], ["normed"], name="norm/LayerNormalization"),
        helper.make_node("Reshape", ["normed", "shape"], ["tokens"], name="cut/Reshape"),
        helper.make_node("MatMul", ["tokens", "fc.weight"], ["y"], name="fc/MatMul"),
    ]
    graph = helper.make_graph(
        nodes,
        "rows",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["R", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", tokens, 24])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [8, 16, 24, 32])
def test_openvino_keeps_the_scales_of_columns_on_columns(tmp_path: Path, tokens: int) -> None:
    openvino = pytest.importorskip("openvino")
    model = rows_to_tokens(tokens, 16)
    const = model.graph.initializers["fc.weight"].const_value
    assert const is not None
    weight = torch.from_numpy(const.numpy().copy())
    scale = weight.abs().amax(0) / 63
    stored = (weight / scale).round().to(torch.int8)
    insert(model, {"fc": QuantisedSite("fc", "int8", stored, scale, 0.03, None)}, "fp32")
    ir.save(model, tmp_path / "m.onnx")
    x = np.random.default_rng(1).standard_normal((2 * tokens, 16)).astype(np.float32)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": x})
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    (got,) = openvino.Core().compile_model(str(tmp_path / "m.onnx"), "CPU", hint)([x]).values()
    assert np.linalg.norm(got - expected) < 1e-2 * np.linalg.norm(expected)


# --- planted faults, found by name ----------------------------------------------------------------------


@pytest.mark.slow
def test_a_zero_point_that_tensorrt_does_not_take(tmp_path: Path) -> None:
    model = opened(tmp_path / "m.onnx", CONFIG, "int8")
    zero = next(t for t in model.graph.initializer if t.name == "blocks.0.mlp.fc1.input_zero")
    zero.CopyFrom(numpy_helper.from_array(np.array(128, np.uint8), zero.name))
    assert wrong(model) == {"blocks.0.mlp.fc1/MatMul": "undefined"}
    zero.CopyFrom(numpy_helper.from_array(np.array(0, np.uint8), zero.name))
    assert wrong(model) == {"blocks.0.mlp.fc1/MatMul": "uint8"}
    zero.CopyFrom(numpy_helper.from_array(np.array(3, np.int8), zero.name))
    assert wrong(model) == {"blocks.0.mlp.fc1/MatMul": "undefined"}


@pytest.mark.slow
def test_a_site_that_is_silently_float(tmp_path: Path) -> None:
    model = opened(tmp_path / "m.onnx", CONFIG, "int8")
    node = next(n for n in model.graph.node if n.name == "blocks.1.mlp.fc2/MatMul")
    producers = {output: n for n in model.graph.node for output in n.output}
    node.input[0] = producers[producers[node.input[0]].input[0]].input[0]
    assert wrong(model) == {"blocks.1.mlp.fc2/MatMul": "float32"}
    node.name = "elsewhere/MatMul"
    assert wrong(model) == {"blocks.1.mlp.fc2": "undefined"}


@pytest.mark.slow
def test_a_site_that_is_quantised_without_being_declared(tmp_path: Path) -> None:
    model = opened(tmp_path / "m.onnx", CONFIG, "int8")
    said = declared(CONFIG, "int8")
    fewer = QuantisedGemms(kind="int8", sites=said.sites[1:])
    proof = prove_precision(model, "fp32", (), fewer)
    assert [row.name for row in undeclared(proof.ops, "fp32", fewer)] == [f"{said.sites[0]}/MatMul"]
    assert not proof.ok


def wrong(model: onnx.ModelProto) -> dict[str, str]:
    said = declared(CONFIG, "int8")
    proof = prove_precision(model, "fp32", (), said)
    assert not proof.ok
    return {row.name: row.dtype for row in undeclared(proof.ops, "fp32", said)}


# --- what cannot be quantised ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, rest, said", [("fp8", "fp32", "fp8 needs opset 19"), ("int8", "fp16", "int8 beside fp16 needs")]
)
def test_an_opset_without_it(kind: Quantised, rest: Precision, said: str) -> None:
    model = graph_of(quantised_vit(CONFIG, kind), CONFIG, rest, opset=18)
    with pytest.raises(ExportError, match=said):
        insert(model, quantised_vit(CONFIG, kind).sites, rest)


@pytest.mark.slow
def test_what_has_no_gemm_of_its_own() -> None:
    made = quantised_vit(CONFIG, "int8")
    site = made.sites["blocks.0.mlp.fc1"]
    model = graph_of(made, CONFIG, "fp32")
    with pytest.raises(ExportError, match=r"norm is no GEMM of its own in the graph"):
        insert(model, {"norm": dataclasses.replace(site, name="norm")}, "fp32")
    with pytest.raises(ExportError, match=r"fc1 reads float in a graph of fp16"):
        insert(model, {site.name: site}, "fp16")
    tiny = dataclasses.replace(site, input_scale=0.0)
    with pytest.raises(ExportError, match=r"blocks\.0\.mlp\.fc1\.input_scale of 0 does not fit into fp32"):
        insert(model, {site.name: tiny}, "fp32")
    with pytest.raises(ExportError, match=r"blocks\.0\.mlp has no softmax in the graph"):
        insert(model, {}, "fp32", {"blocks.0.mlp": AttentionScales(1.0, 1.0, 1.0)})
    nodes = {node.name: node for node in model.graph}
    nodes["blocks.0.mlp.fc1/MatMul"].replace_input_with(
        1, model.graph.initializers["blocks.1.mlp.fc1.weight"]
    )
    twice = dataclasses.replace(site, name="blocks.1.mlp.fc1")
    with pytest.raises(ExportError, match=r"blocks\.1\.mlp\.fc1 is computed 2 times with one weight"):
        insert(model, {twice.name: twice}, "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_file_of_weights_that_sizes_share(tmp_path: Path, kind: Quantised) -> None:
    """Both graphs refer to the same 8 bits, and compute what the file of its own computes."""
    shared = SharedWeights(tmp_path / "weights.bin")
    paths = [tmp_path / "first.onnx", tmp_path / "second.onnx"]
    model = ir.from_proto(onnx.load_from_string(quantised_file(CONFIG, kind)))
    for path in paths:
        assert shared.take(model)
        save_streaming(model.clone(), path)
    onnx.checker.check_model(str(paths[1]), full_check=True)
    (tmp_path / "alone.onnx").write_bytes(quantised_file(CONFIG, kind))
    assert on_onnxruntime(paths[1], CONFIG) == on_onnxruntime(tmp_path / "alone.onnx", CONFIG)
    stored = {t.name: t for t in onnx.load(paths[1], load_external_data=False).graph.initializer}
    assert stored["blocks.0.attn.qkv.weight"].data_location == TensorProto.EXTERNAL
    assert shared.path.stat().st_size < 2 * (tmp_path / "alone.onnx").stat().st_size
