"""ONNX Runtime: ONNX artifacts on the CPU, on CUDA, and through its TensorRT provider."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vitdeploy.backends.base import (
    Array,
    Availability,
    Options,
    Session,
    SessionFacts,
    check_signature,
    one_line,
    require_support,
    split_device,
)
from vitdeploy.bundle import Bundle
from vitdeploy.errors import BundleError, DeviceUnavailable, MissingDependency, UsageError, did_you_mean
from vitdeploy.manifest import Artifact, Manifest

if TYPE_CHECKING:
    import onnxruntime

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_INSTALL_GPU = 'pip uninstall onnxruntime, then pip install "vitdeploy[gpu]", on a machine with an NVIDIA GPU'
_NO_BF16 = "ONNX Runtime's CPU provider has no bf16 kernels"


class OnnxRuntime:
    """The backend. Its sessions may be shared between threads."""

    name = "onnxruntime"
    summary = "ONNX Runtime, CPU by default; providers cuda and tensorrt with onnxruntime-gpu"
    formats: tuple[str, ...] = ("onnx",)

    def availability(self) -> Availability:
        if importlib.util.find_spec("onnxruntime") is None:
            return Availability(False, "onnxruntime is not installed", "pip install onnxruntime")
        return Availability(True)

    def supports(self, manifest: Manifest, artifact: Artifact | None) -> str | None:
        if artifact is None or artifact.format != "onnx":
            return "it runs ONNX artifacts only"
        if _has_bf16(artifact) and self.availability().ok and not _gpu_providers():
            return _NO_BF16
        return None

    def load(self, bundle: Bundle, artifact: Artifact | None, options: Options) -> Session:
        provider, device = _choose(options)
        library = _library()
        require_support(self, bundle, artifact)
        assert artifact is not None
        if provider == "cpu" and _has_bf16(artifact):
            raise UsageError(f"{artifact.name}: {_NO_BF16}", hint="--provider cuda, or another precision")
        _require_provider(library, provider)
        bundle.verify_hashes(artifact.files)
        session = _open(library, bundle, artifact, provider, device, options.threads)
        facts = SessionFacts(
            backend=self.name,
            artifact=artifact.name,
            precision=artifact.precision,
            executes=_executes(artifact, provider),
            device="cpu" if provider == "cpu" else f"cuda:{device}",
            provider=provider,
            batch=artifact.batch,
            inputs=artifact.inputs,
            outputs=artifact.outputs,
            versions={"onnxruntime": library.__version__},
        )
        return OnnxRuntimeSession(facts, session)


class OnnxRuntimeSession(Session):
    """A loaded ONNX file."""

    def __init__(self, facts: SessionFacts, session: onnxruntime.InferenceSession) -> None:
        super().__init__(facts)
        self._session: Any = session
        self._outputs = [spec.name for spec in facts.outputs]

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        try:
            outputs = self._session.run(self._outputs, dict(inputs))
        except Exception as error:  # its errors have no base class of their own
            raise BundleError(f"{self.facts.artifact}: ONNX Runtime failed: {one_line(error)}") from error
        return dict(zip(self._outputs, outputs, strict=True))

    def _close(self) -> None:
        self._session = None


def _library() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        missing = MissingDependency("onnxruntime", extra="gpu", purpose="the onnxruntime backend")
        missing.hint = 'pip install onnxruntime, or "vitdeploy[gpu]" for CUDA'
        raise missing from error
    return onnxruntime


def available_providers() -> tuple[str, ...]:
    """The execution providers of the installed ONNX Runtime, by its own names; none where it is missing."""
    if importlib.util.find_spec("onnxruntime") is None:
        return ()
    return tuple(_library().get_available_providers())


def _gpu_providers() -> list[str]:
    return [name for name in available_providers() if name in list(_PROVIDERS.values())[1:]]


def _has_bf16(artifact: Artifact) -> bool:
    operations = artifact.proof.ops if artifact.proof else ()
    return artifact.precision == "bf16" or any(operation.dtype == "bfloat16" for operation in operations)


def _choose(options: Options) -> tuple[str, int]:
    """The provider and the device's number."""
    kind, index = split_device(options.device or "cpu")
    provider = options.provider or kind
    if provider not in _PROVIDERS:
        known = ", ".join(_PROVIDERS)
        raise UsageError(
            f"unknown provider {provider!r}{did_you_mean(provider, _PROVIDERS)}", hint=f"known: {known}"
        )
    if options.device is not None and (kind == "cpu") != (provider == "cpu"):
        raise UsageError(f"provider {provider} does not run on {options.device}")
    return provider, index


def _require_provider(library: Any, provider: str) -> None:
    available = library.get_available_providers()
    if _PROVIDERS[provider] not in available:
        has = ", ".join(available)
        message = f"ONNX Runtime {library.__version__} has no {provider} provider here (it has {has})"
        raise DeviceUnavailable(message, hint=_INSTALL_GPU)


def _open(
    library: Any, bundle: Bundle, artifact: Artifact, provider: str, device: int, threads: int | None
) -> Any:
    severity = 4 if provider == "cpu" else 3  # errors are raised; the log only adds why a GPU is not usable
    library.set_default_logger_severity(severity)
    settings = library.SessionOptions()
    settings.log_severity_level = severity
    # Threads that spin while they wait take the cores from whatever else runs: another session, a server.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.graph_optimization_level = library.GraphOptimizationLevel.ORT_ENABLE_ALL
    if threads is not None:
        settings.intra_op_num_threads = threads
    if provider != "cpu" and bundle.manifest.model is not None:
        # Our graphs need nothing of the CPU; a user's own may compute shapes there.
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    path = bundle.path(artifact.path)
    try:
        session = library.InferenceSession(path, settings, providers=_requested(artifact, provider, device))
    except Exception as error:  # its errors have no base class of their own
        if "fallback to CPU EP has been explicitly disabled" in str(error):
            message = f"{artifact.name}: the {provider} provider leaves parts of the model to the CPU"
            raise DeviceUnavailable(message) from error
        raise BundleError(f"{path}: ONNX Runtime cannot load it: {one_line(error)}") from error
    used = session.get_providers()[0]
    if used != _PROVIDERS[provider]:
        message = f"asked for {_PROVIDERS[provider]}, but ONNX Runtime fell back to {used}"
        raise DeviceUnavailable(message, hint="its log above names the library it could not load")
    check_signature(
        artifact,
        {value.name: _dtype(value) for value in session.get_inputs()},
        {value.name: _dtype(value) for value in session.get_outputs()},
    )
    return session


def _requested(artifact: Artifact, provider: str, device: int) -> list[Any]:
    if provider == "cpu":
        return [_PROVIDERS["cpu"]]
    # TF32 has ten bits of mantissa: an fp32 artifact in it would not be one.
    cuda = (_PROVIDERS["cuda"], {"device_id": device, "use_tf32": 0})
    if provider == "cuda":
        return [cuda]
    # Its networks are weakly typed: without these it would widen the artifact to fp32.
    half = {
        "trt_fp16_enable": artifact.precision in ("fp16", "mixed"),
        "trt_bf16_enable": artifact.precision == "bf16",
    }
    return [(_PROVIDERS["tensorrt"], {"device_id": device, **half}), cuda]


def _executes(artifact: Artifact, provider: str) -> str:
    if provider == "cpu" and artifact.precision != "fp32":
        return f"{artifact.precision}, in fp32 where this CPU has no kernel for it"
    return artifact.precision


def _dtype(value: Any) -> str:
    """The numpy name of what ONNX Runtime calls ``tensor(float)``."""
    name = str(value.type).removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)
