"""What one round of live verification found."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.bundle.proofs import ParityRecord
from vitdeploy.errors import ParityError
from vitdeploy.verification.live.client import ServerFacts


@dataclass(frozen=True)
class Latency:
    """Of sequential calls with one image each, from the call to the decoded answer; milliseconds."""

    calls: int
    batch: int
    """Images per call: one, unless the model takes no batch as small."""
    encoding: str
    median_ms: float
    p90_ms: float
    p99_ms: float
    seconds: tuple[float, ...] = ()
    """Of each call."""

    @classmethod
    def of(cls, seconds: Sequence[float], batch: int, encoding: str) -> Latency:
        """From the times of at least one call."""
        median, p90, p99 = (1000 * float(np.percentile(seconds, share)) for share in (50, 90, 99))
        return cls(len(seconds), batch, encoding, median, p90, p99, tuple(seconds))

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without every single call."""
        facts = dataclasses.asdict(self)
        del facts["seconds"]
        return facts


@dataclass(frozen=True)
class ImageRecord:
    """One image file sent to the server, and how its answer compares with the bundle's."""

    image: str
    format: str
    """PNG or JPEG."""
    classes: int
    """That the server answered with."""
    expected: str
    """The bundle's first class."""
    answered: str
    """The server's."""
    error: float | None
    """Of the logits behind the scores, relative to the bundle's; None where the scores are none."""
    bound: float
    """The error that the precisions allow."""
    size: str | None = None
    """The image size that the bundle takes for it, of several."""
    failures: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.failures


@dataclass(frozen=True)
class LiveReport:
    """What was compared, and what did not hold."""

    bundle: Path
    url: str
    server: ServerFacts
    model: str
    version: str
    """That answered; empty where the server does not say."""
    precision: ArtifactPrecision
    """Whose tolerances decided."""
    fits: ArtifactPrecision | None
    """The most exact precision whose tolerances the numbers keep."""
    parity: tuple[ParityRecord, ...]
    labels: int
    """Class names that were compared."""
    images: tuple[ImageRecord, ...]
    latency: Latency | None
    failures: tuple[str, ...]
    causes: tuple[str, ...]
    """What would explain the failures, the likeliest first."""
    notes: tuple[str, ...] = ()
    """What could not be compared and why, and what else the user should know."""

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def worst(self) -> float | None:
        """The largest relative error of the golden tensors."""
        errors = [record.metrics.relative for record in self.parity if record.metrics.relative is not None]
        return max(errors, default=None)

    @property
    def reason(self) -> str:
        """The first failures and the likeliest cause, in one line."""
        more = f" (and {len(self.failures) - 2} more)" if len(self.failures) > 2 else ""
        cause = f"; likely cause: {self.causes[0]}" if self.causes else ""
        return f"{'; '.join(self.failures[:2])}{more}{cause}"

    def check(self) -> None:
        """Raise what did not hold.

        Raises:
            ParityError: names the first failures and the likeliest cause.
        """
        if self.failures:
            raise ParityError(f"{self.url}: does not answer as {self.bundle} does: {self.reason}")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "ok": self.passed,
            "bundle": str(self.bundle),
            "url": self.url,
            "server": {"name": self.server.name, "version": self.server.version},
            "model": self.model,
            "version": self.version,
            "precision": self.precision,
            "fits": self.fits,
            "parity": [record.model_dump(mode="json") for record in self.parity],
            "labels": self.labels,
            "images": [dataclasses.asdict(record) | {"passed": record.passed} for record in self.images],
            "latency": None if self.latency is None else self.latency.as_dict(),
            "failures": list(self.failures),
            "causes": list(self.causes),
            "notes": list(self.notes),
        }
