"""The double of TensorRT: limited to the recorded names, and like TensorRT for RTX where both do the same."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
import tensorrt_rtx
from onnx import TensorProto, helper

from tests.fakes.tensorrt import VERSIONS, make_tensorrt
from tests.fakes.tensorrt_builds import SHAPES, Built, attention, linear, logger
from tests.helpers.bundles import WEIGHT, graph

FULL = VERSIONS[:3]
COMPARED = ("MATRIX_MULTIPLY", "NORMALIZATION", "SOFTMAX")


def layers(network: Any) -> Iterator[tuple[Any, ...]]:
    """What both say of the layers that a proof reads, dtypes of the operands that both count included."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name in COMPARED:
            first, last = layer.get_input(0), layer.get_output(0)
            dtypes = (first.dtype.name, last.dtype.name)
            yield layer.type.name, layer.name, layer.metadata, dtypes, tuple(first.shape), tuple(last.shape)


@pytest.mark.slow
def test_a_vision_transformers_network_is_that_of_the_real_parser(digits_onnx: Path) -> None:
    shapes = [(size, 3, 32, 32) for size in (1, 2, 8)]
    for name in ("model.onnx", "model.fp16.onnx", "model.bf16.onnx"):
        model = (digits_onnx / name).read_bytes()
        real = list(layers(Built(tensorrt_rtx, model, shapes=shapes).network))
        assert {kind for kind, *_ in real} == set(COMPARED)
        for version in VERSIONS:
            assert list(layers(Built(make_tensorrt(version), model, shapes=shapes).network)) == real


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_the_network_is_that_of_the_real_parser(dtype: int) -> None:
    shapes = [(size, 3, 4) for size in (1, 2, 8)]
    real = Built(tensorrt_rtx, attention(dtype), "x", shapes)
    for version in VERSIONS:
        double = Built(make_tensorrt(version), attention(dtype), "x", shapes)
        found = list(layers(double.network))
        assert found == list(layers(real.network))
        assert len(found) == 5
        for tensor, other in (
            (double.network.get_input(0), real.network.get_input(0)),
            (double.network.get_output(0), real.network.get_output(0)),
        ):
            assert (tensor.name, tensor.dtype.name) == (other.name, other.dtype.name)
            assert tuple(tensor.shape) == tuple(other.shape)


def test_the_header_is_that_of_a_real_engine() -> None:
    model = graph("fp32", "float", WEIGHT)
    double, real = (
        bytes(Built(library, model).plan()) for library in (make_tensorrt("rtx-1.7.1.116"), tensorrt_rtx)
    )
    layout = struct.Struct("<4sIQQ4B4sQ")
    ours, theirs = (layout.unpack_from(plan) for plan in (double, real))
    assert ours[3] == len(double)
    assert theirs[3] == len(real)
    assert ours[:3] + ours[4:] == theirs[:3] + theirs[4:]


@pytest.mark.parametrize("version", FULL)
def test_the_header_of_the_full_one_has_what_is_public(version: str) -> None:
    plan = bytes(linear(version).plan())
    assert plan[:4] == b"ftrt"
    assert ".".join(str(part) for part in plan[24:28]) == version


@pytest.mark.slow
@pytest.mark.parametrize("parse", ["file", "bytes"])
@pytest.mark.parametrize("version", VERSIONS)
def test_unsupported_operators_are_reported_as_by_the_real_parser(
    version: str, parse: str, tmp_path: Path
) -> None:
    model = onnx.load_from_string(attention())
    model.graph.node.insert(1, helper.make_node("Unique", ["x"], ["u"], name="strange"))
    model.graph.node.insert(2, helper.make_node("Foo", ["x"], ["f"], name="foreign", domain="custom"))
    model.opset_import.append(helper.make_opsetid("custom", 1))
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    reports = []
    for library in (make_tensorrt(version), tensorrt_rtx):
        log = logger(library)
        builder = library.Builder(log)
        network = builder.create_network(0)
        parser = library.OnnxParser(network, log)
        told = parser.parse_from_file(str(path)) if parse == "file" else parser.parse(path.read_bytes())
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        reports.append((told, [(e.code().name, e.node(), e.node_name(), e.node_operator()) for e in errors]))
        assert any(line.startswith("ERROR: ") for line in log.heard)
    assert reports[0] == reports[1]


def test_bytes_that_are_no_graph() -> None:
    for library in (make_tensorrt("11.4.0.106"), tensorrt_rtx):
        log = logger(library)
        builder = library.Builder(log)
        network = builder.create_network(0)
        parser = library.OnnxParser(network, log)
        assert not parser.parse(b"junk")
        assert parser.get_error(0).code().name == "MODEL_DESERIALIZE_FAILED"
        assert not parser.parse_from_file("/there/is/none.onnx")


def test_only_recorded_names_are_there() -> None:
    old, new, rtx = (make_tensorrt(version) for version in ("10.8.0.43", "11.4.0.106", "rtx-1.7.1.116"))
    assert old.BuilderFlag.FP16.value == 0
    for flag in ("FP16", "BF16", "INT8", "OBEY_PRECISION_CONSTRAINTS"):
        assert hasattr(old.BuilderFlag, flag)
        assert not hasattr(new.BuilderFlag, flag)
        assert not hasattr(rtx.BuilderFlag, flag)
    with pytest.raises(AttributeError, match="FP16"):
        _ = new.BuilderFlag.FP16
    with pytest.raises(AttributeError, match="EXPLICIT_BATCH"):
        _ = new.NetworkDefinitionCreationFlag.EXPLICIT_BATCH
    with pytest.raises(AttributeError, match="SAME_COMPUTE_CAPABILITY"):
        _ = old.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    with pytest.raises(AttributeError, match="IInt8Calibrator"):
        _ = new.IInt8Calibrator
    assert not hasattr(new, "ComputeCapability")
    assert hasattr(rtx, "ComputeCapability")


