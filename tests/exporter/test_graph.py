"""The emitted graph, as files: names, size, what is in it and what is not, at every opset."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from tests.helpers.models import CONFIGS, pixels, random_vit
from tests.helpers.traces import NAMES, RANGE, SPREAD, traced
from vitdeploy.bundle.onnx_graph import prove_precision, read_graph, summarise, undeclared
from vitdeploy.config import BatchRange, ViTConfig
from vitdeploy.errors import ExportError
from vitdeploy.exporter.graph import trace
from vitdeploy.exporter.onnx import save_streaming
from vitdeploy.exporter.request import NEWEST_OPSET, OLDEST_OPSET
from vitdeploy.model.precision import DTYPES, PrecisionPlan, island_names
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.rewrites import deploy
from vitdeploy.model.stem_deployed import GroupNorm
from vitdeploy.model.vit import ViT


def emit(
    config: ViTConfig, path: Path, *, precision: str = "fp32", opset: int = 20, batch: BatchRange = RANGE
):  # type: ignore[no-untyped-def]
    """Write the deployed model's graph; return the reference model and the file's proto."""
    plan = PrecisionPlan(DTYPES[precision])  # type: ignore[index]
    path.write_bytes(traced(config, plan, opset, batch))
    return random_vit(config, spread=SPREAD), onnx.load(path)


def largest_block(proto: onnx.ModelProto) -> int:
    """Nodes of the block that has most of them."""
    names = (re.split(r"[./]", node.name) for node in proto.graph.node)
    return max(Counter(name[1] for name in names if name[0] == "blocks").values())


def relative_error(path: Path, vit: ViT, config: ViTConfig, batch: int = 3) -> float:
    x = pixels(config, batch)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    got = session.run(None, {"pixel_values": x.numpy()})[0]
    expected = forward_float64(vit, x).numpy()
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


QUICK = {(OLDEST_OPSET, "fp16"), (20, "fp32"), (20, "fp16"), (NEWEST_OPSET, "bf16")}
"""Opsets and precisions of the quick loop."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "opset, precision",
    [
        pytest.param(opset, precision, marks=() if (opset, precision) in QUICK else pytest.mark.slow)
        for opset in range(OLDEST_OPSET, NEWEST_OPSET + 1)
        for precision in DTYPES
        if precision == "fp16" or opset in (OLDEST_OPSET, 20, NEWEST_OPSET)
    ],
)
def test_every_opset_is_valid_small_and_right(tmp_path: Path, opset: int, precision: str) -> None:
    config = CONFIGS["vit"] if opset == 20 else dataclasses.replace(CONFIGS["vit"], depth=2)
    vit, proto = emit(config, tmp_path / "m.onnx", precision=precision, opset=opset)
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    assert {o.domain: o.version for o in proto.opset_import} == {"": opset}
    if precision != "bf16":  # which ONNX Runtime has no CPU kernels for
        assert relative_error(tmp_path / "m.onnx", vit, config) < {"fp32": 1e-5, "fp16": 5e-3}[precision]
    most = 27 if opset >= 20 or precision == "fp32" else 30  # before opset 20, GELU is five nodes
    assert largest_block(proto) <= most


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distilled", "deit3"])
def test_blocks_stay_small_with_their_casts(tmp_path: Path, name: str) -> None:
    _, proto = emit(CONFIGS[name], tmp_path / "m.onnx", precision="fp16")
    assert largest_block(proto) <= 27


@pytest.mark.slow
@pytest.mark.parametrize("opset", [OLDEST_OPSET, 20, NEWEST_OPSET])
def test_a_stem_is_clean_at_every_opset(tmp_path: Path, opset: int) -> None:
    config = CONFIGS["hybrid"]
    vit, proto = emit(config, tmp_path / "m.onnx", opset=opset)
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    assert relative_error(tmp_path / "m.onnx", vit, config) < 1e-5
    nodes = [node for node in proto.graph.node if node.name.startswith("stem")]
    outside = [n.op_type for n in nodes if not n.name.startswith("stem.norm/")]
    assert outside[:4] == ["Conv", "Relu", "MaxPool", "Conv"]
    pads = {n.name: list(a.ints) for n in nodes for a in n.attribute if a.name == "pads"}
    assert pads["stem.conv/Conv"] == [2, 2, 3, 3]
    assert pads["stem.stages.1.0.conv2/Conv"] == [0, 0, 1, 1]
    assert not [n for n in nodes if n.op_type in ("Pad", "Cast", "Transpose", "Shape", "Expand")]


