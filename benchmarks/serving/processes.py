"""Servers as processes: started, waited for, ended with whatever they started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.peers.environments import ROOT

_START_SECONDS = 120.0
_STOP_SECONDS = 15.0
_PR_SET_PDEATHSIG = 1
_LAST_WORDS = 300
"""Characters of a dead server's log that are worth showing."""


class ServerFailure(Exception):
    """A server cannot be measured; says why."""


def free_port() -> int:
    """A port that nobody uses at the moment."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def running(
    command: Sequence[str], ready: str, log: Path, variables: Mapping[str, str] | None = None
) -> Iterator[int]:
    """A server, from the moment it is ready until the block ends; yields the session of its processes.

    Args:
        ready: a URL that answers 200 once it is.
        log: where what it prints goes.
        variables: of the environment, on top of this process's.

    Raises:
        ServerFailure: it ends, or does not become ready.
    """
    with log.open("wb") as stream:
        process = subprocess.Popen(
            list(command),
            stdout=stream,
            stderr=stream,
            env={**_variables(), **(variables or {})},
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
    try:
        _wait(process, ready, log)
        yield process.pid
    finally:
        _stop(process)


def processor_seconds(session: int) -> float:
    """What a session's living processes have had of the processors until now; 0 without Linux's /proc."""
    ticks = sum(int(fields[11]) + int(fields[12]) for _, fields in _processes({session}))
    return ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def standing_still(sessions: Collection[int]) -> Iterator[None]:
    """The processes of these sessions have no processor until the block ends; without /proc they have.

    A server that nobody asks is not idle: some look for work all the time, with a tenth of a processor.
    """
    stopped = [pid for pid, _ in _processes(sessions)]
    try:
        _send(stopped, signal.SIGSTOP)
        yield
    finally:
        _send(stopped, signal.SIGCONT)


def _processes(sessions: Collection[int]) -> Iterator[tuple[int, list[str]]]:
    """The living processes of sessions, and what proc(5) says of each from its state on."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) in sessions:
                yield int(path.parent.name), fields


def _send(processes: Iterable[int], number: signal.Signals) -> None:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _end_with_parent() -> None:
    """However this process ends: a server left behind would disturb what is measured next."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _variables() -> Mapping[str, str]:
    """This process's, and this very repository first on Python's path."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


def _wait(process: subprocess.Popen[bytes], ready: str, log: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise ServerFailure(f"it ended with {process.returncode}: {_last_words(log)}")
        with contextlib.suppress(OSError, urllib.error.URLError):
            urllib.request.urlopen(ready, timeout=5).close()
            return
        time.sleep(0.05)
    raise ServerFailure(f"not ready after {_START_SECONDS:.0f} s: {_last_words(log)}")


def _last_words(log: Path) -> str:
    return " ".join(log.read_text(errors="replace").split())[-_LAST_WORDS:]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End it politely, then whatever is left of its group: some servers leave their workers behind."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
