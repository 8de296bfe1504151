"""The measuring side's end of the pipe: a child process that holds a model, and dies alone.

A runtime may crash, hang, or be killed for its memory; then its cells say so and the others go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_TAIL = 300
"""Characters of a dead process's last words."""
_GRACE = 5.0
"""Seconds that a process has to go away once it was killed."""


class WorkerFailure(Exception):
    """A request was not answered; ``fatal`` where the process is gone."""

    def __init__(self, message: str, *, fatal: bool) -> None:
        super().__init__(message)
        self.fatal = fatal


class Worker:
    """A process that runs ``vitdeploy.benchmark.loop``; see there for the requests.

    Args:
        command: the program and its arguments.
        job: its first line of input.
        environment: variables on top of this process's own.
        limit: seconds for an answer to a request that does not say its own.
    """

    def __init__(
        self, command: Sequence[str], job: Mapping[str, Any], environment: Mapping[str, str], limit: float
    ) -> None:
        self._limit = limit
        self._buffer = b""
        self._words = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.began = time.perf_counter()
        self._process = subprocess.Popen(
            list(command),
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            start_new_session=True,  # Ctrl-C at a terminal is for the parent alone
        )
        # When memory runs out, the system shall take the child that asks for it.
        with contextlib.suppress(OSError):
            Path(f"/proc/{self.pid}/oom_score_adj").write_text("1000")
        self._send(job)

    @property
    def pid(self) -> int:
        return self._process.pid

    def answer(self, limit: float | None = None) -> dict[str, Any]:
        """Wait for an answer.

        Raises:
            WorkerFailure: the process answers with an error, dies, or takes longer than ``limit`` seconds.
        """
        line = self._line(limit or self._limit)
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError as error:
            self.close()
            raise WorkerFailure("its process answers no JSON", fatal=True) from error
        if "error" in answer:
            said = answer["error"]
            ended = self._process.poll() is not None
            raise WorkerFailure(said["message"], fatal=ended)
        return answer

    def ask(self, do: str, *, limit: float | None = None, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its answer; raises as :meth:`answer`."""
        self._send({"do": do, **arguments})
        return self.answer(limit)

    def close(self) -> None:
        """End the process and whatever it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE)
        for stream in (self._process.stdin, self._process.stdout, self._words):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        if self._process.stdin.closed:
            raise WorkerFailure("its process was ended", fatal=True)
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._death() from error

    def _line(self, limit: float) -> bytes:
        assert self._process.stdout is not None
        pipe, end = self._process.stdout.fileno(), time.monotonic() + limit
        while b"\n" not in self._buffer:
            if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
                self.close()
                raise WorkerFailure(f"its process gave no answer within {limit:.0f} s", fatal=True)
            read = os.read(pipe, 1 << 16)
            if not read:
                raise self._death()
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _death(self) -> WorkerFailure:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE)
        code = self._process.poll()
        self._words.seek(0)
        last = " ".join(self._words.read().split())[-_TAIL:]
        self.close()
        said = f"; its last words: {last}" if last else ""
        if code == -signal.SIGKILL:
            return WorkerFailure(f"its process was killed, out of memory most likely{said}", fatal=True)
        if code is not None and code < 0:
            return WorkerFailure(f"its process died of {signal.Signals(-code).name}{said}", fatal=True)
        return WorkerFailure(f"its process ended with {code}{said}", fatal=True)
