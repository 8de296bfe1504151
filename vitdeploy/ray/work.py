"""What a job over many images is made of: pieces of work, rows of results. Imports no library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vitdeploy.backends.base import Array
from vitdeploy.images.fitting import Rule
from vitdeploy.predictor import Prediction


class Stamp(NamedTuple):
    """Tells a file from what it was before somebody wrote it again."""

    size: int
    modified: int
    """Nanoseconds since 1970."""


@dataclass(frozen=True)
class Item:
    """One piece of work: an image file, or a row group of a Parquet file."""

    source: str
    """Absolute path of the file to read."""
    stamp: Stamp
    group: int = -1
    """Number of the row group; -1 is an image file."""
    first: int = -1
    """Number of the group's first row in the file; -1 is an image file."""
    rows: int = 1
    """Images in it."""
    done: tuple[int, ...] = ()
    """Numbers of the rows, within the file, that need no computing any more."""

    @property
    def left(self) -> int:
        """Images to compute."""
        return self.rows - len(self.done)


@dataclass(frozen=True)
class Result:
    """What became of one image."""

    source: str
    stamp: Stamp
    row: int = -1
    """Number of its row in a Parquet file; -1 for a file of its own."""
    path: str | None = None
    """The image's name: its file, or what the Parquet file says."""
    predictions: Sequence[Prediction] = ()
    embedding: Array | None = None
    """(columns,) float32, where vectors are computed."""
    error: str | None = None
    """Why it has neither."""
    image_size: str | None = None
    """That it was computed at, as HxW, where the bundle has several."""


@dataclass(frozen=True)
class ActorPlan:
    """How each actor runs the bundle; it travels to other machines."""

    bundle: str
    """Absolute path, the same on every machine."""
    digest: str
    backend: str
    artifact: str | None
    """None is the reference weights."""
    provider: str | None
    threads: int
    batch: int | None
    """Images at a time; None is what the artifact does best."""
    top_k: int
    column: str | None = None
    """Where a Parquet file has its images."""
    vector: int | None = None
    """Columns of the vectors that come out; None where classes do."""
    fit: Rule | None = None
    """How an image gets one of several image sizes; None where there is one."""


@dataclass(frozen=True)
class RayResources:
    """What Ray has."""

    cpus: tuple[int, ...]
    """Of each machine."""
    gpus: int = 0
    """Of all machines together."""
    free: int = 0
    """CPUs of all machines together that nobody else takes now."""
