"""The servers that are compared: vitdeploy's own as it comes, and others with the same bundle.

All share the same processors. A peer has one worker whose session has a thread for each, or as many workers
as there are processors, each with a session of one thread: which is better depends on the model.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.peers.environments import EnvironmentFailure, ensure
from benchmarks.serving.checking import check
from benchmarks.serving.driving import Served
from benchmarks.serving.processes import ServerFailure, free_port, running
from benchmarks.serving.subjects import (
    Subject,
    binary_v2,
    in_json,
    prepare_optimized,
    raw_bytes,
)
from vitdeploy._version import __version__

OURS = "vitdeploy"
OPTIMIZED = "vitdeploy, optimize's pick"
GENERATOR = "the load alone"
ENVIRONMENT = "serving"
"""Of the peers that are Python packages."""
OTHER_RUNTIME = ("ovms",)
"""Peers that do not run the file on ONNX Runtime."""
_HERE = Path(__file__).parent

Start = Callable[[Subject, int, Path], contextlib.AbstractContextManager[Served]]
"""Starts a server on a subject, for so many processors, with a folder for its files; its answers are checked.

Raises:
    ServerFailure: it cannot be had, does not start, or answers wrongly.
"""


@contextlib.contextmanager
def vitdeploy(
    subject: Subject, folder: Path, name: str = OURS, flags: Sequence[str] = ()
) -> Iterator[Served]:
    """``vitdeploy serve`` as it comes: sessions, threads and batches are its own choice.

    Raises:
        ServerFailure: it does not start, or answers wrongly.
    """
    port = free_port()
    command = [sys.executable, "-P", "-m", "vitdeploy", "serve", f"model={subject.bundle.root}"]
    asks = {"tensor": binary_v2(subject, "/v2/models/model/infer")}
    if subject.images:
        asks["image"] = raw_bytes(subject.images, "/v1/models/model:predict?top_k=5", "image/jpeg")
    names = ("onnxruntime", "starlette", "uvicorn", "httptools", "orjson", "numpy", "pillow")
    versions = {"vitdeploy": __version__, **{name: version(name) for name in names}}
    ready = f"http://127.0.0.1:{port}/v2/health/ready"
    log = folder / f"vitdeploy-{port}.log"
    with running([*command, "--port", str(port), *flags], ready, log) as session:
        yield check(Served(name, port, asks, versions, loaded(log), session), subject)


def loaded(log: Path) -> str:
    """What a vitdeploy server notes of its model, such as its plan; else that it has loaded it."""
    lines = [" ".join(line.split()) for line in log.read_text(errors="replace").splitlines()]
    notes = [line.removeprefix("note: model: ") for line in lines if line.startswith("note: ")]
    return "; ".join(notes or [line for line in lines if line.startswith("load ")])


def picked(subject: Subject) -> Subject:
    """What ``vitdeploy optimize`` picks of the same model.

    Raises:
        ServerFailure: it fails.
    """
    try:
        return prepare_optimized(subject.name)
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.decode().split())[-300:]
        raise ServerFailure(f"vitdeploy optimize: {said}") from error


@contextlib.contextmanager
def generator(subject: Subject, folder: Path) -> Iterator[Served]:
    """A server that only answers: how much the load could ask for."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.serving.null_server", str(port)]
    asks = {
        "tensor": binary_v2(subject, "/"),
        "image": raw_bytes(subject.images, "/", "image/jpeg"),
    }
    with running(command, f"http://127.0.0.1:{port}/", folder / "generator.log") as session:
        yield Served(GENERATOR, port, asks, {}, session=session)


@contextlib.contextmanager
def fastapi(subject: Subject, threads: int, folder: Path, *, split: bool = False) -> Iterator[Served]:
    """Plain FastAPI without batching; the pixels come as bare bytes, which is the quickest it can take."""
    name, python, port = _name("fastapi", threads, split), _environment(), free_port()
    words = (subject.bundle.root, port, *_workers(threads, split))
    pixels = [row.tobytes() for row in subject.pixels]
    asks = {
        "tensor": raw_bytes(pixels, "/tensor", "application/octet-stream"),
        "image": raw_bytes(subject.images, "/image", "image/jpeg"),
    }
    command = [str(python), str(_HERE / "fastapi_server.py"), *map(str, words)]
    with running(command, f"http://127.0.0.1:{port}/ready", folder / f"{name}.log") as session:
        versions = _versions(python, "fastapi", "starlette", "uvicorn", "httptools", "onnxruntime")
        note = "one run of the session per request, in a thread pool"
        yield check(Served(name, port, asks, versions, note, session), subject)


