"""Engines of TensorRT's double: where they run, what they compute, and what they say of themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from tests.fakes.tensorrt import VERSIONS, calls_of, make_tensorrt
from tests.fakes.tensorrt_builds import SHAPES, Built, attention, linear, logger
from tests.helpers.bundles import SIZE, WEIGHT, answer, graph

FULL = VERSIONS[:3]


def run_engine(engine: Any, inputs: np.ndarray[Any, Any]) -> tuple[bool, np.ndarray[Any, Any]]:
    outputs = np.zeros((len(inputs), WEIGHT.shape[1]), np.float32)
    context = engine.create_execution_context()
    assert context.set_input_shape("pixel_values", inputs.shape)
    assert context.get_tensor_shape("logits") == outputs.shape
    assert context.set_tensor_address("pixel_values", inputs.ctypes.data)
    assert context.set_tensor_address("logits", outputs.ctypes.data)
    return context.execute_async_v3(0), outputs


@pytest.mark.slow
@pytest.mark.parametrize("precision, error", [("fp32", 1e-4), ("fp16", 3e-2), ("bf16", 1e-4)])
@pytest.mark.parametrize("version", VERSIONS)
def test_an_engine_computes(version: str, precision: str, error: float) -> None:
    built = Built(make_tensorrt(version), graph(precision, "float", WEIGHT))
    plan = built.plan()
    assert plan is not None
    assert bytes(plan) == bytes(memoryview(plan)) == bytes(built.plan())
    assert plan.nbytes == len(bytes(plan))
    engine = built.library.Runtime(built.log).deserialize_cuda_engine(bytes(plan))
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    assert names == ["pixel_values", "logits"]
    assert [engine.get_tensor_mode(name).name for name in names] == ["INPUT", "OUTPUT"]
    assert engine.get_tensor_dtype("logits") == built.library.float32
    assert [tuple(shape) for shape in engine.get_tensor_profile_shape("pixel_values", 0)] == SHAPES
    inputs = np.random.default_rng(0).normal(size=SHAPES[1]).astype(np.float32)
    told, outputs = run_engine(engine, inputs)
    assert told
    np.testing.assert_allclose(outputs, answer(inputs), atol=error)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_run_without_shape_or_address_fails(version: str) -> None:
    built = linear(version)
    context = built.engine().create_execution_context()
    assert tuple(context.get_tensor_shape("logits")) == (-1, WEIGHT.shape[1])
    assert not context.set_input_shape("pixel_values", (9, 3, SIZE, SIZE))
    assert not context.set_optimization_profile_async(1, 0)
    assert not context.execute_async_v3(0)
    assert "pixel_values" in built.log.heard[-1]
    assert context.set_input_shape("pixel_values", SHAPES[0])
    assert not context.execute_async_v3(0)
    assert [call.name for call in calls_of(context)][-2:] == ["set_input_shape", "execute_async_v3"]
    assert calls_of(context)[-1].arguments == {"stream_handle": 0}


@pytest.mark.parametrize("version", FULL)
def test_an_engine_of_another_machine_is_refused(version: str) -> None:
    plan = bytes(linear(version).plan())
    for library, blob, reason in (
        (make_tensorrt(version, gpu=(9, 0)), plan, "incompatible device"),
        (make_tensorrt(version), plan[:-9], "Serialization"),
        (make_tensorrt(version), b"vtrt" + plan[4:], "magicTag"),
        (make_tensorrt("11.4.0.106" if version != FULL[2] else FULL[0]), plan, "library version"),
    ):
        log = logger(library)
        assert library.Runtime(log).deserialize_cuda_engine(blob) is None
        assert reason in log.heard[-1]


def test_a_compatible_engine_runs_elsewhere() -> None:
    built = linear("10.8.0.43")
    built.config.set_flag(built.library.BuilderFlag.VERSION_COMPATIBLE)
    built.config.hardware_compatibility_level = built.library.HardwareCompatibilityLevel.AMPERE_PLUS
    plan = bytes(built.plan())
    newer = make_tensorrt("11.4.0.106", gpu=(12, 0))
    runtime = newer.Runtime(logger(newer))
    assert runtime.deserialize_cuda_engine(plan) is None
    runtime.engine_host_code_allowed = True
    assert runtime.deserialize_cuda_engine(plan) is not None


@pytest.mark.slow
@pytest.mark.parametrize("version", FULL)
def test_without_a_gpu_nothing_can_be_made(version: str) -> None:
    library = make_tensorrt(version, gpu=None)
    for make in (library.Builder, library.Runtime):
        log = logger(library)
        with pytest.raises(TypeError, match="factory function returned nullptr"):
            make(log)
        assert "CUDA initialization failure" in log.heard[-1]


def test_without_a_gpu_the_other_one_builds_and_does_not_run() -> None:
    built = linear("rtx-1.7.1.116", gpu=None)
    plan = built.plan()
    assert built.library.Runtime(built.log).deserialize_cuda_engine(plan) is None
    assert "cudaError 35" in built.log.heard[-1]
    built.config.set_flag(built.library.BuilderFlag.STRIP_PLAN)
    assert built.plan() is None


@pytest.mark.parametrize("version", FULL)
def test_a_stripped_engine_computes_after_a_refit(version: str, tmp_path: Path) -> None:
    built = linear(version)
    whole = built.plan().nbytes
    built.config.set_flag(built.library.BuilderFlag.STRIP_PLAN)
    assert built.plan().nbytes < whole - WEIGHT.nbytes
    engine = built.engine()
    inputs = np.ones(SHAPES[0], np.float32)
    assert engine.refittable
    assert not run_engine(engine, inputs)[0]
    refitter = built.library.Refitter(engine, built.log)
    assert refitter.get_missing_weights() == ["weight"]
    assert not refitter.refit_cuda_engine()
    parser = built.library.OnnxParserRefitter(refitter, built.log)
    for name, model, fits in (
        ("other.onnx", attention(), False),
        ("own.onnx", graph("fp32", "float", 2 * WEIGHT), True),
    ):
        (tmp_path / name).write_bytes(model)
        assert parser.refit_from_file(str(tmp_path / name)) == fits
    assert refitter.refit_cuda_engine()
    told, outputs = run_engine(engine, inputs)
    assert told
    np.testing.assert_allclose(outputs, 2 * answer(inputs), atol=1e-3)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_inspector_speaks_as_its_version_does(version: str) -> None:
    built = Built(make_tensorrt(version), attention(), "x", [(1, 3, 4), (2, 3, 4), (8, 3, 4)])
    engine = built.engine()
    inspector = engine.create_engine_inspector()
    report = json.loads(inspector.get_engine_information(built.library.LayerInformationFormat.JSON))
    rows = {tuple(row["Metadata"].split("\x1f")): row for row in report["Layers"]}
    assert len(rows) == engine.num_layers
    fused = tuple(f"[ONNX Layer: attn/{name}]" for name in ("MatMul", "Softmax", "MatMul_2"))
    assert rows[fused]["LayerType"] == "kgen"
    assert ("[ONNX Layer: mlp/Add]", "[ONNX Layer: mlp/Gelu]") in rows
    first = rows["[ONNX Layer: attn.q]",]["Inputs"][0]
    if version.startswith("10"):
        assert first["Format/Datatype"] == "Half"
        assert report["Bindings"] == ["x", "y"]
    else:
        assert first["Datatype"] == "Half"
        assert "Format/Datatype" not in first
        assert "Bindings" not in report
        assert [row["IOMode"] for row in report["I/O Tensors"]] == ["Input", "Output"]
        assert report["I/O Tensors"][0]["ProfileInfo"][0]["MaxShape"] == [8, 3, 4]


def test_without_detail_the_inspector_gives_names() -> None:
    built = linear("11.4.0.106")
    built.config.profiling_verbosity = built.library.ProfilingVerbosity.LAYER_NAMES_ONLY
    inspector = built.engine().create_engine_inspector()
    report = json.loads(inspector.get_engine_information(built.library.LayerInformationFormat.JSON))
    assert all(isinstance(row, str) for row in report["Layers"])


def test_single_precision_attention_is_not_fused() -> None:
    shapes = [(1, 3, 4)] * 3
    built = Built(make_tensorrt("11.4.0.106"), attention(TensorProto.FLOAT), "x", shapes)
    text = (
        built.engine()
        .create_engine_inspector()
        .get_engine_information(built.library.LayerInformationFormat.JSON)
    )
    assert "mha" not in text


def test_the_runtime_cache_of_rtx_grows_with_new_shapes() -> None:
    engine = linear("rtx-1.7.1.116").engine()
    config = engine.create_runtime_config()
    cache = config.create_runtime_cache()
    assert config.set_runtime_cache(cache)
    context = engine.create_execution_context(config)
    outputs = np.zeros((8, WEIGHT.shape[1]), np.float32)
    sizes = []
    for shape in (SHAPES[0], SHAPES[0], SHAPES[1]):
        inputs = np.ones(shape, np.float32)
        context.set_input_shape("pixel_values", shape)
        context.set_tensor_address("pixel_values", inputs.ctypes.data)
        context.set_tensor_address("logits", outputs.ctypes.data)
        assert context.execute_async_v3(0)
        sizes.append(cache.serialize().nbytes)
    assert sizes[0] == sizes[1] < sizes[2]
    fresh = config.create_runtime_cache()
    assert fresh.deserialize(bytes(cache.serialize()))
    assert not fresh.deserialize(b"junk")
