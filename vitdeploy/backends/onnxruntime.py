"""ONNX Runtime: ONNX artifacts on the CPU, on CUDA, and through its two TensorRT providers."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitdeploy.backends import onnxruntime_providers as providers
from vitdeploy.backends.base import (
    Array,
    Backend,
    Options,
    Session,
    SessionFacts,
    Traits,
    check_declared,
    one_line,
    require_support,
)
from vitdeploy.backends.onnxruntime_providers import (
    PROVIDERS,
    Setup,
    choose_provider,
    has_bf16,
    has_gpu_provider,
    set_up,
    shares,
    unavailable,
)
from vitdeploy.backends.onnxruntime_weights import without_weights
from vitdeploy.bundle.dtypes import from_onnx
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import Artifact, Manifest
from vitdeploy.bundle.onnx_graph import read_graph, site_of
from vitdeploy.errors import BundleError, DeviceUnavailable, UsageError
from vitdeploy.machine.temporary import temporary_folder

if TYPE_CHECKING:
    import onnxruntime

_FLOAT_GEMMS = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm")
"""Operators of an optimised graph; one in int8 is a ``MatMulIntegerToFloat``."""
NO_BF16 = "ONNX Runtime's CPU provider has no bf16 kernels"


class OnnxRuntime(Backend):
    """The backend. Its sessions may be shared between threads."""

    traits = Traits(
        name="onnxruntime",
        summary="ONNX Runtime, CPU by default; providers cuda, tensorrt and tensorrt-rtx",
        libraries=("onnxruntime",),
        formats=("onnx",),
        devices=("cpu", "cuda"),
        providers=tuple(PROVIDERS),
        spins=True,
    )

    def supports(self, manifest: Manifest, artifact: Artifact | None) -> str | None:
        if artifact is None or artifact.format != "onnx":
            return "it runs ONNX artifacts only"
        if has_bf16(artifact) and self.availability().ok and not has_gpu_provider(available_providers()):
            return NO_BF16
        return None

    def widened(self, bundle: Bundle, artifact: Artifact) -> tuple[str, ...]:
        if artifact.precision != "int8" or artifact.quantisation is None:
            return ()
        library = providers.import_onnxruntime()
        settings = session_settings(library, bundle, "cpu")
        with tempfile.TemporaryDirectory(dir=temporary_folder()) as folder:
            optimised = Path(folder, "optimised.onnx")
            settings.optimized_model_filepath = str(optimised)
            beside = "session.optimized_model_external_initializers"  # it is read without them
            settings.add_session_config_entry(f"{beside}_file_name", "weights")
            settings.add_session_config_entry(f"{beside}_min_size_in_bytes", "0")
            path = bundle.path(artifact.path)
            library.InferenceSession(path, settings, providers=[PROVIDERS["cpu"]], enable_fallback=0)
            nodes = read_graph(optimised).graph.node
        wide = {site_of(node.name) for node in nodes if node.op_type in _FLOAT_GEMMS}
        return tuple(site for site in artifact.quantisation.sites if site in wide)

    def load(self, bundle: Bundle, artifact: Artifact | None, options: Options) -> Session:
        provider, device = choose_provider(options)
        library = providers.import_onnxruntime()
        require_support(self, bundle, artifact)
        assert artifact is not None
        if provider == "cpu" and has_bf16(artifact):
            raise UsageError(f"{artifact.name}: {NO_BF16}", hint="--provider cuda, or another precision")
        setup = set_up(library, bundle, artifact, provider, device)
        bundle.verify_hashes(artifact.files)
        session = _open(library, bundle, artifact, provider, setup, options)
        facts = SessionFacts(
            backend=self.name,
            artifact=artifact.name,
            precision=artifact.precision,
            executes=setup.executes,
            device="cpu" if provider == "cpu" else f"cuda:{device}",
            provider=provider,
            batch=artifact.batch,
            inputs=artifact.inputs,
            outputs=artifact.outputs,
            versions={"onnxruntime": library.__version__},
            fusion=() if provider == "cpu" else shares(session, provider),
        )
        return OnnxRuntimeSession(facts, session)

    def load_several(
        self, bundle: Bundle, artifact: Artifact | None, options: Options, count: int
    ) -> tuple[Session, ...]:
        """As every backend; with one thread each, on the CPU, all have the weights in common.

        A run of one thread is done by the thread that calls, so that one session of ONNX Runtime serves any
        number of callers as well as sessions of their own would. With more threads each has its own: the
        callers of one would wait for the same threads, and Python has no way to let two have the weights
        (as they are packed for the GEMMs) in common.
        """
        if count == 1 or options.session_threads != 1 or choose_provider(options)[0] != "cpu":
            return super().load_several(bundle, artifact, options, count)
        first = self.load(bundle, artifact, options)
        assert isinstance(first, OnnxRuntimeSession)
        return (first, *(first.shared() for _ in range(count - 1)))


class OnnxRuntimeSession(Session):
    """A loaded ONNX file."""

    def __init__(self, facts: SessionFacts, session: onnxruntime.InferenceSession) -> None:
        super().__init__(facts)
        self._session: Any = session
        self._outputs = [spec.name for spec in facts.outputs]

    def shared(self) -> OnnxRuntimeSession:
        """Another one for the same loaded file, which stays until the last is closed."""
        return OnnxRuntimeSession(self.facts, self._session)

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        try:
            outputs = self._session.run(self._outputs, dict(inputs))
        except Exception as error:  # its errors have no base class of their own
            raise BundleError(f"{self.facts.artifact}: ONNX Runtime failed: {one_line(error)}") from error
        return dict(zip(self._outputs, outputs, strict=True))

    def _close(self) -> None:
        self._session = None


def available_providers() -> tuple[str, ...]:
    """The execution providers of the installed ONNX Runtime, by its own names; none where it is missing."""
    if importlib.util.find_spec("onnxruntime") is None:
        return ()
    return tuple(providers.import_onnxruntime().get_available_providers())


def session_settings(
    library: Any, bundle: Bundle | None, provider: str, *, fp8: bool = False, spin: bool = False
) -> Any:
    """What every session is made with, whatever it is for; on the CPU it may be of no bundle.

    Args:
        fp8: the file has 8-bit floats.
        spin: as ``Options.spin``; a server, and any other session, then lacks the cores.
    """
    severity = 4 if provider == "cpu" else 3  # errors are raised; the log only adds why a GPU is not usable
    library.set_default_logger_severity(severity)
    settings = library.SessionOptions()
    settings.log_severity_level = severity
    settings.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    settings.graph_optimization_level = library.GraphOptimizationLevel.ORT_ENABLE_ALL
    if fp8:  # what looks for quantised operations to fuse knows integers only
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
    if provider != "cpu":
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if bundle is not None and bundle.manifest.model is not None:
            # Our graphs need nothing of the CPU; a user's own may compute shapes there.
            settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return settings


def open_file(path: Path, threads: int | None, *, fp8: bool = False) -> Any:
    """An ONNX file of no bundle, on the CPU.

    Raises:
        BundleError: ONNX Runtime cannot load it.
    """
    library = providers.import_onnxruntime()
    settings = session_settings(library, None, "cpu", fp8=fp8)
    if threads is not None:
        settings.intra_op_num_threads = threads
    try:
        return library.InferenceSession(path, settings, providers=[PROVIDERS["cpu"]], enable_fallback=0)
    except Exception as error:  # its errors have no base class of their own
        raise BundleError(f"{path}: ONNX Runtime cannot load it: {one_line(error)}") from error


def _open(
    library: Any, bundle: Bundle, artifact: Artifact, provider: str, setup: Setup, options: Options
) -> Any:
    fp8, threads = artifact.precision == "fp8", options.session_threads
    settings = session_settings(library, bundle, provider, fp8=fp8, spin=options.spin)
    if threads is not None:
        settings.intra_op_num_threads = threads
    path = bundle.path(artifact.path)
    # Other providers name what they keep after the file.
    small = without_weights(path) if provider == "cpu" else None
    if small is not None:
        settings.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.parent)
        )
    try:
        requested = setup.add_to(settings)
        # Its own fallback prints to stdout and takes the CPU.
        session = library.InferenceSession(small or path, settings, providers=requested, enable_fallback=0)
    except Exception as error:  # its errors have no base class of their own
        if refusal := unavailable(error, artifact, provider):
            raise refusal from error
        raise BundleError(f"{path}: ONNX Runtime cannot load it: {one_line(error)}") from error
    used = session.get_providers()[0]
    if used != PROVIDERS[provider]:
        message = f"asked for {PROVIDERS[provider]}, but ONNX Runtime fell back to {used}"
        raise DeviceUnavailable(message, hint="its log above names the library it could not load")
    check_declared(
        artifact,
        {value.name: from_onnx(value.type) for value in session.get_inputs()},
        {value.name: from_onnx(value.type) for value in session.get_outputs()},
    )
    return session