@contextlib.contextmanager
def litserve(subject: Subject, threads: int, folder: Path, *, split: bool = False) -> Iterator[Served]:
    """LitServe with dynamic batching, the largest batch being the artifact's best."""
    name, python, port = _name("litserve", threads, split), _environment(), free_port()
    words = (subject.bundle.root, port, *_workers(threads, split), subject.artifact.batch.opt)
    asks = {
        "tensor": in_json([row.tobytes() for row in subject.pixels], "/predict", "tensor"),
        "image": in_json(subject.images, "/predict", "image"),
    }
    command = [str(python), str(_HERE / "litserve_server.py"), *map(str, words)]
    with running(command, f"http://127.0.0.1:{port}/health", folder / f"{name}.log") as session:
        versions = _versions(python, "litserve", "fastapi", "uvicorn", "onnxruntime")
        note = "base64 in JSON: it takes no bytes"
        yield check(Served(name, port, asks, versions, note, session), subject)


def _workers(threads: int, split: bool) -> tuple[int, int]:
    """Workers, and the threads of each."""
    return (threads, 1) if split else (1, threads)


def _name(peer: str, threads: int, split: bool) -> str:
    workers, each = _workers(threads, split)
    return f"{peer} {workers} x {each}"


@contextlib.contextmanager
def triton(subject: Subject, threads: int, folder: Path) -> Iterator[Served]:
    """NVIDIA's Triton Inference Server on what ``vitdeploy package`` writes for it."""
    package = folder / "triton"
    words = (str(subject.bundle.root), "--target", "triton-server", "-o", str(package), "--tensors-only")
    command = [sys.executable, "-P", "-m", "vitdeploy", "package", *words, "--name", "model", "--force"]
    done = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServerFailure(f"vitdeploy package: {' '.join(done.stderr.split())[-300:]}")
    try:
        starter: Any = importlib.import_module("tests.helpers.triton_server")
        stack = contextlib.ExitStack()
        server = stack.enter_context(starter.running_triton(package / "models", folder / "triton-server"))
    except (ImportError, AssertionError, OSError) as error:
        raise ServerFailure(" ".join(str(error).split())[-300:]) from error
    with stack:
        asks = {"tensor": binary_v2(subject, "/v2/models/model/infer")}
        versions = dict(pin.split("==") for pin in starter.WANTED if "==" in pin)
        note = "its ONNX Runtime is the tests' Python stand-in, which does not stack requests"
        port = int(server.http.rpartition(":")[2])
        yield check(Served("triton", port, asks, versions, note, server.pid), subject)


@contextlib.contextmanager
def ovms(subject: Subject, threads: int, folder: Path) -> Iterator[Served]:
    """OpenVINO Model Server, where its program is installed: no package registry has it."""
    program = shutil.which("ovms")
    if program is None:
        raise ServerFailure("no program ovms on PATH; no package registry has it")
    models, port = folder / "ovms" / "model", free_port()
    shutil.copytree(subject.bundle.root, models / "1", ignore=_all_but_onnx)
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "THROUGHPUT"}
    words = {
        "model_name": "model",
        "model_path": str(models),
        "rest_port": str(port),
        "rest_bind_address": "127.0.0.1",
        "plugin_config": json.dumps({**settings, "INFERENCE_PRECISION_HINT": "f32"}),
    }
    command = [program, *(word for key, value in words.items() for word in (f"--{key}", value))]
    ready = f"http://127.0.0.1:{port}/v2/models/model/ready"
    with running(command, ready, folder / "ovms.log") as session:
        asks = {"tensor": binary_v2(subject, "/v2/models/model/infer")}
        note = "OpenVINO, fp32, as many streams as it likes"
        yield check(Served("ovms", port, asks, {}, note, session), subject)


def _all_but_onnx(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith("model.onnx")]


PEERS: Mapping[str, tuple[Start, ...]] = MappingProxyType(
    {
        "fastapi": (fastapi, functools.partial(fastapi, split=True)),
        "litserve": (litserve, functools.partial(litserve, split=True)),
        "triton": (triton,),
        "ovms": (ovms,),
    }
)
"""The ways to set up each."""


def _environment() -> Path:
    try:
        return ensure(ENVIRONMENT)
    except EnvironmentFailure as error:
        raise ServerFailure(str(error)) from error


def _versions(python: Path, *names: str) -> dict[str, str]:
    program = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    done = subprocess.run([str(python), "-c", program, *names], capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.split(), strict=True))
