"""OpenVINO on the CPU, in a precision that it states."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from vitdeploy.backends import openvino as module
from vitdeploy.backends.base import Options
from vitdeploy.backends.openvino import OpenVino
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import TensorSpec
from vitdeploy.config import BatchRange
from vitdeploy.errors import BundleError, MissingDependency, UsageError

Array = np.ndarray[Any, Any]


def load(bundle: Bundle, options: Options | None = None) -> Any:
    return OpenVino().load(bundle, bundle.manifest.artifacts[0], options or Options())


@pytest.mark.slow
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-6), ("fp16", 2e-3), ("bf16", 1e-2)])
def test_computes(make_bundle: Any, pixels: Array, expected: Array, precision: str, tolerance: float) -> None:
    with load(make_bundle(precision=precision)) as session:
        for batch in (1, 3, 2):  # the batch is dynamic
            outputs = session.run({"pixel_values": pixels[:batch]})
            assert list(outputs) == ["logits"]
            assert outputs["logits"].dtype == np.float32
            error = np.linalg.norm(outputs["logits"] - expected[:batch]) / np.linalg.norm(expected[:batch])
            assert error < tolerance


def test_fp32_is_computed_in_fp32_on_every_cpu(make_bundle: Any) -> None:
    import openvino

    facts = load(make_bundle()).facts
    assert (facts.backend, facts.artifact) == ("openvino", "onnx-fp32")
    assert (facts.device, facts.provider) == ("cpu", "cpu")
    assert facts.precision == facts.executes == "fp32"
    assert facts.batch == BatchRange(1, 2, 8)
    assert facts.versions == {"openvino": openvino.__version__}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_it_executes_is_what_this_cpu_has(make_bundle: Any, precision: str) -> None:
    import openvino

    has = precision.upper() in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert load(make_bundle(precision=precision)).facts.executes == (precision if has else "fp32")


class Cpu:
    """A core on a CPU with these capabilities."""

    def __init__(self, *capabilities: str) -> None:
        self.capabilities = capabilities

    def get_property(self, device: str, name: str) -> tuple[str, ...]:
        assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
        return self.capabilities


@pytest.mark.parametrize(
    "precision, capabilities, hint",
    [
        ("fp32", ("FP32", "BF16", "FP16"), "f32"),
        ("bf16", ("FP32", "BF16"), "bf16"),
        ("bf16", ("FP32",), "f32"),
        ("fp16", ("FP32", "BF16"), "f32"),
        ("fp16", ("FP32", "BF16", "FP16"), "f16"),
        ("mixed", ("FP32", "BF16", "FP16"), "f32"),
    ],
)
def test_a_precision_is_widened_but_never_exchanged(precision: Any, capabilities: Any, hint: str) -> None:
    assert module._precision(Cpu(*capabilities), precision) == hint


def test_outputs_are_not_overwritten_by_the_next_run(make_bundle: Any, pixels: Array) -> None:
    with load(make_bundle()) as session:
        first = session.run({"pixel_values": pixels})["logits"]
        kept = first.copy()
        session.run({"pixel_values": -pixels})
    np.testing.assert_array_equal(first, kept)


def test_threads_reach_the_runtime(make_bundle: Any) -> None:
    session = load(make_bundle(), Options(threads=1))
    assert session._request.get_compiled_model().get_property("INFERENCE_NUM_THREADS") == 1


def test_options_it_has_no_use_for(make_bundle: Any) -> None:
    with pytest.raises(UsageError, match="openvino backend takes no provider"):
        load(make_bundle(), Options(provider="cuda"))
    with pytest.raises(UsageError, match="runs on the cpu, not on cuda"):
        load(make_bundle(), Options(device="cuda"))


def test_only_onnx_artifacts(make_bundle: Any) -> None:
    bundle = make_bundle()
    with pytest.raises(UsageError, match="it runs ONNX artifacts only"):
        OpenVino().load(bundle, None, Options())


@pytest.mark.parametrize("data", [b"", b"not a protocol buffer", b"\x00" * 1000])
def test_malformed_models_are_one_line(
    make_bundle: Any, data: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BundleError, match=r"model\.onnx: ") as caught:
        load(make_bundle(data=data))
    assert "\n" not in caught.value.message
    assert capfd.readouterr() == ("", "")


def test_a_changed_file_is_not_loaded(make_bundle: Any) -> None:
    bundle = Bundle.open(make_bundle().root)
    path = bundle.path("model.onnx")
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.onnx changed"):
        load(bundle)


def test_a_file_that_is_not_what_the_manifest_says(make_bundle: Any) -> None:
    wrong = TensorSpec(name="pixels", dtype="float32", shape=("N", 3, 4, 4))
    with pytest.raises(BundleError, match=r"its inputs are .*pixel_values.*, but the manifest says .*pixels"):
        load(make_bundle(inputs=(wrong,)))


def test_without_the_library(make_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependency) as caught:
        load(make_bundle())
    assert caught.value.hint == 'pip install "vitdeploy[openvino]"'
