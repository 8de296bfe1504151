"""Weights that stay in their file: the same graph, answers equal to the last bit, no mapping that stays."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from tests.helpers.bundles import write_bundle
from vitdeploy.backends import onnxruntime_weights
from vitdeploy.backends.base import Options, get_backend
from vitdeploy.backends.onnxruntime_weights import without_weights

Array = np.ndarray[Any, Any]
IMAGES = np.random.default_rng(1).normal(size=(3, 128)).astype(np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A GEMM of a large weight and one of a small, and a large constant that is added."""
    random = np.random.default_rng(0)
    values = {
        "large": random.normal(size=(128, 256)).astype(np.float32),
        "table": random.normal(size=(1, 256 * 256)).astype(np.float32),
        "small": random.normal(size=(256, 5)).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "large"], ["a"]),
        helper.make_node("ReduceMean", ["table"], ["mean"], keepdims=1),
        helper.make_node("Add", ["a", "mean"], ["b"]),
        helper.make_node("Gemm", ["b", "small"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 128])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])]
    weights = [numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model.metadata_props.add(key="after", value="the graph")
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_it_is_the_same_graph_without_the_large_weights_of_gemms(path: Path) -> None:
    small = without_weights(path)
    assert small is not None
    model, whole = onnx.ModelProto.FromString(small), onnx.load(path)
    outside = [tensor.name for tensor in model.graph.initializer if tensor.external_data]
    assert outside == ["large"]
    for tensor in model.graph.initializer:
        if tensor.external_data:
            external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    assert model == whole


def test_answers_are_the_same_to_the_last_bit(digits_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitdeploy.bundle.folder import Bundle

    bundle = Bundle.open(digits_onnx)
    for precision in ("fp32", "fp16"):
        artifact, answers = bundle.artifact(precision), []
        for least in (1, sys.maxsize):
            monkeypatch.setattr(onnxruntime_weights, "LARGE", least)
            assert (without_weights(bundle.path(artifact.path)) is None) == (least > 1)
            with get_backend("onnxruntime").load(bundle, artifact, Options(threads=1)) as session:
                (spec,) = session.facts.inputs
                shape = [4, *map(int, spec.shape[1:])]
                pixels = np.random.default_rng(0).normal(size=shape).astype(np.float32)
                answers.append(session.run({spec.name: pixels})["logits"])
        np.testing.assert_array_equal(*answers)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_nothing_stays_mapped(path: Path) -> None:
    """Whoever writes into the file afterwards, or cuts it, changes no answer."""
    settings = onnxruntime.SessionOptions()
    key = "session.model_external_initializers_file_folder_path"
    settings.add_session_config_entry(key, str(path.parent))
    session = onnxruntime.InferenceSession(without_weights(path), settings)
    assert str(path) not in Path("/proc/self/maps").read_text()
    (before,) = session.run(None, {"x": IMAGES})
    path.write_bytes(b"")
    np.testing.assert_array_equal(session.run(None, {"x": IMAGES})[0], before)


def test_what_is_left_as_it_is(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    files = {
        "nothing": b"",
        "text": b"no model " * 20_000,
        "cut": data[: len(data) // 2],
        "zeros": bytes(200_000),
        "ones": b"\xff" * 200_000,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert without_weights(tmp_path / name) is None, name
    beside = onnx.load(path)
    onnx.save(beside, tmp_path / "beside.onnx", save_as_external_data=True, location="weights")
    assert without_weights(tmp_path / "beside.onnx") is None


def test_a_bundle_is_loaded_from_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitdeploy.predictor import Predictor

    monkeypatch.setattr(onnxruntime_weights, "LARGE", 1)
    write_bundle(tmp_path / "b.bundle")
    monkeypatch.chdir(tmp_path)
    with Predictor.open("b.bundle") as predictor:
        assert predictor.session.facts.artifact == "onnx-fp32"
