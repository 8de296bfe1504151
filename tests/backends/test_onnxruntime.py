"""ONNX Runtime on the CPU; and no silent fallback from a GPU to it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from vitdeploy.backends import onnxruntime_providers as module
from vitdeploy.backends.base import Options, get_backend
from vitdeploy.backends.onnxruntime import OnnxRuntime
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import TensorSpec
from vitdeploy.bundle.proofs import OpPrecision, PrecisionProof
from vitdeploy.config import BatchRange, ViTConfig
from vitdeploy.errors import BundleError, DeviceUnavailable, UsageError

Array = np.ndarray[Any, Any]


def load(bundle: Bundle, options: Options | None = None) -> Any:
    return OnnxRuntime().load(bundle, bundle.manifest.artifacts[0], options or Options())


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-6), ("fp16", 2e-3)])
def test_computes(make_bundle: Any, pixels: Array, expected: Array, precision: str, tolerance: float) -> None:
    with load(make_bundle(precision=precision)) as session:
        outputs = session.run({"pixel_values": pixels})
    assert list(outputs) == ["logits"]
    assert outputs["logits"].dtype == np.float32
    error = np.linalg.norm(outputs["logits"] - expected) / np.linalg.norm(expected)
    assert error < tolerance


def test_facts(make_bundle: Any) -> None:
    import onnxruntime

    facts = load(make_bundle(), Options(threads=1)).facts
    assert (facts.backend, facts.artifact) == ("onnxruntime", "onnx-fp32")
    assert (facts.provider, facts.device) == ("cpu", "cpu")
    assert facts.executes == facts.precision == "fp32"
    assert facts.batch == BatchRange(1, 2, 8)
    assert facts.versions == {"onnxruntime": onnxruntime.__version__}
    assert facts.outputs[0].shape == ("N", 5)
    assert "fp32 where this CPU has no kernel" in load(make_bundle(precision="fp16")).facts.executes


def test_threads_reach_the_runtime(make_bundle: Any) -> None:
    session = load(make_bundle(), Options(threads=1))
    assert session._session.get_session_options().intra_op_num_threads == 1


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_an_absent_provider_is_an_error(make_bundle: Any, provider: str) -> None:
    with pytest.raises(DeviceUnavailable, match=f"has no {provider} provider here") as caught:
        load(make_bundle(), Options(provider=provider))
    assert caught.value.exit_code == 3
    assert "vitdeploy[gpu]" in (caught.value.hint or "")


def test_device_cuda_means_the_cuda_provider(make_bundle: Any) -> None:
    with pytest.raises(DeviceUnavailable, match="has no cuda provider here"):
        load(make_bundle(), Options(device="cuda:0"))


def test_unknown_and_contradicting_options(make_bundle: Any) -> None:
    bundle = make_bundle()
    with pytest.raises(UsageError, match="unknown provider 'cudda'; did you mean 'cuda'"):
        load(bundle, Options(provider="cudda"))
    with pytest.raises(UsageError, match="provider cuda does not run on cpu"):
        load(bundle, Options(provider="cuda", device="cpu"))


class FallenBack:
    """An onnxruntime whose CUDA provider is listed, but gives way when a session is made."""

    def __init__(self) -> None:
        import onnxruntime

        self._real = onnxruntime

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(self, path: Any, settings: Any, providers: Any, enable_fallback: int) -> Any:
        return self._real.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_a_session_that_fell_back_to_the_cpu_is_refused(
    make_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "import_onnxruntime", FallenBack)
    with pytest.raises(DeviceUnavailable, match=r"asked for CUDAExecutionProvider, but .* fell back to CPU"):
        load(make_bundle(), Options(provider="cuda"))


def test_a_provider_that_leaves_the_work_to_the_cpu_is_refused(
    make_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Azure provider has no kernels, and ONNX Runtime still lists it first for the session."""
    monkeypatch.setitem(module.PROVIDERS, "cuda", "AzureExecutionProvider")
    bundle = make_bundle(model=ViTConfig(image_size=(4, 4), patch_size=4))
    with pytest.raises(DeviceUnavailable, match="the cuda provider leaves parts of the model to the CPU"):
        load(bundle, Options(provider="cuda"))


def test_bf16_has_a_reason_before_and_an_error_after(make_bundle: Any) -> None:
    bundle = make_bundle(precision="bf16")
    reason = get_backend("onnxruntime").supports(bundle.manifest, bundle.manifest.artifacts[0])
    assert reason == "ONNX Runtime's CPU provider has no bf16 kernels"
    with pytest.raises(UsageError, match=r"cannot run onnx-bf16 .* has no bf16 kernels"):
        load(bundle)


def test_bf16_is_found_in_a_mixed_artifact_too(make_bundle: Any) -> None:
    bundle = make_bundle()
    proof = PrecisionProof(ops=(OpPrecision(name="head", op="MatMul", dtype="bfloat16"),), ok=True)
    mixed = bundle.manifest.artifacts[0].model_copy(update={"precision": "mixed", "proof": proof})
    assert "no bf16 kernels" in str(OnnxRuntime().supports(bundle.manifest, mixed))


def test_only_onnx_artifacts(make_bundle: Any) -> None:
    bundle = make_bundle()
    engine = bundle.manifest.artifacts[0].model_copy(update={"format": "tensorrt"})
    assert OnnxRuntime().supports(bundle.manifest, engine) == "it runs ONNX artifacts only"
    assert OnnxRuntime().supports(bundle.manifest, None) == "it runs ONNX artifacts only"
    with pytest.raises(UsageError, match=r"cannot run weights\.safetensors"):
        OnnxRuntime().load(bundle, None, Options())


def test_a_changed_file_is_not_loaded(make_bundle: Any) -> None:
    bundle = Bundle.open(make_bundle().root)
    path = bundle.path("model.onnx")
    data = bytearray(path.read_bytes())
    data[-200] ^= 1  # inside the weights: the file would load
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.onnx changed"):
        load(bundle)


@pytest.mark.parametrize("data", [b"", b"not a protocol buffer", b"\x00" * 1000])
def test_malformed_models_are_one_line(
    make_bundle: Any, data: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BundleError, match=r"model\.onnx: ONNX Runtime cannot load it: ") as caught:
        load(make_bundle(data=data))
    assert "\n" not in caught.value.message
    assert capfd.readouterr() == ("", "")


def test_a_file_that_is_not_what_the_manifest_says(make_bundle: Any) -> None:
    wrong = TensorSpec(name="pixel_values", dtype="uint8", shape=("N", 4, 4, 3))
    with pytest.raises(BundleError, match=r"inputs are .*float32.*, but the manifest says .*uint8"):
        load(make_bundle(inputs=(wrong,)))


def test_batches_beyond_the_range_are_refused(make_bundle: Any) -> None:
    with (
        load(make_bundle()) as session,
        pytest.raises(UsageError, match="batch size 9, but onnx-fp32 serves 1 to 8"),
    ):
        session.run({"pixel_values": np.zeros((9, 3, 4, 4), np.float32)})


@pytest.mark.slow
def test_prediction_needs_no_torch(make_bundle: Any) -> None:
    script = f"""
import sys, numpy as np
from vitdeploy.bundle.folder import Bundle
from vitdeploy.backends.base import Options, get_backend
bundle = Bundle.open({str(make_bundle().root)!r})
with get_backend("onnxruntime").load(bundle, bundle.artifact("fp32"), Options()) as session:
    session.run({{"pixel_values": np.zeros((1, 3, 4, 4), np.float32)}})
print([name for name in ("torch", "onnx", "transformers", "openvino") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
