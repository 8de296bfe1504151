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
from collections.abc import Iterator, Mapping, Sequence
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
def running(command: Sequence[str], ready: str, log: Path) -> Iterator[None]:
    """A server, from the moment it is ready until the block ends.

    Args:
        ready: a URL that answers 200 once it is.
        log: where what it prints goes.

    Raises:
        ServerFailure: it ends, or does not become ready.
    """
    with log.open("wb") as stream:
        process = subprocess.Popen(
            list(command),
            stdout=stream,
            stderr=stream,
            env=_variables(),
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
    try:
        _wait(process, ready, log)
        yield
    finally:
        _stop(process)


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
