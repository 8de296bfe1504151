"""What long work tells about itself while it runs. This base class says nothing; the command line prints."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Stage:
    """One step of a longer job; whoever runs it fills in what came out."""

    name: str
    detail: str = ""
    seconds: float = 0.0
    size: int | None = None
    """Bytes written, where the stage writes a file."""


class Progress:
    """Receives the stages of a job: override :meth:`started`, :meth:`updated`, :meth:`finished`
    and :meth:`note`."""

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        stage = Stage(name)
        self.started(stage)
        begin = time.perf_counter()
        yield stage
        stage.seconds = time.perf_counter() - begin
        self.finished(stage)

    def started(self, stage: Stage) -> None:
        """A stage begins."""

    def updated(self, stage: Stage) -> None:
        """A stage has something to tell on its way; its detail is not final."""

    def finished(self, stage: Stage) -> None:
        """A stage ended well; one that fails raises instead."""

    def note(self, text: str) -> None:
        """One line that the user should know and that is no error."""
