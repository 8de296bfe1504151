"""What a manifest says of a quantised artifact."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from vitdeploy.config import Precision


class QuantisationRecord(BaseModel):
    """How an artifact of ``int8`` or ``fp8`` was made."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rest: Precision
    """Of everything that is not quantised."""
    weight_bits: Literal[7, 8]
    sites: tuple[str, ...]
    """The quantised GEMMs."""
    left_out: tuple[str, ...] = ()
    """GEMMs that could be, and stay float, because they cost too much of the answer."""
    macs: float = Field(ge=0, le=1)
    """Share of the GEMMs' multiplications that is quantised."""
    images: int = Field(ge=1)
    """How many images it was calibrated with."""
    attention: bool = False
    """Whether the products inside of attention are fp8, too."""
