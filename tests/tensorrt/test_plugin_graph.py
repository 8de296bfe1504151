"""Marked graphs against plain ones: the same nodes, the same numbers, a reason for what is not marked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from tests.helpers import interpreter
from tests.helpers.models import CONFIGS, pixels, random_vit
from vitdeploy.config import BatchRange, Precision, ViTConfig
from vitdeploy.exporter.graph import trace
from vitdeploy.model.precision import DTYPES, PrecisionPlan
from vitdeploy.model.rewrites import lower
from vitdeploy.tensorrt import plugin_kernels
from vitdeploy.tensorrt.plugin_graph import (
    ATTENTION,
    DOMAIN,
    FLOAT32_SOFTMAX,
    PluginReport,
    PluginSite,
    PluginSpec,
    mark_plugins,
    plugin_specs,
    strip_functions,
)

assert interpreter  # imported before Triton is

ABSORBED = "the absorbed last block attends for the tokens that are read, without keys and values"
FOREIGN = "the graph is not as vitdeploy exports it"


def emit(
    config: ViTConfig,
    precision: Precision = "fp16",
    *,
    islands: frozenset[str] = frozenset(),
    opset: int = 20,
    batch: BatchRange | None = None,
) -> onnx.ModelProto:
    """The graph that the export of a model with random weights writes."""
    plan = PrecisionPlan(DTYPES[precision], islands)
    names = ("pixel_values", "logits")
    deployed = lower(random_vit(config, spread=0.2), plan)
    return ir.to_proto(
        trace(deployed, pixels(config, 1), batch=batch or BatchRange(), opset=opset, names=names)
    )


def anything(spec: PluginSpec) -> None:
    """No kernel refuses anything."""


def run(model: onnx.ModelProto, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    result: np.ndarray[Any, Any] = session.run(None, {"pixel_values": images})[0]
    return result


def shape_of_graph(model: onnx.ModelProto) -> list[tuple[Any, ...]]:
    """Every node with its attributes and where its inputs come from, whatever it is called."""
    constants: dict[str, Any] = {
        tensor.name: numpy_helper.to_array(tensor).tolist() if tensor.data_type == 7 else tensor.name
        for tensor in model.graph.initializer
    }
    places: dict[str, Any] = {value.name: value.name for value in model.graph.input} | constants
    nodes: list[tuple[Any, ...]] = []
    for node in model.graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant":
            places[node.output[0]] = attributes["value_ints"]
            continue
        places.update({name: (len(nodes), i) for i, name in enumerate(node.output)})
        inputs = [places[name] for name in node.input]
        nodes.append((node.op_type, node.domain, inputs, sorted(attributes.items())))
    return nodes


@pytest.fixture(scope="module")
def plain() -> onnx.ModelProto:
    """25 tokens, three heads of 16 columns; the last of its three blocks is the absorbed one."""
    return emit(CONFIGS["vit"])


def marked_of(
    model: onnx.ModelProto, config: ViTConfig = CONFIGS["vit"]
) -> tuple[onnx.ModelProto, PluginReport]:
    return mark_plugins(model, config, anything)


def test_one_node_stands_for_a_region(plain: onnx.ModelProto) -> None:
    before = plain.SerializeToString(deterministic=True)
    marked, report = marked_of(plain)
    assert plain.SerializeToString(deterministic=True) == before
    assert report.sites == (
        PluginSite("blocks.0.attn", ATTENTION),
        PluginSite("blocks.1.attn", ATTENTION),
        PluginSite("blocks.2.attn", ATTENTION, ABSORBED),
    )
    assert str(report) == f"fused_attention: 2 of 3 blocks (blocks.2.attn: {ABSORBED})"
    assert [site.site for site in report.marked] == ["blocks.0.attn", "blocks.1.attn"]
    nodes = [node for node in marked.graph.node if node.domain == DOMAIN]
    assert [node.name for node in nodes] == ["blocks.0.attn/fused_attention", "blocks.1.attn/fused_attention"]
    assert len(plain.graph.node) - len(marked.graph.node) == 2 * (9 - 1)
    attributes = {a.name: helper.get_attribute_value(a) for a in nodes[0].attribute}
    assert attributes == {
        "split": [-1, 25, 9, 16],
        "joined": [-1, 25, 48],
        "dtype": onnx.TensorProto.FLOAT16,
        # What TensorRT's parser reads: the namespace is a string, and a true value asks for the kernel.
        "plugin_namespace": b"vitdeploy",
        "plugin_version": b"1",
        "aot": 1,
    }
    names = {name for node in marked.graph.node for name in (*node.input, *node.output)}
    assert {v.name for v in (*marked.graph.initializer, *marked.graph.value_info)} <= names


def test_a_marked_graph_says_what_its_kernels_must_compute(plain: onnx.ModelProto) -> None:
    marked, _ = marked_of(plain)
    spec = PluginSpec(ATTENTION, "float16", tokens=25, heads=3, width=16)
    assert plugin_specs(marked) == plugin_specs(strip_functions(marked)) == (spec,)
    assert spec.plugin == "vitdeploy::fused_attention"
    assert plugin_specs(plain) == ()


def test_the_parser_gets_no_functions(plain: onnx.ModelProto) -> None:
    marked, _ = marked_of(plain)
    stripped = strip_functions(marked)
    assert [function.name for function in marked.functions] == [ATTENTION]
    assert not stripped.functions
    assert stripped.graph == marked.graph
    onnx.checker.check_model(stripped)
    with pytest.raises(Exception, match=r"[Ff]used_attention|vitdeploy"):
        run(stripped, np.zeros((1, 3, 32, 48), np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ["vit", "distilled", "dinov2", "mean"])
def test_functions_are_the_nodes_they_stand_for(name: str, precision: Precision) -> None:
    config = CONFIGS[name]
    model = emit(config, precision)
    marked, report = marked_of(model, config)
    last = ABSORBED if name in ("vit", "distilled") else None
    assert [site.reason for site in report.sites] == [None, None, last]
    onnx.checker.check_model(marked, full_check=True)
    inlined = onnx.inliner.inline_local_functions(marked)
    assert shape_of_graph(inlined) == shape_of_graph(model)
    if precision == "bf16":  # which ONNX Runtime has no CPU kernels for
        return
    for batch in (1, 3, 8):
        images = pixels(config, batch).numpy()
        assert np.array_equal(run(marked, images), run(model, images))


def test_equal_on_onnxruntime(plain: onnx.ModelProto) -> None:
    marked, _ = marked_of(plain)
    onnx.checker.check_model(marked, full_check=True)
    for batch in (1, 3, 8):
        images = pixels(CONFIGS["vit"], batch).numpy()
        outputs = run(marked, images)
        assert np.array_equal(outputs, run(plain, images))
        assert np.isfinite(outputs).all()


def test_other_heads_would_be_noticed(plain: onnx.ModelProto) -> None:
    marked, _ = marked_of(plain)
    node = next(node for node in marked.graph.node if node.domain == DOMAIN)
    split = next(a for a in node.attribute if a.name == "split")
    split.ints[:] = [-1, 25, 18, 8]
    images = pixels(CONFIGS["vit"], 3).numpy()
    assert not np.allclose(run(marked, images), run(plain, images), atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [17, 18, 23])
def test_other_opsets(opset: int) -> None:
    model = emit(CONFIGS["vit"], opset=opset)
    marked, report = marked_of(model)
    assert len(report.marked) == 2
    assert {entry.version for function in marked.functions for entry in function.opset_import} == {opset}
    onnx.checker.check_model(marked, full_check=True)
    images = pixels(CONFIGS["vit"], 3).numpy()
    assert np.array_equal(run(marked, images), run(model, images))


@pytest.mark.slow
def test_a_batch_that_is_fixed() -> None:
    model = emit(CONFIGS["vit"], batch=BatchRange(2, 2, 2))
    marked, report = marked_of(model)
    assert len(report.marked) == 2
    assert plugin_specs(marked)[0].tokens == 25
    images = pixels(CONFIGS["vit"], 2).numpy()
    assert np.array_equal(run(marked, images), run(model, images))


@pytest.mark.slow
def test_a_softmax_that_is_an_island() -> None:
    islands = frozenset({"blocks.0.attn.softmax"})
    model = emit(CONFIGS["vit"], islands=islands)
    marked, report = marked_of(model)
    assert len(report.marked) == 2
    overloads = [node.overload for node in marked.graph.node if node.domain == DOMAIN]
    assert overloads == [FLOAT32_SOFTMAX, ""]
    assert sorted(function.overload for function in marked.functions) == ["", FLOAT32_SOFTMAX]
    images = pixels(CONFIGS["vit"], 3).numpy()
    assert np.array_equal(run(marked, images), run(model, images))
    assert {node.overload for node in strip_functions(marked).graph.node} == {""}
    assert len(plugin_specs(marked)) == 1  # one kernel computes both


@pytest.mark.slow
def test_what_the_kernel_says_stands_in_the_report() -> None:
    model = emit(CONFIGS["vit"], islands=frozenset({"blocks.0.attn.qkv"}))
    _, report = mark_plugins(model, CONFIGS["vit"], plugin_kernels.refusal)
    assert [site.reason for site in report.sites] == [
        "qkv must be float16 or bfloat16, not float32",
        None,
        ABSORBED,
    ]


def test_a_second_kind_of_operator_has_no_plugin(plain: onnx.ModelProto) -> None:
    model = copy_of(plain)
    shape = numpy_helper.from_array(np.array([-1, 25, 18, 8]), "other")
    model.graph.initializer.append(shape)
    node_of(model, "blocks.1.attn/Reshape").input[1] = "other"
    _, report = marked_of(model)
    assert report.sites[0].reason is None
    assert "another block's operator is different" in str(report.sites[1].reason)


def test_nothing_to_mark_changes_nothing(plain: onnx.ModelProto) -> None:
    same, report = mark_plugins(plain, CONFIGS["vit"], lambda spec: f"no kernel for {spec.tokens} tokens")
    assert same == plain
    assert {site.reason for site in report.sites} == {"no kernel for 25 tokens", ABSORBED}
    deeper = ViTConfig(**{**vars(CONFIGS["vit"]), "depth": 4})
    assert mark_plugins(plain, deeper, anything)[1].sites[3].reason == "the graph has no nodes of that name"


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    return copied


def node_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def permuted(model: onnx.ModelProto) -> None:
    node_of(model, "blocks.1.attn/Transpose_3").attribute[0].ints[:] = [0, 1, 2, 3]


def scaled(model: onnx.ModelProto) -> None:
    scores = node_of(model, "blocks.1.attn/MatMul")
    name = "blocks.1.attn/Mul"
    node = helper.make_node("Mul", [scores.output[0], scores.output[0]], [name], name=name)
    node_of(model, "blocks.1.attn.softmax/Softmax").input[0] = name
    model.graph.node.insert([*model.graph.node].index(scores) + 1, node)


def crossed(model: onnx.ModelProto) -> None:
    values, products = (node_of(model, f"blocks.1.attn/{name}") for name in ("Split", "MatMul_2"))
    products.input[1] = values.output[1]


def computed_shape(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("shape", onnx.TensorProto.INT64, [4]))
    node_of(model, "blocks.1.attn/Reshape").input[1] = "shape"


def peeked(model: onnx.ModelProto) -> None:
    scores = node_of(model, "blocks.1.attn/MatMul").output[0]
    model.graph.output.append(helper.make_tensor_value_info(scores, onnx.TensorProto.FLOAT16, None))


def untyped(model: onnx.ModelProto) -> None:
    index = [value.name for value in model.graph.value_info].index("blocks.1.attn.qkv/Add")
    del model.graph.value_info[index]


@pytest.mark.parametrize(
    "edit, reason",
    [
        (permuted, FOREIGN),
        (scaled, FOREIGN),
        (crossed, FOREIGN),
        (computed_shape, FOREIGN),
        (untyped, "the graph does not state the dtype of blocks.1.attn.qkv/Add"),
        (peeked, "something else reads what is inside"),
    ],
)
def test_a_region_that_is_not_the_functions_body(
    plain: onnx.ModelProto, edit: Callable[[onnx.ModelProto], None], reason: str
) -> None:
    model = copy_of(plain)
    edit(model)
    marked, report = marked_of(model)
    assert [site.reason for site in report.sites] == [None, reason, ABSORBED]
    assert [node.name for node in marked.graph.node if node.domain == DOMAIN] == [
        "blocks.0.attn/fused_attention"
    ]


@pytest.mark.slow
def test_digits(tmp_path: Path) -> None:
    from vitdeploy.checkpoint.opening import Checkpoint, open_model
    from vitdeploy.model.vit import build

    checkpoint = open_model("digits")
    assert isinstance(checkpoint, Checkpoint)
    config = checkpoint.config
    deployed = lower(build(config, checkpoint.state), PrecisionPlan.of("fp16"))
    names = ("pixel_values", "logits")
    model = ir.to_proto(trace(deployed, pixels(config, 1), batch=BatchRange(), opset=20, names=names))
    marked, report = mark_plugins(model, config, plugin_kernels.refusal)
    assert len(report.marked) == config.depth - 1
    onnx.save(marked, tmp_path / "marked.onnx")
    onnx.checker.check_model(str(tmp_path / "marked.onnx"), full_check=True)
    for batch in (1, 3, 8):
        images = pixels(config, batch).numpy()
        assert np.array_equal(run(marked, images), run(model, images))
