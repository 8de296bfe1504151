"""What a measurement says: the documented schema of ``results.json``, and reading it back.

docs/results.schema.json is the same as JSON Schema, for programs that read results without this package.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.bundle.manifest import first_problem
from vitdeploy.config import Size
from vitdeploy.errors import UsageError
from vitdeploy.machine.atomic import atomic_write
from vitdeploy.machine.identity import machine_name

SCHEMA_VERSION: Final = 2
UNSTEADY = 0.2
"""Spread of a cell's rounds from which on its median says little; a quiet machine stays well below."""
MAX_BYTES = 512 * 2**20
"""No longer file is read: some hundred cells with all their samples have a few MB."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class MeasuredCpu(_Record):
    """The processor, as far as the measured processes may use it."""

    name: str
    flags: tuple[str, ...]
    threads: int = Field(ge=1)
    memory: int | None
    """Bytes."""
    affinity: tuple[int, ...] = ()
    """Logical processors that the measurement may run on."""
    governor: str | None = None
    """How the system chooses the clock: ``performance``, ``powersave``; null where it does not say."""


class Git(_Record):
    """The repository that the measurement was started in."""

    revision: str
    dirty: bool


class Environment(_Record):
    """The machine, and what ran on it."""

    vitdeploy: str
    python: str
    platform: str
    cpu: MeasuredCpu
    gpus: tuple[dict[str, str], ...] = ()
    libraries: dict[str, str | None]
    git: Git | None = None

    @property
    def machine(self) -> tuple[str, ...]:
        """What must be equal for two measurements to be comparable."""
        return machine_name(self.cpu.name, self.cpu.threads, self.gpus)


class BenchSettings(_Record):
    """How it was measured."""

    budget_s: float = Field(gt=0)
    seed: int
    """Of the order of cells within each round."""
    batches: tuple[int, ...]
    threads: tuple[int | None, ...]
    concurrency: tuple[int, ...]
    spin: tuple[bool, ...] = (False,)
    """Of backends that have the choice."""


class MeasuredBundle(_Record):
    """A bundle that was measured, at one of its image sizes."""

    name: str
    """The cells refer to it and to the size, which together are unique within the results."""
    model: str
    digest: str
    image_size: Size
    parameters: int
    flops: int | None = None
    """Of one image through the reference model, a multiply-add counted as two; null where nobody knows."""


class Parity(_Record):
    """A cell's outputs held against the float64 reference at its own batch size."""

    passed: bool
    failures: tuple[str, ...] = ()
    relative: float | None = None
    """The worst row's ||output - reference|| / ||reference||; null for NaN outputs."""
    max_abs: float | None = None
    tolerance: float = Field(gt=0)
    output: str | None = None
    """Of several outputs, the worst one, whose errors these are; null where the model has one."""
    """What ``relative`` may be at most."""


class CellAccuracy(_Record):
    """Right answers on labelled images; shares between 0 and 1."""

    images: int = Field(ge=1)
    top1: float
    top5: float | None
    """Null with five classes or fewer."""
    reference_top1: float
    reference_top5: float | None
    top1_difference: float
    """``top1 - reference_top1``."""
    top1_interval: tuple[float, float]
    """95 % confidence interval of that difference."""


class Startup(_Record):
    """A fresh process from nothing to its first answer; files are in the system's cache."""

    import_s: float
    load_s: float
    first_s: float
    """The first run of the smallest batch."""
    total_s: float
    """From the start of the process to its first answer, as its parent sees it."""


class Key(NamedTuple):
    """What makes a cell the same cell in another measurement."""

    model: str
    backend: str
    provider: str
    artifact: str
    batch: int
    image_size: Size
    threads: int | None
    concurrency: int
    spin: bool


