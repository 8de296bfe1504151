"""The builder in a process of its own, and the other end of the pipe.

A builder may crash, or be killed when memory runs out; then the parent still has its last words. The parent
keeps the child's standard input open: when the parent dies, however it dies, the child sees the end and
stops.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vitdeploy.errors import ExportError, VitdeployError
from vitdeploy.tensorrt.flavours import FLAVOURS
from vitdeploy.tensorrt.records import BuildJob, BuildResult, Report

_TAIL = 300
"""Characters of a dead builder's last words."""
_GRACE = 5.0
"""Seconds that a builder has to end after it was told to."""


def build_engines(job: BuildJob, report: Report) -> BuildResult:
    """Run a job in a process of its own.

    Args:
        report: receives what the builder is doing and how far it is (0 to 1).

    Raises:
        VitdeployError: what the builder raises.
        ExportError: the builder's process died.
        OSError: an engine could not be written.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as words, _process(words) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(job.model_dump_json() + "\n")
            process.stdin.flush()
        for line in process.stdout:
            message = json.loads(line)
            if "result" in message:
                return BuildResult.model_validate(message["result"])
            if "error" in message:
                raise _error(message["error"])
            report(message["phase"], message["fraction"])
        raise _death(FLAVOURS[job.flavour].title, process.wait(), words)


@contextlib.contextmanager
def _process(words: IO[str]) -> Iterator[subprocess.Popen[str]]:
    """The child, gone at the end whatever happened. Ctrl-C at a terminal reaches the parent alone."""
    # The folder it is called in may have another vitdeploy/; this one need not be installed.
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "vitdeploy.tensorrt.child"],
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=words,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()


def _error(record: dict[str, Any]) -> Exception:
    """The error that the child raised, as it raised it."""
    if "errno" in record:
        return OSError(record["errno"], record["message"], record["filename"])
    return VitdeployError.from_dict(record)


def _death(title: str, code: int, words: IO[str]) -> ExportError:
    words.seek(0)
    last = " ".join(words.read().split())[-_TAIL:]
    said = f"; its last words: {last}" if last else ""
    if code == -signal.SIGKILL:
        hint = "the system kills what takes too much memory: free some, or build on a larger machine"
        return ExportError(f"the builder of {title} was killed{said}", hint=hint)
    how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    return ExportError(f"the builder of {title} {how}{said}", hint="--format onnx does without engines")


def main() -> int:
    """The child: one job on standard input, messages on standard output, a line of JSON each."""
    messages = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the library itself prints is no message
    line = sys.stdin.readline()
    threading.Thread(target=_die_with_the_parent, daemon=True).start()

    def send(**message: Any) -> None:
        messages.write(json.dumps(message) + "\n")

    try:
        from vitdeploy.tensorrt.builder import run

        job = BuildJob.model_validate_json(line)
        result = run(job, lambda phase, fraction: send(phase=phase, fraction=fraction))
        send(result=result.model_dump(mode="json"))
    except VitdeployError as error:
        send(error=error.as_dict())
    except OSError as error:
        send(error={"errno": error.errno, "message": error.strerror, "filename": error.filename})
    except MemoryError:
        send(error=ExportError("the builder needs more memory than there is").as_dict())
    return 0


def _die_with_the_parent() -> None:
    while sys.stdin.read(1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