@pytest.mark.parametrize("version", VERSIONS)
def test_objects_have_only_recorded_names(version: str) -> None:
    built = linear(version)
    for thing in (built.builder, built.config, built.network, built.parser, built.profile, built.plan()):
        with pytest.raises(AttributeError, match="nonsense"):
            _ = thing.nonsense
        with pytest.raises(AttributeError, match="nonsense"):
            thing.nonsense = 1
    with pytest.raises(AttributeError):
        built.config.num_optimization_profiles = 2
    assert hasattr(built.config, "num_compute_capabilities") == version.startswith("rtx")
    with pytest.raises(AttributeError, match="hex"):
        built.plan().hex()
    with pytest.raises(NotImplementedError, match="does not play"):
        built.builder.reset()


@pytest.mark.parametrize(
    "library", [*(make_tensorrt(version) for version in VERSIONS), tensorrt_rtx], ids=[*VERSIONS, "real"]
)
def test_wrong_calls_are_type_errors_as_with_the_real_one(library: ModuleType) -> None:
    built = Built(library, graph("fp32", "float", WEIGHT))
    flag = library.BuilderFlag.TF32
    for call in (
        lambda: built.config.set_flag(flags=flag),
        lambda: built.config.set_flag(),
        lambda: built.config.set_flag(flag, flag),
        lambda: built.config.set_flag(6),
        lambda: library.IBuilderConfig(),
        lambda: library.Builder(),
        lambda: built.profile.set_shape(name="x", min=(1,), opt=(1,), max=(1,)),
        lambda: setattr(built.config, "profiling_verbosity", 2),
    ):
        with pytest.raises(TypeError):
            call()
    assert built.config.get_flag(flag=flag)
    assert built.builder.create_optimization_profile()

    class Silent(library.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError, match="must be called"):
        library.Builder(Silent())


@pytest.mark.parametrize(
    "library", [*(make_tensorrt(version) for version in VERSIONS), tensorrt_rtx], ids=[*VERSIONS, "real"]
)
def test_a_profile_is_needed_and_must_be_in_order(library: ModuleType) -> None:
    built = Built(library, graph("fp32", "float", WEIGHT))
    config = built.builder.create_builder_config()
    if library.__name__ == "tensorrt_rtx":
        config.num_compute_capabilities = 1
        config.set_compute_capability(library.ComputeCapability.SM89, 0)
    assert built.builder.build_serialized_network(built.network, config) is None
    assert "no optimization profile" in " ".join(built.log.heard)
    backwards = built.builder.create_optimization_profile()
    backwards.set_shape("pixel_values", *reversed(SHAPES))
    assert config.add_optimization_profile(backwards) == -1


@pytest.mark.parametrize("version", VERSIONS)
def test_a_monitor_sees_the_build_and_can_stop_it(version: str) -> None:
    built = linear(version)

    class Monitor(built.library.IProgressMonitor):  # type: ignore[misc,name-defined]
        def __init__(self, patience: int) -> None:
            super().__init__()
            self.patience, self.phases = patience, []

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases.append(f"+{phase_name}")

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.patience -= 1
            return self.patience > 0

        def phase_finish(self, phase_name: str) -> None:
            self.phases.append(f"-{phase_name}")

    for patience, ends in ((1000, True), (2, False)):
        monitor = Monitor(patience)
        built.config.progress_monitor = monitor
        assert (built.plan() is not None) == ends
        assert monitor.phases == [
            "+Building engine",
            "+Optimizing graph",
            "-Optimizing graph",
            "-Building engine",
        ]


@pytest.mark.slow
@pytest.mark.parametrize("version", FULL)
def test_a_timing_cache_is_used_again(version: str) -> None:
    built = linear(version)
    assert built.config.get_timing_cache() is None
    assert built.config.set_timing_cache(built.config.create_timing_cache(b""), False)
    built.plan()
    assert "0 hits" in built.log.heard[-1]
    saved = bytes(built.config.get_timing_cache().serialize())
    again = linear(version)
    assert again.config.set_timing_cache(again.config.create_timing_cache(saved), False)
    again.plan()
    assert "0 misses" in again.log.heard[-1]
    other = linear(version, gpu=(9, 0))
    assert not other.config.set_timing_cache(other.config.create_timing_cache(saved), False)
    assert other.config.create_timing_cache(b"junk") is None


def test_old_flags_and_strong_types_do_not_go_together() -> None:
    built = linear("10.16.1.11")
    built.config.set_flag(built.library.BuilderFlag.FP16)
    assert built.plan() is None
    assert "strongly typed" in built.log.heard[-1]


def test_the_lists_say_what_changed() -> None:
    """The differences that the adapter has to know, in the recorded names themselves."""
    old, middle, new = (make_tensorrt(version) for version in FULL)
    assert not hasattr(old, "IRuntimeConfig")
    assert hasattr(old.ICudaEngine, "device_memory_size")
    assert not hasattr(new.ICudaEngine, "device_memory_size")
    for library in (middle, new):
        assert hasattr(library.ICudaEngine, "create_runtime_config")
        assert not hasattr(library.IRuntimeConfig, "create_runtime_cache")
