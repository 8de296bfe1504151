"""OpenVINO: ONNX artifacts on the CPU, in the precision they were exported in where the CPU has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vitdeploy.backends.base import (
    Array,
    Backend,
    Options,
    Session,
    SessionFacts,
    Traits,
    check_declared,
    one_line,
    refuse,
    require_support,
    split_device,
)
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import Artifact, Manifest, TensorSpec
from vitdeploy.errors import BundleError, UsageError

_HINTS: Mapping[ArtifactPrecision, tuple[str, str]] = {"fp16": ("f16", "FP16"), "bf16": ("bf16", "BF16")}
_NAMES = {"f32": "fp32", "f16": "fp16", "i8": "int8", "u8": "int8"}
_GEMMS = ("FullyConnected", "MatMul", "Convolution")


class OpenVino(Backend):
    """The backend. A session serves one thread at a time."""

    traits = Traits(
        name="openvino",
        summary="Intel's OpenVINO on the CPU",
        libraries=("openvino",),
        extras=("openvino",),
        formats=("onnx",),
    )

    def supports(self, manifest: Manifest, artifact: Artifact | None) -> str | None:
        return None if artifact is not None and artifact.format == "onnx" else "it runs ONNX artifacts only"

    def load(self, bundle: Bundle, artifact: Artifact | None, options: Options) -> Session:
        return self.load_several(bundle, artifact, options, 1)[0]

    def load_several(
        self, bundle: Bundle, artifact: Artifact | None, options: Options, count: int
    ) -> tuple[Session, ...]:
        """As every backend; the artifact is compiled once, with a stream for each session, and all have the
        weights in common."""
        refuse(self.name, options)
        if split_device(options.device or "cpu")[0] != "cpu":
            raise UsageError(f"the {self.name} backend runs on the cpu, not on {options.device}")
        library = _library()
        require_support(self, bundle, artifact)
        assert artifact is not None
        bundle.verify_hashes(artifact.files)
        compiled = _compile(library, bundle.path(artifact.path), artifact, options.session_threads, count)
        facts = SessionFacts(
            backend=self.name,
            artifact=artifact.name,
            precision=artifact.precision,
            executes=_executes(compiled),
            device="cpu",
            provider="cpu",
            batch=artifact.batch,
            inputs=artifact.inputs,
            outputs=artifact.outputs,
            versions={"openvino": str(library.__version__)},
        )
        return tuple(OpenVinoSession(facts, compiled, alone=count == 1) for _ in range(count))


class OpenVinoSession(Session):
    """One inference request of a compiled model, which others may share."""

    def __init__(self, facts: SessionFacts, compiled: Any, *, alone: bool) -> None:
        super().__init__(facts)
        self._alone = alone
        self._request = compiled.create_infer_request()

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        try:
            if self._alone:
                results = self._request.infer(dict(inputs), share_inputs=True)
            else:  # its stream does it; called straight, it takes a third more of the processors
                self._request.start_async(dict(inputs), share_inputs=True)
                self._request.wait()
                results = self._request.results
            # What it returns is its own memory, overwritten by the next run.
            return {spec.name: np.array(results[spec.name]) for spec in self.facts.outputs}
        except RuntimeError as error:
            raise BundleError(f"{self.facts.artifact}: OpenVINO failed: {one_line(error)}") from error

    def _close(self) -> None:
        self._request = None


def _library() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise OpenVino.traits.missing("openvino") from error
    return openvino


def _compile(library: Any, path: Path, artifact: Artifact, threads: int | None, streams: int) -> Any:
    from openvino.frontend import FrontEndManager

    core = library.Core()
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": _precision(core, hinted(artifact))}
    settings |= {"PERFORMANCE_HINT": "LATENCY"} if streams == 1 else {"NUM_STREAMS": streams}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = streams * threads
    try:
        # Asked by name: guessing the format would offer a broken file to every parser it has.
        reader = FrontEndManager().load_by_framework("onnx")
        model = reader.convert(reader.load(str(path)))
        compiled = core.compile_model(model, "CPU", settings)
    except Exception as error:  # its errors have no base class of their own
        raise BundleError(f"{path}: OpenVINO cannot load it: {one_line(error)}") from error
    check_declared(
        artifact, _dtypes(compiled.inputs, artifact.inputs), _dtypes(compiled.outputs, artifact.outputs)
    )
    return compiled


def _dtypes(values: Any, specs: tuple[TensorSpec, ...]) -> dict[str, str]:
    """Names to dtypes; a value that a fused cast left with several names goes by the one in the manifest."""
    names = {spec.name for spec in specs}
    return {
        next(iter(names & value.get_names()), value.get_any_name()): value.get_element_type().to_dtype().name
        for value in values
    }


def hinted(artifact: Artifact) -> ArtifactPrecision:
    """What to ask for: an int8 artifact is fast where what is not quantised is in bf16; fp8 is computed in
    fp32, as it is to prove answers only."""
    rest = artifact.quantisation.rest if artifact.quantisation else artifact.precision
    return "bf16" if artifact.precision == "int8" and rest == "fp32" else rest


def _precision(core: Any, precision: ArtifactPrecision) -> str:
    """What to compute in. Left alone, it computes fp32 models in bf16 wherever the CPU has that.

    A precision the CPU lacks is widened, never traded for another narrow one; "mixed" is widened
    always, because the hint knows no islands and they are the reason why the artifact is mixed.
    """
    hint, capability = _HINTS.get(precision, ("f32", "FP32"))
    return hint if capability in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"


def _executes(compiled: Any) -> str:
    """The precisions of the GEMMs that will run, read back from the compiled graph."""
    infos = [operation.get_rt_info() for operation in compiled.get_runtime_model().get_ops()]
    precisions = {
        info["runtimePrecision"].astype(str) for info in infos if info["layerType"].astype(str) in _GEMMS
    }
    return "+".join(sorted(_NAMES.get(name, name) for name in precisions)) or "no GEMM"
