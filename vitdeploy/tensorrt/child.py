"""The builder in a process of its own: a builder may crash, or be killed when memory runs out."""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import IO, Any

from vitdeploy.errors import ExportError, VitdeployError
from vitdeploy.machine.child import (
    Worker,
    WorkerFailure,
    child_environment,
    error_of,
    private_pipes,
    record_of,
)
from vitdeploy.tensorrt.flavours import FLAVOURS
from vitdeploy.tensorrt.records import BuildJob, BuildResult, Report


def build_engines(job: BuildJob, report: Report) -> BuildResult:
    """Run a job in a process of its own.

    Args:
        report: receives what the builder is doing and how far it is (0 to 1).

    Raises:
        VitdeployError: what the builder raises.
        ExportError: the builder's process died.
        OSError: an engine could not be written.
    """
    command = (sys.executable, "-P", "-m", "vitdeploy.tensorrt.child")
    name = f"the builder of {FLAVOURS[job.flavour].title}"
    try:
        with Worker(command, job.model_dump(mode="json"), child_environment(), None, name=name) as worker:
            while "result" not in (message := worker.receive()):
                if "error" in message:
                    raise error_of(message["error"])
                report(message["phase"], message["fraction"])
            return BuildResult.model_validate(message["result"])
    except WorkerFailure as failure:
        hint = "an export with --format onnx does without engines"
        if failure.killed:
            hint = "the system kills what takes too much memory: free some, or build on a larger machine"
        raise ExportError(str(failure), hint=hint) from failure


def _answer() -> None:
    """The child: one job on standard input; progress, then a result or an error on standard output."""
    requests, answers = private_pipes()
    line = requests.readline()
    threading.Thread(target=_die_with_the_parent, args=(requests,), daemon=True).start()

    def send(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")

    try:
        from vitdeploy.tensorrt.builder import run_build_job

        job = BuildJob.model_validate_json(line)
        result = run_build_job(job, lambda phase, fraction: send(phase=phase, fraction=fraction))
        send(result=result.model_dump(mode="json"))
    except (VitdeployError, OSError) as error:
        send(error=record_of(error))
    except MemoryError:
        send(error=record_of(ExportError("the builder needs more memory than there is")))


def _die_with_the_parent(requests: IO[str]) -> None:
    while requests.read(1):
        pass
    os._exit(1)


if __name__ == "__main__":
    _answer()
