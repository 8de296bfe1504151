"""Where a job's results are: finished parts, and what they are of, so that the next start does the rest."""

from __future__ import annotations

import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vitdeploy.errors import UsageError
from vitdeploy.machine.atomic import atomic_write
from vitdeploy.ray import tables
from vitdeploy.ray.work import Stamp

JOB = "_job.json"
"""Readers of Parquet folders pass over names that begin like this."""
SCHEMA_VERSION = 1


class JobFolder:
    """A folder of parts; a context manager that holds it for one job.

    A part is complete or not there: it is written beside its place and renamed. Whatever a killed job leaves
    unfinished is removed by the next one. A folder that is new and gets no part does not remain.

    Args:
        identity: what every part in it must be of; another job's folder is refused.

    Raises:
        UsageError: it has something else in it, belongs to another job, is in use, or cannot be written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path.absolute()
        self._identity = {"schema_version": SCHEMA_VERSION, **identity}
        self._lock: int | None = None
        self._new = False

    def __enter__(self) -> Self:
        try:
            self._new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            try:
                self._claim()
            except BaseException:
                self._release()
                raise
        except OSError as error:
            raise self.refused(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._new and not self.parts():
            with contextlib.suppress(OSError):
                (self.path / JOB).unlink()
                self.path.rmdir()
        self._release()

    def parts(self) -> list[Path]:
        """The finished parts, in the order they were written."""
        return sorted(self.path.glob("part-*.parquet"))

    def settle(self, stamps: Mapping[str, Stamp]) -> dict[str, set[int]]:
        """What earlier jobs finished of these files, as their rows (-1 for a file that is one image).

        Rows of files that changed since, and of images that failed, are removed: they are to be done again.

        Raises:
            UsageError: a part cannot be read or written.
        """
        done: dict[str, set[int]] = defaultdict(set)

        def stays(source: str, row: int, stamp: Stamp, failed: bool) -> bool:
            current = stamps.get(source)
            if current is None:
                return True
            if current != stamp or failed:
                return False
            done[source].add(row)
            return True

        try:
            for part in self.parts():
                tables.sift(part, stays)
        except OSError as error:
            raise self.refused(error) from error
        return done

    def write(self, results: Sequence[tables.Table]) -> None:
        """Write results as the next part.

        Raises:
            UsageError: the disk refuses.
        """
        parts = self.parts()
        number = int(parts[-1].stem.partition("-")[2]) + 1 if parts else 0
        try:
            tables.write_parquet(self.path / f"part-{number:06d}.parquet", results)
        except OSError as error:
            raise self.refused(error) from error

    def refused(self, error: OSError) -> UsageError:
        """The disk's refusal in our words."""
        return UsageError(f"{self.path}: cannot be written: {error.strerror or error}")

    def _claim(self) -> None:
        """See that the folder is this job's, or make it so."""
        names = {entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")}
        if JOB in names and self.parts():
            self._compare()
        elif names - {JOB}:
            raise UsageError(
                f"{self.path}: has other things in it ({min(names - {JOB})}), not the results of a job",
                hint="choose a folder that does not exist yet",
            )
        else:
            self._introduce()
        for unfinished in self.path.glob(".*.tmp"):
            unfinished.unlink()

    def _introduce(self) -> None:
        with atomic_write(self.path / JOB) as file:
            file.write(f"{json.dumps(self._identity, indent=2)}\n".encode())

    def _compare(self) -> None:
        try:
            recorded = json.loads((self.path / JOB).read_text())
        except ValueError:
            recorded = None
        if not isinstance(recorded, dict):
            raise UsageError(f"{self.path / JOB}: is damaged", hint="choose another folder")
        for name in {**self._identity, **recorded}:
            if recorded.get(name) != self._identity.get(name):
                raise UsageError(
                    f"{self.path}: has results of another job: {name.replace('_', ' ')} "
                    f"{recorded.get(name)!r}, not {self._identity.get(name)!r}",
                    hint="choose another folder",
                )

    def _take_lock(self) -> None:
        import fcntl

        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._release()
            raise UsageError(f"{self.path}: another job writes into it", hint="wait for its end") from error
        except OSError:  # no locks on this file system
            pass

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
