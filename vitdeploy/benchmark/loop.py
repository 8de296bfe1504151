"""The measured side of a benchmark: a process that holds one loaded model and runs it on request.

Requests and answers are lines of JSON on standard input and output; arrays travel in files that the requests
name, inputs as .npy, outputs in their order as one .npz. Needs the standard library and numpy only, so that
another tool's model, in an environment of its own, is measured by the same code: write ``open_model``, call
``run_process(open_model)``.

    {"do": "run", "inputs": PATH, "outputs": PATH}   one run; {"seconds"}
    {"do": "prepare", "batch": N, "inputs": PATH}    keep a batch and run it once; {"seconds", "peak_memory"}
    {"do": "sample", "batch": N, "count": K, "untimed": U}
                                                     each caller: U runs, then K timed ones;
                                                     {"samples", "wall", "device"} in seconds
    {"do": "last", "batch": N, "outputs": PATH}      what the first caller's last timed run gave; {}

The first line is the job, which only ``open_model`` understands; its answer is {"facts", "imports", "load"}
in seconds. An answer {"error": {"kind", "message", "hint"}} ends nothing: the next request may still work.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitdeploy.machine.child import private_pipes
from vitdeploy.machine.memory import forget_peak, peak_memory

Array = np.ndarray[Any, Any]
Outputs = Array | Sequence[Array]
"""Of a model: its only output, or all in their order."""
Caller = Callable[[Array], tuple[Outputs, float | None]]
"""Runs a batch; returns the outputs, and the seconds on the device where that is known."""


@dataclass(frozen=True)
class LoadedModel:
    """A model, ready to run."""

    callers: Sequence[Caller]
    """One per concurrent caller."""
    facts: dict[str, Any]
    """For the other side; anything that is JSON."""


def answer_requests(open_model: Callable[[dict[str, Any]], LoadedModel]) -> int:
    """Answer requests until standard input ends; returns the exit code of the process."""
    requests, answers = private_pipes()

    def send(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")

    job = requests.readline()
    if not job:
        return 0
    try:
        with imports_timed() as imports:
            begin = time.perf_counter()
            loaded = open_model(json.loads(job))
            seconds = time.perf_counter() - begin
    except Exception as error:
        send(_failure(error))
        return 1
    send({"facts": loaded.facts, "imports": imports[0], "load": seconds - imports[0]})
    model = _Requests(loaded.callers)
    for line in requests:
        request = json.loads(line)
        try:
            send(getattr(model, f"do_{request.pop('do')}")(**request))
        except Exception as error:
            send(_failure(error))
    return 0


def _failure(error: Exception) -> dict[str, Any]:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError):
        text = f"out of memory: {text}"
    return {"error": {"kind": type(error).__name__, "message": text, "hint": getattr(error, "hint", None)}}


@contextlib.contextmanager
def imports_timed() -> Iterator[list[float]]:
    """Sum up the seconds that import statements take, each counted once; yields the sum in a list."""
    total, depth, plain = [0.0], 0, builtins.__import__

    def timed(*arguments: Any, **named: Any) -> Any:
        nonlocal depth
        depth, begin = depth + 1, time.perf_counter()
        try:
            return plain(*arguments, **named)
        finally:
            depth -= 1
            if depth == 0:
                total[0] += time.perf_counter() - begin

    builtins.__import__ = timed
    try:
        yield total
    finally:
        builtins.__import__ = plain


class _Requests:
    """Carries out the requests."""

    def __init__(self, callers: Sequence[Caller]) -> None:
        self._callers = callers
        self._batches: dict[int, Array] = {}
        self._last: dict[int, Outputs] = {}

    def do_run(self, inputs: str, outputs: str) -> dict[str, Any]:
        begin = time.perf_counter()
        found = self._callers[0](np.load(inputs))[0]
        seconds = time.perf_counter() - begin
        _save(outputs, found)
        return {"seconds": seconds}

    def do_prepare(self, batch: int, inputs: str) -> dict[str, Any]:
        self._batches[batch] = np.load(inputs)
        forget_peak()
        begin = time.perf_counter()
        for caller in self._callers:
            caller(self._batches[batch])
        seconds = time.perf_counter() - begin
        return {"seconds": seconds / len(self._callers), "peak_memory": peak_memory()}

    def do_sample(self, batch: int, count: int, untimed: int) -> dict[str, Any]:
        pixels = self._batches[batch]
        ready = threading.Barrier(len(self._callers))
        parts = [_CallerPart(caller, pixels, (untimed, count), ready) for caller in self._callers]
        with _no_garbage_collection():
            threads = [threading.Thread(target=part.run) for part in parts[1:]]
            for thread in threads:
                thread.start()
            parts[0].run()
            for thread in threads:
                thread.join()
        for part in parts:
            if part.error is not None:
                raise part.error
        assert parts[0].outputs is not None
        self._last[batch] = parts[0].outputs
        return {
            "samples": [sample for part in parts for sample in part.samples],
            "wall": max(part.end for part in parts) - min(part.begin for part in parts),
            "device": [seconds for part in parts for seconds in part.device],
        }

    def do_last(self, batch: int, outputs: str) -> dict[str, Any]:
        _save(outputs, self._last[batch])
        return {}


def _save(path: str, outputs: Outputs) -> None:
    np.savez(path, *([outputs] if isinstance(outputs, np.ndarray) else outputs))


class _CallerPart:
    """One caller's part of a round."""

    def __init__(
        self, caller: Caller, pixels: Array, counts: tuple[int, int], ready: threading.Barrier
    ) -> None:
        self._caller, self._pixels, self._ready = caller, pixels, ready
        self._untimed, self._count = counts
        self.samples: list[float] = []
        self.device: list[float] = []
        self.begin = self.end = 0.0
        self.outputs: Outputs | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            for _ in range(self._untimed):
                self._caller(self._pixels)
            self._ready.wait()
            self.begin = before = time.perf_counter()
            for _ in range(self._count):
                self.outputs, device = self._caller(self._pixels)
                now = time.perf_counter()
                self.samples.append(now - before)
                if device is not None:
                    self.device.append(device)
                before = now
            self.end = before
        except threading.BrokenBarrierError:  # another caller has failed, and says so
            pass
        except Exception as error:
            self.error = error
            self._ready.abort()


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Python's collector would run inside whichever sample happens to trigger it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def run_process(open_model: Callable[[dict[str, Any]], LoadedModel]) -> None:
    """Answer requests, then end at once: some runtimes crash when they are torn down."""
    code = answer_requests(open_model)
    sys.stdout.flush()
    os._exit(code)
