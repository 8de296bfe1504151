"""What was tried for a machine, and why it was chosen or lost: ``optimisation.json`` of a bundle."""

from __future__ import annotations

import json
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vitdeploy.benchmark.ranking import Goal
from vitdeploy.benchmark.results import Cell
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import first_problem
from vitdeploy.errors import BundleError

OPTIMISATION: Final = "optimisation.json"

Verdict = Literal["chosen", "refused", "level", "slower", "wrong", "failed", "not run", "not built"]
"""What became of a contestant. ``refused``: right, perhaps faster, but not worth what it costs; ``level``:
not slower than the winner as far as can be told."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Tried(_Record):
    """One contestant: an artifact on a runtime with so many threads and sessions."""

    precision: ArtifactPrecision
    artifact: str = ""
    """Its name; empty where none was built."""
    backend: str = ""
    """Empty where nothing was built to be run."""
    provider: str = ""
    threads: int | None = None
    """CPU threads of each session; null is the runtime's own choice."""
    instances: int = Field(default=1, ge=1)
    """Sessions at the same time."""
    spin: bool = False
    """Whether threads keep their cores busy while they wait."""
    p50_ms: float | None = None
    """Of a batch; null where it was not measured, or is not right."""
    images_per_s: float | None = None
    """Of all sessions together."""
    spread: float | None = None
    """As a cell of ``bench`` has it."""
    relative: float | None = None
    """The worst relative error to the float64 reference at this batch size."""
    top1_difference: float | None = None
    """On labelled images, its share of right answers less the reference's."""
    verdict: Verdict
    why: str

    @property
    def label(self) -> str:
        """For people: what it ran on, and how."""
        if not self.artifact:
            return " ".join(filter(None, (self.backend, self.precision)))
        plain = self.provider.lower() in ("", "cpu", self.backend)
        parts = [f"{self.backend}{'' if plain else f'[{self.provider}]'} {self.artifact}"]
        parts += [f"{self.threads} thread{'s' * (self.threads > 1)}"] if self.threads else []
        parts += [f"{self.instances} sessions"] if self.instances > 1 else []
        parts += ["spinning"] if self.spin else []
        return ", ".join(parts)


def tried(cell: Cell, verdict: Verdict, why: str) -> Tried:
    """What became of a measured cell."""
    return Tried(
        precision=cell.precision,
        artifact=cell.artifact,
        backend=cell.backend,
        provider=cell.provider,
        threads=cell.threads,
        instances=cell.concurrency,
        spin=cell.spin,
        p50_ms=cell.p50_ms,
        images_per_s=cell.images_per_s,
        spread=cell.spread,
        relative=cell.parity.relative if cell.parity else None,
        top1_difference=cell.accuracy.top1_difference if cell.accuracy else None,
        verdict=verdict,
        why=why,
    )


class Optimisation(_Record):
    """A contest."""

    schema_version: Literal[1] = 1
    created: str
    machine: tuple[str, ...]
    """As ``vitdeploy.machine.identity.machine_name`` says."""
    goal: Goal
    batch: int = Field(ge=1)
    max_drop: float | None = None
    """Points of top-1 that a contestant was allowed to lose."""
    budget_s: float = Field(gt=0)
    """Of measuring."""
    rounds: int = Field(ge=0)
    """Interleaved ones of the last contest."""
    tried: tuple[Tried, ...]
    """The chosen one first."""

    @property
    def chosen(self) -> Tried:
        return self.tried[0]

    def text(self) -> str:
        """As the file has it."""
        return json.dumps(self.model_dump(mode="json"), indent=2, allow_nan=False) + "\n"


def read_optimisation(bundle: Bundle) -> Optimisation | None:
    """What a bundle says was tried; None where `optimize` did not make it.

    Raises:
        BundleError: the file is damaged.
    """
    if OPTIMISATION not in bundle.manifest.files:
        return None
    bundle.verify_hashes([OPTIMISATION])
    path = bundle.path(OPTIMISATION)
    try:
        return Optimisation.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise BundleError(f"{path}: {first_problem(error)}") from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from error