class Cell(_Record):
    """One backend, artifact, batch size, image size, thread count and concurrency.

    Times are host to host, of one call of one caller. What could not be measured is null, and ``status``
    and ``reason`` say why.
    """

    subject: str
    backend: str
    provider: str
    artifact: str
    """As the one of the bundle's first image size is named."""
    precision: ArtifactPrecision
    executes: str
    """What the runtime computes in."""
    batch: int = Field(ge=1)
    image_size: Size
    threads: int | None
    """CPU threads asked for; null is the runtime's own choice."""
    concurrency: int = Field(ge=1)
    """Callers at the same time, each with a session of its own."""
    spin: bool = False
    """Whether the runtime's threads keep cores busy while they wait, where it has the choice."""
    status: Literal["ok", "failed"]
    reason: str = ""
    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    mean_ms: float | None = None
    spread: float | None = None
    """Half the distance between the 10th and the 90th percentile of rounds' medians, over the median."""
    images_per_s: float | None = None
    """Of all callers together."""
    samples_ms: tuple[float, ...] = ()
    """Every timed call, in the order of time."""
    round_samples: int = Field(default=1, ge=1)
    """Calls of one round; samples of one round belong together."""
    device_p50_ms: float | None = None
    """Between events on the GPU's own clock; null where the backend runs on the CPU."""
    device_samples_ms: tuple[float, ...] = ()
    disturbed: tuple[str, ...] = ()
    """What else was at work on the machine meanwhile; empty for a quiet measurement."""
    repeats: int = 0
    """How often the cell was measured again because of a disturbance."""
    parity: Parity | None = None
    accuracy: CellAccuracy | None = None
    startup: Startup | None = None
    peak_memory_bytes: int | None = None
    """Resident memory of the process at this batch size, at its highest."""
    peak_device_bytes: int | None = None
    size_bytes: int | None = None
    """Of the artifact's files."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why these numbers are to be taken with care: disturbances, and rounds that differ much."""
        if self.spread is None or self.spread <= UNSTEADY:
            return self.disturbed
        return (*self.disturbed, f"the rounds differ by {self.spread:.0%}")

    @property
    def valid(self) -> bool:
        """Measured, and right: what may be ranked and chosen."""
        return self.status == "ok" and self.parity is not None and self.parity.passed

    @property
    def label(self) -> str:
        """For people: the backend, its provider where that says more, and the artifact."""
        plain = self.provider.lower() in ("", "cpu", self.backend)
        return f"{self.backend}{'' if plain else f'[{self.provider}]'} {self.artifact}"


class ControlSamples(_Record):
    """Control work, the same in every round: how fast the machine itself was."""

    p50_ms: float
    samples_ms: tuple[float, ...]
    round_samples: int = Field(ge=1)


class SkippedCase(_Record):
    """What this machine or this bundle has no cell for."""

    subject: str
    backend: str
    artifact: str
    reason: str


class Results(_Record):
    """A measurement."""

    schema_version: Literal[2] = SCHEMA_VERSION
    created: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
    command: str
    environment: Environment
    settings: BenchSettings
    subjects: tuple[MeasuredBundle, ...]
    rounds: int = Field(ge=0)
    partial: bool = False
    """Interrupted: the cells have fewer rounds than the budget allowed, or none."""
    cells: tuple[Cell, ...]
    metronome: ControlSamples | None = None
    """Null where it did not run, or was disturbed."""
    skipped: tuple[SkippedCase, ...] = ()
    notes: tuple[str, ...] = ()

    def key(self, cell: Cell) -> Key:
        """Under which a cell of another measurement is the same one; a model's name, not a folder's."""
        model = next(s.model for s in self.subjects if s.name == cell.subject)
        return Key(
            model,
            cell.backend,
            cell.provider,
            cell.artifact,
            cell.batch,
            cell.image_size,
            cell.threads,
            cell.concurrency,
            cell.spin,
        )

    def subject(self, cell: Cell) -> MeasuredBundle | None:
        """What a cell is of; None where the results do not say."""
        named = (subject for subject in self.subjects if subject.name == cell.subject)
        return next((subject for subject in named if subject.image_size == cell.image_size), None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return self.model_dump(mode="json")


def read_results(path: Path) -> Results:
    """Read a ``results.json``.

    Raises:
        UsageError: not there, not JSON, not a measurement of ours, or of a version this one does not read.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path}: longer than results.json ever is")
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not readable as JSON ({' '.join(str(error).split())})") from error
    if not isinstance(document, dict) or "schema_version" not in document or "cells" not in document:
        raise UsageError(f"{path}: not a results.json", hint="write one with vitdeploy bench BUNDLE -o FILE")
    if document["schema_version"] != SCHEMA_VERSION:
        raise UsageError(
            f"{path}: results of schema version {document['schema_version']}, "
            f"but this vitdeploy reads version {SCHEMA_VERSION}",
            hint="measure again with this vitdeploy",
        )
    try:
        return Results.model_validate({k: v for k, v in document.items() if k in Results.model_fields})
    except ValidationError as error:
        raise UsageError(f"{path}: not a results.json: {first_problem(error)}") from error


def schema() -> dict[str, Any]:
    """The JSON Schema of ``results.json``, without the ``ok`` that the command line adds."""
    return Results.model_json_schema(mode="serialization")


def write_whole(path: Path, text: str) -> None:
    """Write a file all at once.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        with atomic_write(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error


def require_writable(paths: Sequence[Path]) -> None:
    """Find out before a long measurement whether its results can be written.

    Raises:
        UsageError: a folder that is not there or refuses, or a path that is a folder.
    """
    for path in paths:
        if path.is_dir():
            raise UsageError(f"{path}: is a folder, not a file")
        if not path.parent.is_dir():
            raise UsageError(f"{path}: the folder {path.parent} does not exist")
        probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            probe.touch()
        except OSError as error:
            raise UsageError(f"{path}: cannot be written: {error.strerror}") from error
        finally:
            if os.path.lexists(probe):
                probe.unlink()


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