@pytest.mark.slow
def test_norms_of_a_plain_background_keep_their_digits(tmp_path: Path) -> None:
    """Naive sums of so many values that are alike lose ten times as much and more, on ONNX Runtime too."""
    norm = nn.GroupNorm(2, 4)
    x = torch.full((1, 4, 112, 112), 3.1)
    x[:, 1::2] = 3.3
    x[..., :2, :] = torch.linspace(-1, 1, 112)
    ours, summed = GroupNorm(norm), nn.GroupNorm(2, 4).eval()
    expected = norm.double()(x.double()).detach().numpy()
    found = []
    for module in (ours, summed):
        model = trace(module, x, batch=BatchRange(1, 1, 1), opset=20, names=("x", "y"))
        save_streaming(model, tmp_path / "m.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {"x": x.numpy()})
        found.append(float(np.linalg.norm(got - expected) / np.linalg.norm(expected)))
    assert found[0] < 5e-6
    assert found[1] > 10 * found[0], found


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("vit", "distilled", "dinov2") else pytest.mark.slow)
        for name in CONFIGS
    ],
)
def test_every_family_is_clean(tmp_path: Path, name: str) -> None:
    vit, proto = emit(CONFIGS[name], tmp_path / "m.onnx")
    assert relative_error(tmp_path / "m.onnx", vit, CONFIGS[name]) < 1e-5
    rotary = bool(CONFIGS[name].rotary)
    assert largest_block(proto) <= (32 + CONFIGS[name].mlp_norm if rotary else 27)
    operators = Counter(node.op_type for node in proto.graph.node)
    for unwanted in ("Shape", "Expand", "Unsqueeze", "Squeeze", "Constant", "Identity", "Conv", "Concat"):
        turns = CONFIGS[name].depth if rotary else 0  # halves of queries and keys change places
        if unwanted == "Conv" and CONFIGS[name].stem is not None:
            continue
        assert operators[unwanted] == (unwanted == "Concat") * ((name == "dinov2") + turns), unwanted
    last = CONFIGS[name].depth - 1
    for (
        node
    ) in proto.graph.node:  # only the pooled tokens are picked, once for the residual, once for the query
        if node.op_type in ("Gather", "Slice"):
            assert node.name.startswith((f"blocks.{last}", "pool", "model")), node.name
    assert operators["Gather"] + operators["Slice"] <= 2
    assert not [n for n in proto.graph.node if n.domain]


@pytest.mark.slow
def test_names_are_module_paths(tmp_path: Path) -> None:
    config = CONFIGS["vit"]
    _, proto = emit(config, tmp_path / "m.onnx")
    nodes = {node.name for node in proto.graph.node}
    assert {"patch_embed/MatMul", "blocks.1.attn.qkv/MatMul", "blocks.1.mlp.fc2/Add", "head/Gemm"} <= nodes
    assert len(nodes) == len(proto.graph.node)
    weights = {t.name: tuple(t.dims) for t in proto.graph.initializer}
    assert weights["blocks.1.attn.qkv.weight"] == (48, 144)
    assert weights["norm.weight"] == (48,)
    assert weights["tokens.value"] == (config.tokens, 48)
    read = {name for node in proto.graph.node for name in node.input}
    assert set(weights) <= read, "a weight that nothing reads"
    for name in weights:
        assert name.endswith((".weight", ".bias", ".value")) or name.rsplit(".", 1)[0] in nodes, name
    assert not any("pkg.torch" in e.key for n in proto.graph.node for e in n.metadata_props)


def test_a_fixed_batch_is_a_constant(tmp_path: Path) -> None:
    config = CONFIGS["distilled"]
    vit, proto = emit(config, tmp_path / "m.onnx", batch=BatchRange(3, 3, 3))
    summary = summarise(proto)
    assert summary.inputs == {"pixel_values": ("float32", (3, 3, 32, 48))}
    assert summary.outputs == {"logits": ("float32", (3, 10))}
    assert relative_error(tmp_path / "m.onnx", vit, config) < 1e-5


@pytest.mark.slow
def test_a_dynamic_batch_of_one_and_many(tmp_path: Path) -> None:
    config = CONFIGS["vit"]
    vit, proto = emit(config, tmp_path / "m.onnx")
    assert summarise(proto).inputs == {"pixel_values": ("float32", ("N", 3, 32, 48))}
    for batch in (1, 2, 8):
        assert relative_error(tmp_path / "m.onnx", vit, config, batch) < 1e-5


@pytest.mark.slow
def test_the_proof_lists_what_the_file_holds(tmp_path: Path) -> None:
    config = CONFIGS["vit"]
    emit(config, tmp_path / "m.onnx", precision="fp16")
    plan = PrecisionPlan.of("fp16")
    islands = island_names(deploy(random_vit(config), plan), plan)
    proof = prove_precision(read_graph(tmp_path / "m.onnx"), "fp16", islands)
    gemms = [row for row in proof.ops if row.op in ("MatMul", "Gemm")]
    norms = [row for row in proof.ops if row.op == "LayerNormalization"]
    assert proof.ok
    assert len(gemms) == 2 + 6 * 2 + 8  # patches and head, six in a block, eight in the absorbed one
    assert all(row.dtype == "float16" and not row.island for row in gemms)
    assert len(norms) == 2 * config.depth + 1
    assert all(row.dtype == "float32" and row.island for row in norms)


@pytest.mark.slow
def test_the_proof_finds_a_gemm_that_silently_stayed_in_fp32(tmp_path: Path) -> None:
    config = CONFIGS["vit"]
    plan = PrecisionPlan.of("fp16").with_islands(frozenset({"blocks.1.mlp.fc1"}))
    deployed = deploy(random_vit(config), plan)
    (tmp_path / "m.onnx").write_bytes(traced(config, plan))
    proto = read_graph(tmp_path / "m.onnx")
    assert prove_precision(proto, "fp16", island_names(deployed, plan)).ok
    undeclared_plan = PrecisionPlan.of("fp16")
    proof = prove_precision(proto, "fp16", island_names(deployed, undeclared_plan))
    assert not proof.ok
    assert [row.name for row in undeclared(proof.ops, "fp16")] == ["blocks.1.mlp.fc1/MatMul"]


def test_the_proof_of_nothing_fails() -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    proto = onnx.helper.make_model(onnx.helper.make_graph([node], "g", values[:1], values[1:]))
    assert not prove_precision(proto, "fp32", ()).ok


class _Untraceable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum().item() > 0 else -x


@pytest.mark.slow
def test_what_cannot_be_traced_says_so_in_one_line() -> None:
    with pytest.raises(ExportError, match="could not trace _Untraceable") as caught:
        trace(_Untraceable(), torch.zeros(1, 3, 8, 8), batch=RANGE, opset=20, names=NAMES)
    assert "\n" not in caught.value.message
