"""The execution providers of ONNX Runtime, and how each is set up for an artifact.

TensorRT comes with onnxruntime-gpu; TensorRT for RTX with builds that have it, else with NVIDIA's plugin
package. Neither has been run on a GPU by this project yet: the names of their options are held against what
their libraries read.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitdeploy.backends.base import Options, one_line, split_device
from vitdeploy.bundle.dtypes import PRECISION_DTYPES
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import Artifact
from vitdeploy.config import Precision
from vitdeploy.errors import DeviceUnavailable, MissingDependency, UsageError, VitdeployError, did_you_mean
from vitdeploy.machine.cache import CacheFile
from vitdeploy.machine.gpus import Gpu, find_gpus

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
_INSTALL_GPU = 'pip uninstall onnxruntime, then pip install "vitdeploy[gpu]", on a machine with an NVIDIA GPU'
_INSTALL_PLUGIN = 'pip install "vitdeploy[tensorrt-rtx-ep]", on a machine with an NVIDIA RTX GPU'
_TF32 = "NVIDIA_TF32_OVERRIDE"
_CANNOT_START = ("Please install TensorRT libraries", "Failed to load library", "creating execution provider")


@dataclass(frozen=True)
class Setup:
    """What a session is made with."""

    providers: tuple[tuple[str, dict[str, str]], ...]
    """The one that was asked for, and what may take the parts it leaves."""
    plugin: tuple[Any, ...] = ()
    """The devices of a plugin library, which then is the only provider."""
    executes: str = ""
    """What is computed in."""

    def add_to(self, settings: Any) -> list[tuple[str, dict[str, str]]] | None:
        """Put a plugin into a session's settings; what is no plugin is returned, for its constructor."""
        if not self.plugin:
            return list(self.providers)
        settings.add_provider_for_devices(list(self.plugin), self.providers[0][1])
        return None


def import_onnxruntime() -> Any:
    """ONNX Runtime, which tells nobody that it runs unless the user's environment lets it.

    Its Linux builds send telemetry by default: they keep an identity under ``~/.cache/Microsoft`` and look up
    a host of Microsoft's.

    Raises:
        MissingDependency: it is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        missing = MissingDependency("onnxruntime", extra="gpu", purpose="the onnxruntime backend")
        missing.hint = 'pip install onnxruntime, or "vitdeploy[gpu]" for CUDA'
        raise missing from error
    return onnxruntime


def choose_provider(options: Options) -> tuple[str, int]:
    """The provider and the device's number.

    Raises:
        UsageError: an unknown provider, or one that does not run on the device.
    """
    kind, index = split_device(options.device or "cpu")
    provider = options.provider or kind
    if provider not in PROVIDERS:
        hint = f"known: {', '.join(PROVIDERS)}"
        raise UsageError(f"unknown provider {provider!r}{did_you_mean(provider, PROVIDERS)}", hint=hint)
    if options.device is not None and (kind == "cpu") != (provider == "cpu"):
        raise UsageError(f"provider {provider} does not run on {options.device}")
    return provider, index


def has_gpu_provider(available: Sequence[str]) -> bool:
    """Whether any of ONNX Runtime's providers here, or a plugin beside it, is for GPUs."""
    built_in = any(name in available for key, name in PROVIDERS.items() if key != "cpu")
    return built_in or importlib.util.find_spec(PLUGIN) is not None


def set_up(library: Any, bundle: Bundle, artifact: Artifact, provider: str, device: int = 0) -> Setup:
    """How to run an artifact with a provider.

    Args:
        device: the GPU's number.

    Raises:
        DeviceUnavailable: the provider, its libraries or the GPU are not there.
        UsageError: the environment asks for TF32.
    """
    available = library.get_available_providers()
    built_in = PROVIDERS[provider] in available
    if not built_in and (provider != "tensorrt-rtx" or importlib.util.find_spec(PLUGIN) is None):
        has = ", ".join(available)
        message = f"ONNX Runtime {library.__version__} has no {provider} provider here (it has {has})"
        raise DeviceUnavailable(message, hint=_INSTALL_PLUGIN if provider == "tensorrt-rtx" else _INSTALL_GPU)
    if provider == "tensorrt":
        return _tensorrt(library, bundle, artifact, device)
    if provider == "tensorrt-rtx":
        return _tensorrt_rtx(library, bundle, artifact, device, built_in)
    if provider == "cuda":
        return Setup((_cuda(device),), executes=_rest(artifact))
    return Setup(((PROVIDERS["cpu"], {}),), executes=_on_the_cpu(artifact))


def _rest(artifact: Artifact) -> str:
    """What an artifact computes in where nothing takes its 8 bits: quantised values, in floats."""
    return artifact.quantisation.rest if artifact.quantisation else artifact.precision


