"""A process of its own that speaks JSON: each line of its standard input and output is a message.

A library may crash, hang, or be killed for its memory there; the parent goes on, and says in one line how
the child ended. The parent keeps the child's standard input open: when the parent dies, however it dies, the
child sees the end of it. Needs the standard library only.
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
from types import TracebackType
from typing import IO, Any, Self

from vitdeploy.errors import VitdeployError
from vitdeploy.machine.temporary import temporary_folder

_TAIL = 300
"""Characters of a dead process's last words."""
_GRACE = 5.0
"""Seconds that a process has to go away once it was killed."""


class WorkerFailure(Exception):
    """A message did not come; ``fatal`` where the process is gone, ``killed`` where somebody ended it."""

    def __init__(self, message: str, *, fatal: bool, killed: bool = False) -> None:
        super().__init__(message)
        self.fatal, self.killed = fatal, killed


class Worker:
    """The parent's end of a child process; a context manager that ends it.

    Args:
        command: the program and its arguments.
        job: its first line of input.
        environment: variables on top of this process's own; see :func:`child_environment`.
        limit: seconds for a message where a call does not say its own; None waits while the child lives.
        name: what the process is called when it fails.

    Raises:
        DeviceUnavailable: no temporary file can be written.
    """

    def __init__(
        self,
        command: Sequence[str],
        job: Mapping[str, Any],
        environment: Mapping[str, str],
        limit: float | None,
        *,
        name: str = "its process",
    ) -> None:
        self._limit, self._name = limit, name
        self._buffer = b""
        folder = temporary_folder()
        self._stderr = tempfile.TemporaryFile("w+", errors="replace", dir=folder)  # noqa: SIM115
        self.began = time.perf_counter()
        self._process = subprocess.Popen(
            list(command),
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,  # Ctrl-C at a terminal is for the parent alone
        )
        # When memory runs out, the system shall take the child that asks for it.
        with contextlib.suppress(OSError):
            Path(f"/proc/{self.pid}/oom_score_adj").write_text("1000")
        self._send(job)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def receive(self, limit: float | None = None) -> dict[str, Any]:
        """Wait for a message, whatever it says.

        Raises:
            WorkerFailure: the process dies, sends no JSON, or takes longer than ``limit`` seconds.
        """
        line = self._line(limit or self._limit)
        try:
            message: dict[str, Any] = json.loads(line)
        except ValueError as error:
            self.close()
            raise WorkerFailure(f"{self._name} answers no JSON", fatal=True) from error
        return message

    def answer(self, limit: float | None = None) -> dict[str, Any]:
        """Wait for a message that is no error.

        Raises:
            WorkerFailure: as :meth:`receive`, or the process answers with an error, which is the cause.
        """
        message = self.receive(limit)
        if "error" in message:
            error = error_of(message["error"])
            fatal = self._process.poll() is not None
            raise WorkerFailure(message["error"]["message"], fatal=fatal) from error
        return message

    def ask(self, do: str, *, limit: float | None = None, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its answer; raises as :meth:`answer`."""
        self._send({"do": do, **arguments})
        return self.answer(limit)

    def kill(self) -> None:
        """End the process and whatever it started, from any thread: one that waits for an answer is told."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process and whatever it started, and let go of it; nobody waits for an answer."""
        self.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE)
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        if self._process.stdin.closed:
            raise WorkerFailure(f"{self._name} was ended", fatal=True)
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._death() from error

    def _line(self, limit: float | None) -> bytes:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        end = None if limit is None else time.monotonic() + limit
        while b"\n" not in self._buffer:
            left = None if end is None else max(0.0, end - time.monotonic())
            if not select.select([pipe], [], [], left)[0]:
                self.close()
                raise WorkerFailure(f"{self._name} gave no answer within {limit:.0f} s", fatal=True)
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
        self._stderr.seek(0)
        tail = " ".join(self._stderr.read().split())[-_TAIL:]
        self.close()
        last_words = f"; its last words: {tail}" if tail else ""
        if code == -signal.SIGKILL:
            how = "was killed, out of memory most likely"
        elif code is not None and code < 0:
            how = f"died of {signal.Signals(-code).name}"
        else:
            how = f"ended with {code}"
        return WorkerFailure(f"{self._name} {how}{last_words}", fatal=True, killed=code == -signal.SIGKILL)


def child_environment() -> dict[str, str]:
    """Variables with which a child imports this very vitdeploy, which need not be installed.

    The folder that the parent is called in may have another one; Python's ``-P`` keeps the child from it.
    """
    root = str(Path(__file__).parents[2])
    return {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}


def private_pipes() -> tuple[IO[str], IO[str]]:
    """In the child: both ends of the conversation, out of reach of a library that prints or reads."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, answers


def record_of(error: OSError | VitdeployError) -> dict[str, Any]:
    """An error of the child, for a message."""
    if isinstance(error, VitdeployError):
        return error.as_dict()
    return {"errno": error.errno, "message": error.strerror, "filename": error.filename}


def error_of(record: Mapping[str, Any]) -> Exception:
    """The error whose record this is, as the child raised it."""
    if "errno" in record:
        return OSError(record["errno"], record["message"], record["filename"])
    return VitdeployError.from_dict(record)
