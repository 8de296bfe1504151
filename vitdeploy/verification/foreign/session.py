"""A stranger's ONNX file in ONNX Runtime on the CPU, behind the names that the checkpoint's outputs have."""

from __future__ import annotations

from collections.abc import Mapping

from vitdeploy.backends.base import Array, Options, Session, SessionFacts, one_line
from vitdeploy.backends.onnxruntime import NO_BF16, open_file
from vitdeploy.backends.onnxruntime_providers import import_onnxruntime
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.bundle.manifest import TensorSpec
from vitdeploy.config import BatchRange, Size
from vitdeploy.errors import BundleError, DeviceUnavailable
from vitdeploy.verification.foreign.onnx_file import OnnxFile
from vitdeploy.verification.foreign.truth import INPUT, Chosen

_NEVER = "bf16"
"""What ONNX Runtime's CPU provider does not compute in."""


class FileSession(Session):
    """A loaded file; it takes ``pixel_values`` and gives ``logits``, ``tokens`` or ``features``."""

    def __init__(self, file: OnnxFile, chosen: Chosen, size: Size, options: Options) -> None:
        """Load a file.

        Raises:
            BundleError: ONNX Runtime cannot load it.
            DeviceUnavailable: it is in bf16, which this runtime does not compute.
        """
        interface = file.interface
        claim, _ = file.claim
        if claim == _NEVER:
            raise DeviceUnavailable(f"{file.path}: {NO_BF16}", hint="vitdeploy export --bf16 proves its own")
        rows = interface.batch
        channels = interface.channels or 3
        image = (*size, channels) if interface.kind == "uint8" else (channels, *size)
        shape = chosen.value.shape or ()
        precision: ArtifactPrecision = claim if claim in ("fp32", "fp16", "mixed") else "fp16"
        facts = SessionFacts(
            backend="onnxruntime",
            artifact=file.name,
            precision=precision,
            executes=claim,
            device="cpu",
            provider="cpu",
            batch=None if rows is None else BatchRange(rows, rows, rows),
            inputs=(TensorSpec(name=INPUT, dtype=interface.dtype, shape=(rows or "N", *image)),),
            outputs=(
                TensorSpec(
                    name=chosen.output,
                    dtype="float32",
                    shape=(rows or "N", *(d if d is not None else f"d{i}" for i, d in enumerate(shape[1:]))),
                ),
            ),
            versions={"onnxruntime": import_onnxruntime().__version__},
            rebuild="the file has this batch size built in",
        )
        super().__init__(facts)
        self._names = interface.input, chosen.value.name
        self._session = open_file(file.path, options.session_threads)

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        source, result = self._names
        try:
            (output,) = self._session.run([result], {source: inputs[INPUT]})
        except Exception as error:  # its errors have no base class of their own
            raise BundleError(f"{self.facts.artifact}: ONNX Runtime failed: {one_line(error)}") from error
        return {self.facts.outputs[0].name: output}

    def _close(self) -> None:
        self._session = None
