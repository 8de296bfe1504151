"""What a manifest says of quantised artifacts, and of the images that they were made with."""

from __future__ import annotations

from typing import Literal, Self, get_args

from pydantic import Field

from vitdeploy.bundle.dtypes import QUANTISED_DTYPES, ArtifactPrecision, OpDType, Quantised
from vitdeploy.bundle.records import Record, Sha256
from vitdeploy.config import Precision


class QuantisationRecord(Record):
    """How an artifact of ``int8`` or ``fp8`` was made."""

    rest: Precision
    """Of everything that is not quantised."""
    weight_bits: Literal[7, 8]
    sites: tuple[str, ...]
    """The quantised GEMMs; an attention's two products go by its own name (``blocks.3.attn``)."""
    left_out: tuple[str, ...] = ()
    """GEMMs that could be, and stay float, because they cost too much of the answer."""
    macs: float = Field(ge=0, le=1)
    """Share of the GEMMs' multiplications that is quantised."""
    images: int = Field(ge=1)
    """How many images it was calibrated with."""
    attention: bool = False
    """Whether the products inside of attention are fp8, too."""


class CalibrationRecord(Record):
    """The images behind the quantised artifacts of a bundle, by the sha256 of their files.

    Their pixels are in the bundle, too: those that were calibrated with, and those that were held out.
    """

    images: tuple[Sha256, ...] = Field(min_length=1)
    """Calibrated with."""
    held_out: tuple[Sha256, ...] = Field(min_length=1)
    """Never calibrated with: what the artifacts are proven on."""


class QuantisedGemms(Record):
    """What an artifact declares of its quantised GEMMs, for the proof that reads its graph."""

    kind: Quantised
    sites: tuple[str, ...]

    @classmethod
    def of(cls, precision: ArtifactPrecision, record: QuantisationRecord | None) -> Self | None:
        """Of an artifact's precision and record; None where it is not quantised."""
        if record is None:
            return None
        kind = next(kind for kind in get_args(Quantised) if kind == precision)
        return cls(kind=kind, sites=record.sites)

    @property
    def dtype(self) -> OpDType:
        """What both inputs of such a GEMM are stored in."""
        return QUANTISED_DTYPES[self.kind]
