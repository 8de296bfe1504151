"""What goes to the process that builds engines, what comes back, and what is kept beside each engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vitdeploy.bundle.manifest import TensorSpec, first_problem
from vitdeploy.bundle.proofs import PrecisionProof
from vitdeploy.bundle.quantisation import QuantisedGemms
from vitdeploy.bundle.records import Sha256
from vitdeploy.config import BatchRange, Precision
from vitdeploy.errors import UsageError, did_you_mean
from vitdeploy.tensorrt.flavours import FlavourName
from vitdeploy.tensorrt.fusion import FusionReport

Hardware = Literal["none", "ampere_plus", "same_compute_capability"]
Weights = Literal["full", "refit", "stripped"]
Report = Callable[[str, float], None]
"""Receives what a builder is doing, and how far it is (0 to 1)."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BuildSettings(_Record):
    """What a user can choose about an engine; the defaults are TensorRT's own."""

    workspace: int | None = None
    """Bytes of GPU memory that a kernel may use for itself."""
    level: int | None = None
    """How hard the builder searches, 0 to 5."""
    timing_cache: bool = True
    """Keep the builder's measurements between builds."""
    hardware: Hardware = "none"
    """Which other GPUs the engine is to run on, at some cost in speed."""
    version_compatible: bool = False
    """Whether later versions of TensorRT may load it."""
    weights: Weights = "full"
    """``refit``: may be replaced; ``stripped``: left out, and taken from the ONNX file when it is loaded."""

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Settings from what a user gave.

        Raises:
            UsageError: a value that does not exist.
        """
        for name in values:
            if name not in cls.model_fields:
                suggestion = did_you_mean(name, cls.model_fields)
                raise UsageError(f"unknown engine setting {name!r}{suggestion}")
        for name, choices in (("hardware", get_args(Hardware)), ("weights", get_args(Weights))):
            given = str(values.get(name, choices[0]))
            if given not in choices:
                raise UsageError(
                    f"unknown {name} {given!r}{did_you_mean(given, choices)}",
                    hint=f"known: {', '.join(choices)}",
                )
        try:
            return cls(**values)
        except ValidationError as error:
            raise UsageError(f"engine setting {first_problem(error)}") from error


class BuildJob(_Record):
    """Engines to build from one ONNX file."""

    flavour: FlavourName
    onnx: str
    input: TensorSpec
    precision: Precision
    """The graph's default dtype."""
    islands: tuple[str, ...]
    quantised: QuantisedGemms | None = None
    """Of its GEMMs, those that must be in 8 bits; None asks for none."""
    profiles: tuple[BatchRange, ...]
    targets: tuple[tuple[str, ...], ...]
    """Architectures of each engine; one empty group is the GPU that is here."""
    outputs: tuple[str, ...]
    """Where to write each engine."""
    settings: BuildSettings = BuildSettings()


class BuiltEngine(_Record):
    """One engine that was written."""

    seconds: float
    size: int
    fusion: FusionReport | None = None
    """What it fuses, where a GPU is there to ask it."""


class BuildResult(_Record):
    """What a build found out."""

    version: str
    """Of the library."""
    gpu: str | None
    """Whose kernels were timed; none where it built for GPUs that are not here."""
    proof: PrecisionProof
    fusion: FusionReport
    engines: tuple[BuiltEngine, ...]
    layers: int
    parse_seconds: float
    framework_bytes: int
    """The process's largest memory before the model was read."""
    peak_bytes: int
    """The same, when all was done."""


class EngineRecord(_Record):
    """The JSON file beside an engine."""

    schema_version: Literal[1] = 1
    flavour: FlavourName
    version: str
    """Of the library that built it."""
    targets: tuple[str, ...]
    """GPU architectures it runs on; ``sm_80+`` is that one and all later ones."""
    gpu: str | None
    """The GPU it was built on."""
    size: int
    sha256: Sha256
    """Of the engine."""
    source: str
    """The ONNX artifact it was built from ..."""
    source_sha256: dict[str, Sha256]
    """... and its files."""
    profiles: tuple[BatchRange, ...] = Field(min_length=1)
    """Batch sizes, one range for each optimization profile."""
    settings: BuildSettings
    plugins: bool = Field(default=False, exclude=True)
    """Read in records of before our kernels stopped being plugins; written no more."""
    build_seconds: float
    proof: PrecisionProof
    fusion: FusionReport
