"""A stranger's file in a runtime, behind the names that the checkpoint's inputs and outputs have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vitdeploy.backends.base import Array, Options, Session, SessionFacts
from vitdeploy.backends.onnxruntime import NO_BF16, OnnxRuntimeSession, open_file
from vitdeploy.backends.onnxruntime_providers import import_onnxruntime
from vitdeploy.bundle.dtypes import ArtifactPrecision, DType
from vitdeploy.bundle.manifest import TensorSpec
from vitdeploy.config import BatchRange, Size
from vitdeploy.errors import DeviceUnavailable
from vitdeploy.verification.foreign.onnx_file import Interface, OnnxFile, Value
from vitdeploy.verification.foreign.truth import INPUT, Chosen


class Renamed(Session):
    """A session of one input and one output, by the checkpoint's names for them; closes the other with it."""

    def __init__(self, session: Session, chosen: Chosen) -> None:
        (source,), (result,) = session.facts.inputs, session.facts.outputs
        super().__init__(
            replace(
                session.facts,
                inputs=(source.model_copy(update={"name": INPUT}),),
                outputs=(result.model_copy(update={"name": chosen.output}),),
            )
        )
        self._session, self._source, self._result = session, source.name, result.name

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        given = self._session.run({self._source: inputs[INPUT]})
        return {self.facts.outputs[0].name: given[self._result]}

    def _close(self) -> None:
        self._session.close()


def open_session(file: OnnxFile, chosen: Chosen, size: Size, options: Options) -> Renamed:
    """Load an ONNX file into ONNX Runtime on the CPU.

    Raises:
        BundleError: it cannot be loaded.
        DeviceUnavailable: it is in bf16, which this runtime does not compute.
    """
    interface, (claim, _) = file.interface, file.claim
    if claim == "bf16":
        raise DeviceUnavailable(f"{file.path}: {NO_BF16}", hint="vitdeploy export --bf16 proves its own")
    rows = interface.batch
    facts = SessionFacts(
        backend="onnxruntime",
        artifact=file.name,
        precision=tolerated(claim),
        executes=claim,
        device="cpu",
        provider="cpu",
        batch=None if rows is None else BatchRange(rows, rows, rows),
        inputs=(input_of(interface, size),),
        outputs=(output_of(chosen.value),),
        versions={"onnxruntime": import_onnxruntime().__version__},
        rebuild="the file has this batch size built in",
    )
    session = open_file(file.path, options.session_threads, fp8=file.has_fp8)
    return Renamed(OnnxRuntimeSession(facts, session), chosen)


def tolerated(claim: str) -> ArtifactPrecision:
    """The precision whose tolerances are looked at; of quantised files none are."""
    known: dict[str, ArtifactPrecision] = {"fp32": "fp32", "bf16": "bf16", "mixed": "mixed"}
    return known.get(claim, "fp16")


def input_of(interface: Interface, size: Size) -> TensorSpec:
    """What goes into a file, images of this size."""
    channels = interface.channels or "C"
    image = (*size, channels) if interface.kind == "uint8" else (channels, *size)
    return TensorSpec(name=interface.input, dtype=interface.dtype, shape=(interface.batch or "N", *image))


def output_of(value: Value) -> TensorSpec:
    """What comes out; a dimension that varies has a name."""
    first, *others = value.shape or (None,)
    shape = (first or "N", *(size if size is not None else f"d{i}" for i, size in enumerate(others)))
    dtype: DType = value.dtype  # type: ignore[assignment]  # a floating one, as ``Truth.choose`` has made sure
    return TensorSpec(name=value.name, dtype=dtype, shape=shape)
