"""The servers that are compared: vitdeploy's own, and others with the same bundle and the same threads."""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from benchmarks.peers.environments import EnvironmentFailure, ensure
from benchmarks.serving.driving import Served
from benchmarks.serving.processes import ServerFailure, free_port, running
from benchmarks.serving.subjects import (
    Asked,
    Subject,
    binary_v2,
    class_of,
    in_json,
    logits_of,
    raw_bytes,
)
from vitdeploy._version import __version__

OURS = "vitdeploy"
GENERATOR = "the load alone"
ENVIRONMENT = "serving"
"""Of the peers that are Python packages."""
_HERE = Path(__file__).parent
_TOLERANCE = 1e-3
"""Relative; all run the same fp32 file."""

Start = Callable[[Subject, int, Path], contextlib.AbstractContextManager[Served]]


@contextlib.contextmanager
def vitdeploy(subject: Subject, threads: int, folder: Path, flags: Sequence[str] = ()) -> Iterator[Served]:
    """``vitdeploy serve``, as it comes, but for the threads."""
    port = free_port()
    flags = ("--threads", str(threads), "--port", str(port), "--backend", "onnxruntime", *flags)
    command = [sys.executable, "-P", "-m", "vitdeploy", "serve", f"model={subject.bundle.root}", *flags]
    asks = {
        "tensor": binary_v2(subject, "/v2/models/model/infer"),
        "image": raw_bytes(subject.images, "/v1/models/model:predict?top_k=5", "image/jpeg"),
    }
    names = ("onnxruntime", "starlette", "uvicorn", "httptools", "orjson", "numpy", "pillow")
    versions = {"vitdeploy": __version__, **{name: version(name) for name in names}}
    ready = f"http://127.0.0.1:{port}/v2/health/ready"
    with running(command, ready, folder / f"vitdeploy-{port}.log"):
        yield Served(OURS, port, asks, versions)


@contextlib.contextmanager
def generator(subject: Subject, threads: int, folder: Path) -> Iterator[Served]:
    """A server that only answers: how much the load could ask for."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.serving.null_server", str(port)]
    asks = {
        "tensor": binary_v2(subject, "/"),
        "image": raw_bytes(subject.images, "/", "image/jpeg"),
    }
    with running(command, f"http://127.0.0.1:{port}/", folder / "generator.log"):
        yield Served(GENERATOR, port, asks, {})


@contextlib.contextmanager
def fastapi(subject: Subject, threads: int, folder: Path) -> Iterator[Served]:
    """Plain FastAPI without batching; the pixels come as bare bytes, which is the quickest it can take."""
    python, port = _environment(), free_port()
    command = [
        str(python),
        str(_HERE / "fastapi_server.py"),
        str(subject.bundle.root),
        str(threads),
        str(port),
    ]
    pixels = [row.tobytes() for row in subject.pixels]
    asks = {
        "tensor": raw_bytes(pixels, "/tensor", "application/octet-stream"),
        "image": raw_bytes(subject.images, "/image", "image/jpeg"),
    }
    with running(command, f"http://127.0.0.1:{port}/ready", folder / "fastapi.log"):
        versions = _versions(python, "fastapi", "starlette", "uvicorn", "httptools", "onnxruntime")
        yield Served("fastapi", port, asks, versions, "one run of the session per request, in a thread pool")


@contextlib.contextmanager
def litserve(subject: Subject, threads: int, folder: Path) -> Iterator[Served]:
    """LitServe with dynamic batching, the largest batch being vitdeploy's."""
    python, port = _environment(), free_port()
    (artifact,) = subject.bundle.manifest.artifacts
    words = (subject.bundle.root, threads, port, artifact.batch.opt)
    command = [str(python), str(_HERE / "litserve_server.py"), *map(str, words)]
    asks = {
        "tensor": in_json([row.tobytes() for row in subject.pixels], "/predict", "tensor"),
        "image": in_json(subject.images, "/predict", "image"),
    }
    with running(command, f"http://127.0.0.1:{port}/health", folder / "litserve.log"):
        versions = _versions(python, "litserve", "fastapi", "uvicorn", "onnxruntime")
        yield Served("litserve", port, asks, versions, "base64 in JSON: it takes no bytes")


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
        yield Served("triton", int(server.http.rpartition(":")[2]), asks, versions, note)


PEERS: Mapping[str, Start] = MappingProxyType({"fastapi": fastapi, "litserve": litserve, "triton": triton})


def _environment() -> Path:
    try:
        return ensure(ENVIRONMENT)
    except EnvironmentFailure as error:
        raise ServerFailure(str(error)) from error


def _versions(python: Path, *names: str) -> dict[str, str]:
    program = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    done = subprocess.run([str(python), "-c", program, *names], capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.split(), strict=True))


def check(server: Served, subject: Subject) -> None:
    """Hold a server's answers against the reference, and against the predictor in this process.

    Raises:
        ServerFailure: one is wrong: a fast wrong answer is no result.
    """
    for kind, asked in server.asks.items():
        for index, body in enumerate(asked.bodies):
            answer, headers = _ask(server, asked, body)
            if kind == "image":
                right = class_of(answer) == subject.classes[index]
            else:
                logits, wanted = logits_of(answer, headers, subject.output), subject.reference[index]
                right = logits is not None and bool(
                    np.abs(logits - wanted).max() <= _TOLERANCE * np.abs(wanted).max()
                )
            if not right:
                raise ServerFailure(f"{server.name} answers {kind} {index} wrongly: {answer[:200]!r}")


def _ask(server: Served, asked: Asked, body: bytes) -> tuple[bytes, Mapping[str, str]]:
    url = f"http://127.0.0.1:{server.port}{asked.path}"
    request = urllib.request.Request(url, body, dict(asked.headers))
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read(), response.headers
    except OSError as error:
        raise ServerFailure(f"{server.name}: {error}") from error
