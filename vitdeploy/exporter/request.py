"""What a user asks of an export, checked for what can be checked before any work."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from vitdeploy.backends.triton import AOT
from vitdeploy.checkpoint.opening import DEFAULT_MODEL, Checkpoint, UserModule, open_model
from vitdeploy.config import BatchRange, Precision, Size
from vitdeploy.errors import UsageError, did_you_mean
from vitdeploy.exporter import triton_aot
from vitdeploy.exporter.engine_request import AUTO, EngineRequest
from vitdeploy.exporter.onnx import OnnxOptions
from vitdeploy.exporter.subject import Subject, subject_of
from vitdeploy.model.precision import DTYPES
from vitdeploy.tensorrt.flavours import FLAVOURS
from vitdeploy.tensorrt.records import BuildSettings

FORMATS: tuple[str, ...] = (AUTO, "onnx", *FLAVOURS, AOT)


@dataclass(frozen=True)
class ExportRequest:
    """Everything a user can ask of an export.

    Raises:
        UsageError: a value that no export could serve.
    """

    model: str | Path | nn.Module | None = None
    checkpoint: Path | None = None
    precisions: tuple[str, ...] = ("fp32",)
    formats: tuple[str, ...] = ("auto",)
    image_size: Size | None = None
    batch: BatchRange = field(default_factory=BatchRange)
    opset: int = 20
    input: str = "float"
    output: str | None = None
    atol: float | None = None
    architectures: tuple[str, ...] = ()
    """GPUs to build engines and compile kernels for; ``sm_80+sm_89`` is one engine for both."""
    profiles: tuple[BatchRange, ...] = ()
    """Optimization profiles of engines; the batch range when empty."""
    settings: BuildSettings = field(default_factory=BuildSettings)
    """Of engines."""
    fallback: bool = True
    seed: int = 0
    command: str = ""

    def __post_init__(self) -> None:
        for what, given, known in (
            ("precision", self.precisions, tuple(DTYPES)),
            ("format", self.formats, FORMATS),
        ):
            for name in given:
                if name not in known:
                    raise UsageError(
                        f"unknown {what} {name!r}{did_you_mean(name, known)}",
                        hint=f"known: {', '.join(known)}",
                    )
        if self.atol is not None and not self.atol > 0:
            raise UsageError(f"atol must be positive, not {self.atol}")
        OnnxOptions(self.batch, self.opset)
        if not self.engines.formats and (self.profiles or self.settings != BuildSettings()):
            hint = "--format onnx,tensorrt-rtx, or tensorrt"
            raise UsageError(
                "profiles and builder settings are for engines, and no format makes any", hint=hint
            )
        if AOT in self.formats:
            triton_aot.check_architectures(self.kernel_architectures)
            if not self.kernel_precisions:
                listed = ", ".join(self.precisions)
                raise UsageError(f"the kernels compute in fp16 or bf16, not in {listed}", hint="add --fp16")
        elif self.architectures and not self.engines.formats:
            raise UsageError(
                "--arch names GPUs to build for, and no format needs it",
                hint=f"--format onnx,tensorrt-rtx, or onnx,{AOT}",
            )

    @property
    def wants_onnx(self) -> bool:
        """Engines are built from it, and proven by it where they do not run."""
        return {AOT} != set(self.formats)

    @property
    def engines(self) -> EngineRequest:
        """What is asked of engines."""
        formats = tuple(name for name in self.formats if name == AUTO or name in FLAVOURS)
        architectures = self._architectures(kernels=False)
        return EngineRequest(formats, architectures, self.profiles, self.settings)

    @property
    def kernel_architectures(self) -> tuple[str, ...]:
        """GPUs to compile the fused kernels for."""
        parts = (part for text in self._architectures(kernels=True) for part in text.split("+"))
        return tuple(dict.fromkeys(parts))

    def _architectures(self, *, kernels: bool) -> tuple[str, ...]:
        """Of the architectures, those for the kernels or those for engines, where both are asked for."""
        if AOT not in self.formats or set(self.formats).isdisjoint((AUTO, *FLAVOURS)):
            return self.architectures
        known = {True: set(triton_aot.known_architectures()), False: set(FLAVOURS["tensorrt-rtx"].targets)}
        mine, theirs = known[kernels], known[not kernels]
        parts = {text: set(text.split("+")) for text in self.architectures}
        # What neither knows is left to both, to be refused.
        return tuple(text for text in parts if parts[text] <= mine or not parts[text] <= theirs)

    @property
    def kernel_precisions(self) -> tuple[Precision, ...]:
        """In which the fused kernels are to be compiled."""
        wanted = self.precisions if AOT in self.formats else ()
        return tuple(precision for precision in ("fp16", "bf16") if precision in wanted)

    @property
    def onnx(self) -> OnnxOptions:
        return OnnxOptions(self.batch, self.opset)

    def open(self) -> tuple[Checkpoint | UserModule, Subject]:
        """Load the model."""
        if isinstance(self.model, nn.Module):
            opened: Checkpoint | UserModule = UserModule(
                self.model, type(self.model).__name__, self.image_size or (224, 224)
            )
        else:
            name = None if self.model is None else str(self.model)
            opened = open_model(name, checkpoint=self.checkpoint, image_size=self.image_size, seed=self.seed)
        return opened, subject_of(opened, self.output, self.input)


def default_folder(request: ExportRequest) -> Path:
    """Where a bundle goes when the user names no place: the model's name in the working directory."""
    name = (
        type(request.model).__name__
        if isinstance(request.model, nn.Module)
        else str(request.model or DEFAULT_MODEL)
    )
    if request.checkpoint is not None and request.model is None:
        name = request.checkpoint.stem
    path = Path(name)
    if path.exists():
        name = path.stem if path.is_file() else path.resolve().name
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")
    return Path(f"{stem or 'model'}.bundle")
