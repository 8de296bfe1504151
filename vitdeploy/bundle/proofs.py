"""What a manifest says of an artifact's proofs: the dtypes of its operations, and its parity."""

from __future__ import annotations

from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from vitdeploy.bundle.dtypes import OpDType
from vitdeploy.bundle.records import Count, Record


class OpPrecision(Record):
    """The dtype one operation of an emitted graph computes in."""

    name: str
    op: str
    dtype: OpDType
    island: bool = False
    """Kept in a wider dtype on purpose, as the precision plan declares."""


class PrecisionProof(Record):
    """Every operation whose dtype matters, read back from the emitted graph."""

    ops: tuple[OpPrecision, ...]
    ok: bool


class Tolerance(Record):
    """What an artifact may differ from the reference by: ``vitdeploy.verification.parity.TOLERANCES``."""

    relative: float = Field(gt=0)
    kl: float = Field(gt=0)
    batch_invariance: float = Field(gt=0)
    max_abs: float | None = Field(default=None, gt=0)
    """An absolute bound on top, where the user gave one."""
    mean: float | None = Field(default=None, gt=0)
    """Of the mean of all rows' relative errors, where ``relative`` bounds the worst."""

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a bound of the mean where there is none: bundles from before it keep their digest."""
        fields: dict[str, Any] = dump(self)
        if self.mean is None:
            fields.pop("mean", None)
        return fields


class ParityMetrics(Record):
    """How far outputs are from the reference; numbers that do not exist (NaN outputs) are null."""

    rows: Count
    """Output rows compared, one per image and position in a batch."""
    elements: Count
    nonfinite: Count = 0
    """NaN and infinite elements of the output; these rows count in no other number."""
    max_abs: float | None = None
    mean_abs: float | None = None
    relative: float | None = None
    """The worst row's ||output - reference|| / ||reference||, and with that a bound on its cosine."""
    cosine: float | None = None
    """The worst row's cosine similarity."""
    kl: float | None = None
    """The worst row's KL(reference || output) of the softmax, in nats; only for logits."""
    top1_agree: Count = 0
    top1_compared: Count = 0
    """Rows whose reference margin is wider than the tolerance, so that the first place is decided."""
    top5_overlap: float | None = None
    """Mean share of the reference's five best classes found again, over the rows below."""
    top5_compared: Count = 0
    batch_invariance: float | None = None
    """Worst relative difference of one image's output with other company in the batch."""
    worst: int | None = None
    """Index of the golden image with the largest relative error, or with NaN."""
    mean_relative: float | None = None
    """The mean of all rows' relative errors, where the tolerance bounds it."""
    agreement: float | None = None
    """Share of the rows that rank first what the reference does, whatever its margin; there, too."""

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the means that no tolerance asks for: bundles from before them keep their digest."""
        fields: dict[str, Any] = dump(self)
        for name in ("mean_relative", "agreement"):
            if fields.get(name, 0) is None:
                del fields[name]
        return fields


class ParityRecord(Record):
    """One comparison of an artifact on a backend at a batch size with the float64 reference."""

    artifact: str
    backend: str
    batch: int = Field(ge=1)
    provider: str
    output: str | None = None
    """Which output was compared; null where the model has one."""
    reference: str = "float64"
    metrics: ParityMetrics
    tolerance: Tolerance
    passed: bool
    failures: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """At which batch size, and of several outputs which, for a sentence."""
        return f"batch {self.batch}, {self.output}" if self.output else f"batch {self.batch}"

    @property
    def title(self) -> str:
        """What was compared where, for a sentence."""
        return f"{self.artifact} on {self.backend}, {self.place}"

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without an ``output`` where there is one only: bundles from before it keep their digest."""
        fields: dict[str, Any] = dump(self)
        if self.output is None:
            fields.pop("output", None)
        return fields
