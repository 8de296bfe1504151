"""Compiles many launches in processes of their own, which also keeps the interpreter out of them.

A process reads a job per line on its standard input and answers with a line of JSON; it imports the
kernel by its name. Kernels must therefore be defined in modules that can be imported.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import import_module
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vitdeploy_kernels.aot import AotError, Compiled, capability_of, compile_launch, launch_key
from vitdeploy_kernels.launch import Launch

Key: TypeAlias = tuple[str, str]
"""Architecture and :func:`vitdeploy_kernels.aot.launch_key`."""

Progress: TypeAlias = Callable[[int, int, str], None]
"""Told how many are done, how many there are, and what was done last."""


def compile_all(
    jobs: Iterable[tuple[str, Launch]], *, processes: int = 2, progress: Progress | None = None
) -> dict[Key, Compiled]:
    """Compile launches for architectures, each distinct kernel once.

    Args:
        jobs: architecture and launch.
        processes: that compile at a time.
        progress: called in this thread after each.

    Returns:
        What was compiled, by architecture and :func:`launch_key`.

    Raises:
        AotError: the first failure; nothing more is compiled then.
    """
    done: dict[Key, Compiled] = {}
    with contextlib.closing(compile_each(jobs, processes=processes, progress=progress)) as results:
        for key, result in results:
            if isinstance(result, AotError):
                raise result
            done[key] = result
    return done


def compile_each(
    jobs: Iterable[tuple[str, Launch]], *, processes: int = 2, progress: Progress | None = None
) -> Generator[tuple[Key, Compiled | AotError], None, None]:
    """Like :func:`compile_all`, but yields each as it is done; what cannot be compiled as its error."""
    distinct = {(arch, launch_key(launch)): launch for arch, launch in jobs}
    for arch, _ in distinct:
        capability_of(arch)
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    workers = [_Worker() for _ in range(min(processes, len(distinct)))]
    for worker in workers:
        idle.put(worker)

    def work(arch: str, launch: Launch) -> Compiled | AotError:
        worker = idle.get()
        try:
            return worker.compile(launch, arch)
        except AotError as error:
            return error
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(max(len(workers), 1))
    try:
        futures = {pool.submit(work, key[0], launch): key for key, launch in distinct.items()}
        for count, future in enumerate(as_completed(futures), start=1):
            key = futures[future]
            if progress is not None:
                progress(count, len(distinct), f"{distinct[key].name} for {key[0]}")
            yield key, future.result()
    finally:
        for worker in workers:
            worker.stop()
        pool.shutdown(cancel_futures=True)


class _Worker:
    """A process that compiles."""

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def compile(self, launch: Launch, arch: str) -> Compiled:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"arch": arch, **_describe(launch)}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self._process.wait()
            raise AotError(f"{launch.name} for {arch}: the compiling process ended with exit status {code}")
        document = json.loads(answer)
        if "error" in document:
            raise AotError(document["error"])
        document["cubin"] = base64.b64decode(document["cubin"])
        document["parameters"] = tuple(document["parameters"])
        return Compiled(**document)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def _describe(launch: Launch) -> dict[str, Any]:
    function = launch.kernel.fn
    return {
        "module": function.__module__,
        "kernel": function.__qualname__,
        "arguments": {
            name: str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else value
            for name, value in launch.arguments.items()
        },
        "constants": dict(launch.constants),
        "warps": launch.warps,
        "stages": launch.stages,
    }


def _rebuild(job: dict[str, Any]) -> Launch:
    arguments = {
        name: torch.empty(0, dtype=getattr(torch, value), device="meta") if isinstance(value, str) else value
        for name, value in job["arguments"].items()
    }
    kernel = getattr(import_module(job["module"]), job["kernel"])
    return Launch(kernel, (1,), arguments, job["constants"], job["warps"], job["stages"])


def serve() -> None:
    """The loop of a compiling process."""
    # What compilers print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(_answer(json.loads(line)) + "\n")
        answers.flush()


def _answer(job: dict[str, Any]) -> str:
    try:
        compiled = compile_launch(_rebuild(job), job["arch"])
    except Exception as error:
        named = error if isinstance(error, AotError) else f"{job['kernel']}: {type(error).__name__}: {error}"
        return json.dumps({"error": str(named)})
    return json.dumps({**vars(compiled), "cubin": base64.b64encode(compiled.cubin).decode()})