def _on_the_cpu(artifact: Artifact) -> str:
    """Its kernels take int8; fp8 is computed in floats of rounded values."""
    rest = _rest(artifact)
    narrow = "int8+" if artifact.precision == "int8" else ""
    fallen = "" if rest == "fp32" else ", in fp32 where this CPU has no kernel for it"
    return f"{narrow}{rest}{fallen}"


def _cuda(device: int) -> tuple[str, dict[str, str]]:
    # TF32 has ten bits of mantissa: an fp32 artifact in it would not be one.
    return PROVIDERS["cuda"], {"device_id": str(device), "use_tf32": "0"}


def _tensorrt(library: Any, bundle: Bundle, artifact: Artifact, device: int) -> Setup:
    gpu = _gpu("tensorrt", device)
    version = _load_nvinfer(library)
    _forbid_tf32()
    options = {"device_id": str(device), **_profile("trt", artifact)}
    executes: str = artifact.precision
    if not _strongly_typed(library, version) and artifact.precision != "fp32":
        # Without these a weakly typed network is widened to fp32; with them its layers may be narrowed.
        options |= {
            "trt_fp16_enable": str(int(_has_type(artifact, "fp16"))),
            "trt_bf16_enable": str(int(_has_type(artifact, "bf16"))),
            **({"trt_int8_enable": "1"} if artifact.precision == "int8" else {}),
            "trt_layer_norm_fp32_fallback": "1",
        }
        executes = f"{artifact.precision}, in types that TensorRT chooses layer by layer"
    machine = (library.__version__, f"tensorrt_{version}", gpu.name)
    if engines := _folder(*machine, _identity(bundle, artifact, options)):
        options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(engines)}
    if timings := _folder(*machine, "timing"):
        options |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": str(timings)}
    return Setup(((PROVIDERS["tensorrt"], options), _cuda(device)), executes=executes)


def _tensorrt_rtx(library: Any, bundle: Bundle, artifact: Artifact, device: int, built_in: bool) -> Setup:
    _forbid_tf32()
    options = _profile("nv", artifact)
    gpu = _gpu("tensorrt-rtx", device)
    identity = _identity(bundle, artifact, options)
    if kernels := _folder(library.__version__, "tensorrt-rtx", gpu.name, identity):
        options["nv_runtime_cache_path"] = str(kernels)
    name = PROVIDERS["tensorrt-rtx"]
    devices = _devices(library, name)
    if built_in and not devices:
        return Setup(((name, {"device_id": str(device), **options}),), executes=artifact.precision)
    devices = devices or _plugin_devices(library, name)
    if device >= len(devices):
        message = f"the tensorrt-rtx provider finds {len(devices)} GPUs: there is no cuda:{device}"
        raise DeviceUnavailable(message)
    return Setup(((name, options),), plugin=(devices[device],), executes=artifact.precision)


def _gpu(provider: str, device: int) -> Gpu:
    gpus = find_gpus()
    if device >= len(gpus):
        reason = f"there is no cuda:{device}" if gpus else "no NVIDIA GPU answers"
        raise DeviceUnavailable(f"ONNX Runtime's {provider} provider does not run here: {reason}")
    return gpus[device]


def _profile(prefix: str, artifact: Artifact) -> dict[str, str]:
    """The shapes to build an engine for: its batch sizes; none for a model whose shapes are fixed.

    Without them the provider builds an engine for the first batch it sees, and again for each larger one.
    """
    inputs = [spec for spec in artifact.inputs if any(isinstance(size, str) for size in spec.shape)]
    batch = artifact.batch
    return {
        f"{prefix}_profile_{kind}_shapes": ",".join(
            f"{spec.name}:{'x'.join(str(size if isinstance(size, int) else count) for size in spec.shape)}"
            for spec in inputs
        )
        for kind, count in (("min", batch.min), ("opt", batch.opt), ("max", batch.max))
        if inputs
    }


def _strongly_typed(library: Any, tensorrt: str) -> bool:
    """Whether the provider keeps the types of the ONNX, if it is told nothing of precision.

    Since 1.27 it does not with TensorRT 10 (https://github.com/microsoft/onnxruntime/pull/29779); TensorRT 11
    knows no other way.
    """
    return _numbers(library.__version__) < (1, 27) or _numbers(tensorrt) >= (11,)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _has_type(artifact: Artifact, precision: Precision) -> bool:
    """Whether an artifact computes in a precision anywhere."""
    operations, dtype = artifact.proof.ops if artifact.proof else (), PRECISION_DTYPES[precision]
    return artifact.precision == precision or any(operation.dtype == dtype for operation in operations)


def has_bf16(artifact: Artifact) -> bool:
    return _has_type(artifact, "bf16")


def _forbid_tf32() -> None:
    """Keep fp32 artifacts in fp32. Neither provider has an option for it, but TensorRT reads a variable.

    It stays set: TensorRT complains of an engine that was built with another value than it runs with.
    """
    if os.environ.setdefault(_TF32, "0") != "0":
        value = os.environ[_TF32]
        raise UsageError(
            f"{_TF32}={value} asks for TF32, which is not the precision of any artifact", hint="unset it"
        )


