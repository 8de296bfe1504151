"""ONNX Runtime's GPU providers: options, caches and refusals; no GPU runs any of it here."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

from tests.fakes.onnxruntime import CPU, CUDA, RTX, RTX_OPTIONS, TENSORRT, TENSORRT_OPTIONS, Double, Settings
from vitdeploy.backends import onnxruntime_providers as providers
from vitdeploy.backends.base import Options
from vitdeploy.backends.onnxruntime import OnnxRuntime
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.proofs import OpPrecision, PrecisionProof
from vitdeploy.config import BatchRange
from vitdeploy.errors import DeviceUnavailable, UsageError
from vitdeploy.machine.gpus import Gpu

pytestmark = pytest.mark.usefixtures("nvidia_machine")


def options_of(bundle: Bundle, provider: str, library: Any, **arguments: Any) -> dict[str, str]:
    setup = providers.set_up(library, bundle, bundle.manifest.artifacts[0], provider, **arguments)
    name, options = setup.providers[0]
    assert name == providers.PROVIDERS[provider]
    assert all(isinstance(value, str) for value in options.values())
    return options


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("version", ["1.23.2", "1.31.1"])
def test_tensorrt_knows_every_option(make_bundle: Any, version: str, precision: str) -> None:
    options = options_of(make_bundle(precision=precision), "tensorrt", Double(TENSORRT, version=version))
    assert set(options) <= TENSORRT_OPTIONS
    assert options["device_id"] == "0"
    assert options["trt_profile_min_shapes"] == "pixel_values:1x3x4x4"
    assert options["trt_profile_opt_shapes"] == "pixel_values:2x3x4x4"
    assert options["trt_profile_max_shapes"] == "pixel_values:8x3x4x4"
    assert (options["trt_engine_cache_enable"], options["trt_timing_cache_enable"]) == ("1", "1")


def test_a_fixed_shape_has_no_profile(make_bundle: Any) -> None:
    bundle = make_bundle(batch=BatchRange(4, 4, 4))
    artifact = bundle.manifest.artifacts[0]
    fixed = artifact.inputs[0].model_copy(update={"shape": (4, 3, 4, 4)})
    artifact = artifact.model_copy(update={"inputs": (fixed,)})
    setup = providers.set_up(Double(TENSORRT), bundle, artifact, "tensorrt")
    assert not any("profile" in name for name in setup.providers[0][1])


@pytest.mark.parametrize(
    "version, tensorrt, precision, flags, executes",
    [
        ("1.26.0", "10.14.1", "fp16", {}, "fp16"),
        ("1.27.0", "10.14.1", "fp32", {}, "fp32"),
        ("1.27.0", "10.14.1", "fp16", {"trt_fp16_enable": "1", "trt_bf16_enable": "0"}, "layer by layer"),
        ("1.31.1", "10.14.1", "bf16", {"trt_fp16_enable": "0", "trt_bf16_enable": "1"}, "layer by layer"),
        ("1.32.0", "11.0.0", "fp16", {}, "fp16"),
    ],
)
def test_precision_flags_only_where_the_network_is_weakly_typed(
    make_bundle: Any,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    tensorrt: str,
    precision: str,
    flags: dict[str, str],
    executes: str,
) -> None:
    """A strongly typed network has the types of the ONNX; any flag would make it a weakly typed one."""
    monkeypatch.setattr(providers, "_load_nvinfer", lambda library: tensorrt)
    bundle = make_bundle(precision=precision)
    setup = providers.set_up(
        Double(TENSORRT, version=version), bundle, bundle.manifest.artifacts[0], "tensorrt"
    )
    options = setup.providers[0][1]
    fallback = {"trt_layer_norm_fp32_fallback": "1"} if flags else {}
    names = ("trt_fp16_enable", "trt_bf16_enable", "trt_layer_norm_fp32_fallback")
    assert {name: options[name] for name in names if name in options} == flags | fallback
    assert setup.executes.endswith(executes)


def test_mixed_precision_asks_for_the_types_it_has(make_bundle: Any) -> None:
    bundle = make_bundle()
    proof = PrecisionProof(ops=(OpPrecision(name="head", op="MatMul", dtype="bfloat16"),), ok=True)
    mixed = bundle.manifest.artifacts[0].model_copy(update={"precision": "mixed", "proof": proof})
    options = providers.set_up(Double(TENSORRT), bundle, mixed, "tensorrt").providers[0][1]
    assert (options["trt_fp16_enable"], options["trt_bf16_enable"]) == ("0", "1")


@pytest.mark.usefixtures("rtx_plugin")
@pytest.mark.parametrize("provider", ["tensorrt", "tensorrt-rtx"])
def test_fp32_is_no_tf32(make_bundle: Any, monkeypatch: pytest.MonkeyPatch, provider: str) -> None:
    bundle = make_bundle()
    options_of(bundle, provider, Double(TENSORRT))
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    with pytest.raises(UsageError, match="NVIDIA_TF32_OVERRIDE=1 asks for TF32"):
        options_of(bundle, provider, Double(TENSORRT))


def test_cuda_takes_what_tensorrt_leaves_and_uses_no_tf32(make_bundle: Any) -> None:
    bundle = make_bundle()
    setup = providers.set_up(Double(TENSORRT, CUDA), bundle, bundle.manifest.artifacts[0], "tensorrt")
    assert setup.providers[1] == (CUDA, {"device_id": "0", "use_tf32": "0"})


def test_engines_never_meet_another_model_machine_or_option(
    make_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, library = make_bundle(), Double(TENSORRT)
    first = options_of(bundle, "tensorrt", library)
    assert options_of(bundle, "tensorrt", library) == first
    engines = {first["trt_engine_cache_path"]}
    engines.add(options_of(make_bundle(data=b"another"), "tensorrt", library)["trt_engine_cache_path"])
    engines.add(
        options_of(make_bundle(batch=BatchRange(1, 2, 4)), "tensorrt", library)["trt_engine_cache_path"]
    )
    engines.add(options_of(bundle, "tensorrt", Double(TENSORRT, version="1.30.0"))["trt_engine_cache_path"])
    monkeypatch.setattr(providers, "find_gpus", lambda: [Gpu("NVIDIA H200", (9, 0))])
    engines.add(options_of(bundle, "tensorrt", library)["trt_engine_cache_path"])
    monkeypatch.setattr(providers, "_load_nvinfer", lambda library: "10.15.0")
    engines.add(options_of(bundle, "tensorrt", library)["trt_engine_cache_path"])
    assert len(engines) == 6
    for engine in engines:
        assert Path(engine).parent == tmp_path / "cache" / "vitdeploy" / "onnxruntime"
        assert stat.S_IMODE(Path(engine).stat().st_mode) == 0o700
    assert first["trt_timing_cache_path"] not in engines


def test_without_a_writable_cache_nothing_is_kept(
    make_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    options = options_of(make_bundle(), "tensorrt", Double(TENSORRT))
    assert not any("cache" in name for name in options)


def test_the_version_of_tensorrt_is_that_which_the_provider_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "libonnxruntime_providers_tensorrt.so").write_bytes(b"\0libnvinfer.so.12\0")
    library = SimpleNamespace(__file__=str(tmp_path / "__init__.py"))
    with pytest.raises(DeviceUnavailable, match=r"needs libnvinfer\.so\.12 \(TensorRT 12\)") as caught:
        providers._load_nvinfer(library)
    assert "LD_LIBRARY_PATH" in (caught.value.hint or "")
    asked: list[str] = []

    def load(name: str) -> Any:
        asked.append(name)
        return SimpleNamespace(getInferLibVersion=lambda: 101302)

    monkeypatch.setattr(providers.ctypes, "CDLL", load)
    assert providers._load_nvinfer(library) == "10.13.2"
    assert asked == ["libnvinfer.so.12"]


def test_no_gpu(make_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceUnavailable, match="there is no cuda:1"):
        options_of(make_bundle(), "tensorrt", Double(TENSORRT), device=1)
    monkeypatch.setattr(providers, "find_gpus", list)
    for name in ("tensorrt", "tensorrt-rtx"):
        with pytest.raises(DeviceUnavailable, match=f"{name} provider does not run here: no NVIDIA GPU"):
            options_of(make_bundle(), name, Double(TENSORRT, RTX))


def test_rtx_without_its_plugin(make_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "PLUGIN", "no_such_plugin")
    with pytest.raises(DeviceUnavailable, match="has no tensorrt-rtx provider here") as caught:
        OnnxRuntime().load(
            bundle := make_bundle(), bundle.manifest.artifacts[0], Options(provider="tensorrt-rtx")
        )
    assert caught.value.exit_code == 3
    assert "vitdeploy[tensorrt-rtx-ep]" in (caught.value.hint or "")


def test_rtx_from_the_plugin_is_registered_once(make_bundle: Any, rtx_plugin: Path) -> None:
    bundle, library = make_bundle(), Double()
    artifact = bundle.manifest.artifacts[0]
    for _ in range(2):  # the second time its name is among the available providers
        setup = providers.set_up(library, bundle, artifact, "tensorrt-rtx")
        assert setup.plugin == (library.devices[0],)
        assert set(setup.providers[0][1]) <= RTX_OPTIONS
        assert setup.providers[0][1]["nv_profile_max_shapes"] == "pixel_values:8x3x4x4"
        assert Path(setup.providers[0][1]["nv_runtime_cache_path"]).is_dir()
        settings = Settings()
        assert setup.add_to(settings) is None
        assert settings.added == [([library.devices[0]], setup.providers[0][1])]
    assert library.registered == [(RTX, str(rtx_plugin))]


def test_rtx_that_is_built_in_needs_no_plugin(make_bundle: Any) -> None:
    bundle = make_bundle()
    setup = providers.set_up(Double(RTX), bundle, bundle.manifest.artifacts[0], "tensorrt-rtx")
    assert not setup.plugin
    assert set(setup.providers[0][1]) <= RTX_OPTIONS | {"device_id"}
    assert setup.add_to(Settings()) == list(setup.providers)


@pytest.mark.usefixtures("rtx_plugin")
def test_a_plugin_that_takes_no_gpu_here(make_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "find_gpus", lambda: [Gpu("NVIDIA H200", (9, 0))])
    library = Double(register_execution_provider_library=lambda name, path: None)
    with pytest.raises(DeviceUnavailable, match=r"none of the GPUs here: NVIDIA H200 \(sm_90\)"):
        options_of(make_bundle(), "tensorrt-rtx", library)


@pytest.mark.usefixtures("rtx_plugin")
def test_a_plugin_that_does_not_load(make_bundle: Any) -> None:
    """The real ONNX Runtime, asked for a library that is not there."""
    library = Double(register_execution_provider_library=onnxruntime.register_execution_provider_library)
    with pytest.raises(DeviceUnavailable, match="tensorrt-rtx provider does not load: ") as caught:
        options_of(make_bundle(), "tensorrt-rtx", library)
    assert "[ONNXRuntimeError]" not in caught.value.message
    assert "NVIDIA driver" in (caught.value.hint or "")


def test_a_plugin_that_misses_the_cuda_runtime_gets_its_own(
    make_bundle: Any, rtx_plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rtx_plugin.with_name("libcudart.so.13.4.36").write_bytes(b"")
    loaded: list[str] = []
    monkeypatch.setattr(providers.ctypes, "CDLL", lambda path, mode: loaded.append(path))
    library = Double()
    register = library.register_execution_provider_library

    def refuse_once(name: str, path: str) -> None:
        if not loaded:
            raise RuntimeError("libcudart.so.13: cannot open shared object file")
        register(name, path)

    library.register_execution_provider_library = refuse_once  # type: ignore[method-assign]
    options_of(make_bundle(), "tensorrt-rtx", library)
    assert loaded == [str(rtx_plugin.with_name("libcudart.so.13.4.36"))]


@pytest.mark.parametrize("provider, name", [("tensorrt", TENSORRT), ("cuda", CUDA)])
def test_a_provider_that_cannot_start_is_refused_in_silence(
    make_bundle: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    provider: str,
    name: str,
) -> None:
    """What onnxruntime-gpu 1.31.1 does where TensorRT's or CUDA's libraries are missing."""
    message = "/onnxruntime_src/pybind_state.cc:729 Please install TensorRT libraries as mentioned"

    def session(path: Any, settings: Any, providers: Any, enable_fallback: int) -> Any:
        assert not enable_fallback  # with it, the real one prints to stdout and takes the CPU
        if provider == "tensorrt":
            raise RuntimeError(message)
        return onnxruntime.InferenceSession(path, providers=[CPU])

    double = Double(name, InferenceSession=session)
    monkeypatch.setattr(providers, "import_onnxruntime", lambda: double)
    with pytest.raises(DeviceUnavailable, match=r"Please install TensorRT|fell back to CPUExecutionProvider"):
        OnnxRuntime().load(bundle := make_bundle(), bundle.manifest.artifacts[0], Options(provider=provider))
    assert capfd.readouterr().out == ""


class Assigned:
    """A session that the provider asked for leads, but whose nodes others run."""

    def __init__(self, provider: str, path: Any) -> None:
        self._provider, self._real = provider, onnxruntime.InferenceSession(path, providers=[CPU])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_providers(self) -> list[str]:
        return [self._provider, CUDA, CPU]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        assert hasattr(self._real, "get_provider_graph_assignment_info")
        return [SimpleNamespace(ep_name=CUDA, get_nodes=lambda: [1, 2, 3])]


def test_a_session_whose_work_went_elsewhere_is_refused(
    make_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    double = Double(
        TENSORRT,
        CUDA,
        InferenceSession=lambda path, settings, providers, enable_fallback: Assigned(TENSORRT, path),
    )
    monkeypatch.setattr(providers, "import_onnxruntime", lambda: double)
    with pytest.raises(
        DeviceUnavailable, match="tensorrt provider runs no part of the model: all of it is left"
    ):
        OnnxRuntime().load(
            bundle := make_bundle(), bundle.manifest.artifacts[0], Options(provider="tensorrt")
        )


def test_shares_are_counted_by_the_real_runtime(make_bundle: Any) -> None:
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(
        make_bundle().path("model.onnx"), settings, providers=["CPUExecutionProvider"]
    )
    (line,) = providers.shares(session, "cpu")
    count = line.removeprefix(f"{CPU}: ").partition(" ")[0]
    assert line == f"{CPU}: {count} of {count} nodes"
    assert int(count) > 0
