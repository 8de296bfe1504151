"""Builds with the full TensorRT, played by its double, that must fail, and what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from tests.fakes.machines import L4, NEW, Machine, MakeJob, MakeMachine, build, every_version
from tests.fakes.tensorrt_builds import attention
from vitdeploy.errors import (
    DeviceUnavailable,
    ExportError,
    MissingDependency,
    PrecisionError,
    UsageError,
    VitdeployError,
)
from vitdeploy.tensorrt.caches import TimingCache


def doctor(here: Machine, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> None:
    """Change each layer of what the inspector reports."""
    original = here.library.EngineInspector.get_engine_information

    def get_engine_information(self: Any, format: Any) -> str:
        report = json.loads(original(self, format))
        for row in report["Layers"]:
            change(row)
        return json.dumps(report)

    monkeypatch.setattr(here.library.EngineInspector, "get_engine_information", get_engine_information)


@every_version
def test_an_engine_that_widens_a_gemm_is_refused(
    version: str, machine: MakeMachine, job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def widen(row: dict[str, Any]) -> None:
        if "[ONNX Layer: attn.q]" in row["Metadata"]:
            for tensor in row["Inputs"]:
                tensor["Format/Datatype" if version.startswith("10") else "Datatype"] = "Float"
                if "Format" in tensor:
                    tensor["Format"] = "Row major linear FP32 format (kLINEAR)"

    doctor(machine(version), monkeypatch, widen)
    with pytest.raises(PrecisionError, match=r"model0\.plan: .* computes attn\.q in fp32") as caught:
        build(job())
    assert caught.value.exit_code == 4


def test_a_report_of_another_form_is_an_error(
    machine: MakeMachine, job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    doctor(machine(NEW), monkeypatch, lambda row: row.pop("LayerType"))
    with pytest.raises(ExportError, match="another form than expected: KeyError"):
        build(job())


@every_version
def test_a_network_with_a_wide_gemm_is_refused_before_the_build(
    version: str, machine: MakeMachine, job: MakeJob
) -> None:
    here = machine(version)
    with pytest.raises(PrecisionError, match=r"attn\.q \(float32\), attn/MatMul \(float32\)"):
        build(job(attention(TensorProto.FLOAT)))
    assert not here.calls("build_serialized_network")


def test_declared_islands_may_be_wide(machine: MakeMachine, job: MakeJob) -> None:
    machine(NEW)
    proof = build(job(attention(TensorProto.FLOAT), islands=("attn", "attn.q"))).proof
    assert {op.name for op in proof.ops if op.island} >= {"attn.q", "attn/MatMul", "attn/MatMul_2"}


@every_version
def test_all_unsupported_operators_are_named_at_once(
    version: str, machine: MakeMachine, job: MakeJob
) -> None:
    model = onnx.load_from_string(attention())
    model.graph.node.insert(1, helper.make_node("Unique", ["x"], ["u"], name="blocks.0/Unique"))
    model.graph.node.insert(2, helper.make_node("Foo", ["x"], ["f"], name="blocks.1/Foo", domain="custom"))
    model.graph.node.insert(3, helper.make_node("NonZero", ["x"], ["z"]))
    model.opset_import.append(helper.make_opsetid("custom", 1))
    machine(version)
    places = "Unique at blocks.0/Unique, Foo at blocks.1/Foo, NonZero at an unnamed node"
    with pytest.raises(ExportError, match=f"model.onnx: TensorRT has no form of {places}") as caught:
        build(job(model.SerializeToString()))
    assert caught.value.exit_code == 4


def empty() -> bytes:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 4])
    made = helper.make_graph([], "empty", [value], [value])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString()


@pytest.mark.slow
@every_version
@pytest.mark.parametrize(
    "model, message",
    [(empty(), "read an empty network from it"), (b"junk", r"cannot read model\.onnx: ")],
    ids=["empty", "junk"],
)
def test_what_is_no_graph(
    version: str, model: bytes, message: str, machine: MakeMachine, job: MakeJob
) -> None:
    machine(version)
    with pytest.raises(ExportError, match=message):
        build(job(model))


@every_version
def test_a_builder_that_gives_nothing(
    version: str, machine: MakeMachine, job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = machine(version)

    def nothing(self: Any, network: Any, config: Any) -> None:
        self._played.error("Error Code 2: OutOfMemory\n  (requested size)")

    monkeypatch.setattr(here.library.Builder, "build_serialized_network", nothing)
    wanted = job()
    message = r"TensorRT built no engine for this GPU: Error Code 2: OutOfMemory \(requested size\)"
    with pytest.raises(ExportError, match=message):
        build(wanted)
    assert not Path(wanted.outputs[0]).exists()
    assert not TimingCache.of(version, "NVIDIA L4").file.path.exists()


def test_a_profile_that_is_refused(
    machine: MakeMachine, job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = machine(NEW)
    monkeypatch.setattr(here.library.IBuilderConfig, "add_optimization_profile", lambda self, profile: -1)
    with pytest.raises(ExportError, match="TensorRT refuses the profile"):
        build(job())


@every_version
def test_no_gpu(version: str, machine: MakeMachine, job: MakeJob) -> None:
    machine(version, None)
    with pytest.raises(DeviceUnavailable, match="the GPU that is here, and there is none") as caught:
        build(job())
    assert caught.value.exit_code == 3


@every_version
def test_a_gpu_without_cuda(
    version: str, machine: MakeMachine, job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(version, None)
    monkeypatch.setattr("vitdeploy.tensorrt.builder.find_gpus", lambda: [L4])
    with pytest.raises(
        DeviceUnavailable, match="does not start on this machine: CUDA initialization"
    ) as caught:
        build(job())
    assert caught.value.exit_code == 3


def test_a_library_of_an_unknown_version(machine: MakeMachine, job: MakeJob) -> None:
    machine(NEW).library.__dict__["__version__"] = "12.0.0.1"
    with pytest.raises(UsageError, match=r"TensorRT 12\.0\.0\.1 is installed, .* knows version 10 and 11"):
        build(job())


@pytest.mark.parametrize(
    "there, message",
    [(False, "needs the library 'tensorrt', which is not installed"), (True, "does not load: libnvinfer")],
)
def test_no_library(
    there: bool, message: str, machine: MakeMachine, job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise ImportError("libnvinfer.so.11: cannot open\nshared object file")

    machine(NEW)
    monkeypatch.setattr("vitdeploy.tensorrt.flavours.Flavour.is_installed", there)
    monkeypatch.setattr("vitdeploy.tensorrt.flavours.importlib.import_module", fail)
    with pytest.raises(MissingDependency, match=message) as caught:
        build(job())
    assert caught.value.exit_code == 3
    assert "vitdeploy[tensorrt]" in str(caught.value.hint)


def test_every_failure_is_one_line(machine: MakeMachine, job: MakeJob) -> None:
    machine(NEW)
    with pytest.raises(VitdeployError) as caught:
        build(job(b"junk"))
    assert "\n" not in caught.value.message