def _load_nvinfer(library: Any) -> str:
    """The version of TensorRT that the provider is linked to, once it is known to load.

    Raises:
        DeviceUnavailable: it is not installed, or not where the system looks for libraries.
    """
    provider = Path(library.__file__).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
    linked = re.search(rb"libnvinfer\.so\.\d+", provider.read_bytes()) if provider.is_file() else None
    name = linked.group().decode() if linked else "libnvinfer.so.10"
    try:
        number = ctypes.CDLL(name).getInferLibVersion()
    except (OSError, AttributeError) as error:
        major = name.rpartition(".")[2]
        message = f"ONNX Runtime's tensorrt provider needs {name} (TensorRT {major}): {one_line(error)}"
        hint = f"install TensorRT {major} and put the folder of its libraries on LD_LIBRARY_PATH"
        raise DeviceUnavailable(message, hint=hint) from error
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _devices(library: Any, name: str) -> list[Any]:
    """The GPUs that a registered plugin takes; its name is then listed as if it were built in."""
    return [device for device in library.get_ep_devices() if device.ep_name == name]


def _plugin_devices(library: Any, name: str) -> list[Any]:
    """Register NVIDIA's plugin, for the life of the process: the GPUs that it takes.

    Raises:
        DeviceUnavailable: the plugin does not load, or takes none of the GPUs here.
    """
    try:
        _register(library, name, Path(importlib.import_module(PLUGIN).get_library_path()))
    except Exception as error:  # ONNX Runtime's errors have no base class of their own
        if "already registered" not in str(error):
            message = f"ONNX Runtime's tensorrt-rtx provider does not load: {_reason(error)}"
            hint = "it needs the NVIDIA driver, and onnxruntime 1.24 or later"
            raise DeviceUnavailable(message, hint=hint) from error
    if devices := _devices(library, name):
        return devices
    gpus = ", ".join(f"{gpu.name} ({gpu.arch})" for gpu in find_gpus()) or "none answers"
    message = f"TensorRT for RTX runs on none of the GPUs here: {gpus}"
    raise DeviceUnavailable(message, hint="it takes sm_86, sm_89, and sm_120 and later")


def _register(library: Any, name: str, path: Path) -> None:
    try:
        library.register_execution_provider_library(name, str(path))
    except Exception as error:  # ONNX Runtime's errors have no base class of their own
        if "libcudart" not in str(error):
            raise
        # A CUDA runtime lies beside the plugin, but under a name that the loader does not look for.
        for runtime in path.parent.glob("libcudart.so.*"):
            ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
        library.register_execution_provider_library(name, str(path))


def _identity(bundle: Bundle, artifact: Artifact, options: dict[str, str]) -> str:
    """Changes with every byte of the model and every option that shapes an engine."""
    files = {name: bundle.manifest.files[name].sha256 for name in artifact.files}
    return hashlib.sha256(json.dumps([files, options], sort_keys=True).encode()).hexdigest()[:32]


def _folder(*parts: str) -> Path | None:
    """A folder in the user's cache; None where it cannot be written, and then nothing is cached.

    Only the user may write there: what lies in it is loaded as code.
    """
    folder = CacheFile.of("onnxruntime", *parts).path
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    return None


def unavailable(error: BaseException, artifact: Artifact, provider: str) -> VitdeployError | None:
    """What ONNX Runtime's error says of the provider; None if it is about the model."""
    text = str(error)
    if "fallback to CPU EP has been explicitly disabled" in text:
        message = f"{artifact.name}: the {provider} provider leaves parts of the model to the CPU"
        return DeviceUnavailable(message, hint="if it could not be loaded, its log above names the library")
    if provider != "cpu" and any(sign in text for sign in _CANNOT_START):
        return DeviceUnavailable(f"ONNX Runtime cannot start its {provider} provider: {_reason(error)}")
    return None


def _reason(error: BaseException) -> str:
    """ONNX Runtime's message without the places in its source that it passed."""
    text = " ".join(str(error).split())
    return re.sub(r"^.*(\[ONNXRuntimeError\] : \d+ : \w+ : |(?=Please install))", "", text)[:300]


def shares(session: Any, provider: str) -> tuple[str, ...]:
    """How many of the model's nodes each provider runs, where ONNX Runtime tells (1.24 and later).

    Raises:
        DeviceUnavailable: the provider that was asked for runs none.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return ()
    counts: dict[str, int] = {}
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
    if counts and PROVIDERS[provider] not in counts:
        others = ", ".join(counts)
        raise DeviceUnavailable(
            f"the {provider} provider runs no part of the model: all of it is left to {others}"
        )
    total = sum(counts.values())
    return tuple(f"{name}: {count} of {total} nodes" for name, count in counts.items())
