"""``vitdeploy serve`` as a process of its own, and small bundles for it to serve."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.bundles import WEIGHT, golden_arrays, write_bundle
from tests.helpers.processes import wait_for

COMMAND = (sys.executable, "-m", "vitdeploy", "serve")
PATIENCE = 60.0
"""Seconds after which a test gives up on a server: it hangs. That a busy machine is slow is no failure."""
_SERVING = re.compile(r"^serving (http://\S+?)(?:, gRPC (\S+))?$", re.MULTILINE)


@dataclass(frozen=True)
class Reply:
    """An answer over HTTP."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The message of an error in the protocol's shape, which is checked."""
        assert self.headers["content-type"] == "application/json", self
        document = self.document
        assert list(document) == ["error"], document
        assert isinstance(document["error"], str)
        assert 0 < len(document["error"]) <= 2000, len(document["error"])
        assert "\n" not in document["error"]
        return str(document["error"])


@dataclass
class Live:
    """A server that accepts requests."""

    url: str
    grpc: str
    process: subprocess.Popen[bytes]
    log: Path
    """Where its stderr goes."""
    _begin: int = 0
    """Where in it the test at hand begins."""

    @property
    def address(self) -> str:
        """``host:port`` of HTTP, as tritonclient wants it."""
        return self.url.removeprefix("http://")

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @contextmanager
    def watched(self) -> Iterator[Live]:
        """For one of the tests that share this server: what it said before is none of this test's business.

        At the end it has to be alive still, and to have said nothing of a crash meanwhile.
        """
        self._begin = self.log.stat().st_size
        yield self
        self.require_well()

    def said(self) -> str:
        """Its stderr, from the beginning of the test at hand where others share it."""
        return self.log.read_bytes()[self._begin :].decode(errors="replace")

    def require_well(self) -> None:
        """It lives, and in this test it said nothing of a crash."""
        said = self.said()
        assert self.process.poll() is None, said
        assert "Traceback" not in said, said

    def queued(self, model: str = "linear") -> int:
        """How many of the model's images wait for a session."""
        text = self.ask("GET", "/metrics").body.decode()
        found = re.findall(rf'^vitdeploy_queue_images{{.*model="{model}",.*}} (.*)$', text, re.MULTILINE)
        return sum(int(float(number)) for number in found)

    def require_queued(self, images: int, model: str = "linear") -> None:
        """Wait until so many wait for a session."""
        assert wait_for(lambda: self.queued(model) == images, PATIENCE), self.queued(model)

    def rss(self) -> int:
        """Resident memory in KiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = PATIENCE) -> int:
        return self.process.wait(seconds)

    def client(self, timeout: float = PATIENCE) -> Client:
        return Client(self.port, timeout)

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> Reply:
        """One request on a connection of its own; ``_`` in a header's name is ``-``."""
        with self.client() as client:
            return client.ask(method, path, body, **headers)


class Client:
    """One connection that stays open."""

    def __init__(self, port: int, timeout: float = PATIENCE) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> Reply:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._connection.request(method, path, body or None, named)
        reply = self._connection.getresponse()
        return Reply(reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read())


@contextmanager
def serving(
    *arguments: object,
    port: int = 0,
    command: Sequence[str] = COMMAND,
    seconds: float = 120.0,
) -> Iterator[Live]:
    """Start a server with these bundles and flags, wait until it serves, and end it whatever happens."""
    flags = ("--port", str(port), "--grpc-port", "0") if command is COMMAND else ()
    if (
        "serve" in command and "--plan-seconds" not in arguments
    ):  # what serves most here is no test's business but the plan's own
        flags += ("--plan-seconds", "0")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "stderr"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [*command, *map(str, arguments), *flags],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, "COLUMNS": "200"},
            )
        try:
            found = _wait(process, log, time.monotonic() + seconds)
            yield Live(found[1], found[2] or "", process, log)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    process.kill()
            process.wait()


@dataclass(frozen=True)
class Gate:
    """What the sessions of a ``held`` server wait for."""

    folder: Path

    def open(self) -> None:
        (self.folder / "open").touch()

    def require_reached(self) -> None:
        """Wait until a session has a batch in hand."""
        assert wait_for((self.folder / "reached").exists, PATIENCE)


_HELD = """
import sys, time
from pathlib import Path
from vitdeploy.cli import main
from vitdeploy.server import batcher

gate, run = Path(sys.argv.pop(1)), batcher._run_together

def held(*arguments):
    (gate / "reached").touch()
    while not (gate / "open").exists():
        time.sleep(0.01)
    return run(*arguments)

batcher._run_together = held
sys.exit(main())
"""


@contextmanager
def held(*arguments: object) -> Iterator[tuple[Live, Gate]]:
    """The same, with sessions that run nothing until the gate is open: requests stay in hand until then."""
    with tempfile.TemporaryDirectory() as folder:
        gate = Gate(Path(folder))
        command = (sys.executable, "-c", _HELD, folder, "serve")
        with serving(*arguments, "--port", 0, "--grpc-port", 0, command=command) as server:
            try:
                yield server, gate
            finally:
                gate.open()


def _wait(process: subprocess.Popen[bytes], log: Path, deadline: float) -> re.Match[str]:
    while time.monotonic() < deadline:
        ended = process.poll()  # before the log is read, so that nothing it said is missed
        if found := _SERVING.search(log.read_text()):
            return found
        assert ended is None, f"the server ended with {ended}: {log.read_text()}"
        time.sleep(0.02)
    raise AssertionError(f"the server does not serve: {log.read_text()}")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def scaled(folder: Path, factor: float, **manifest: Any) -> Path:
    """The linear classifier with ``factor`` times its weights, and so ``factor`` times its logits."""
    golden = golden_arrays()
    golden["reference"] = golden["reference"] * factor
    weight = (WEIGHT * np.float32(factor)).astype(np.float32)
    return write_bundle(folder, weight=weight, golden=golden, **manifest).root


@dataclass(frozen=True)
class Request:
    """An infer request for the linear classifier over HTTP."""

    document: dict[str, Any]
    tail: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        return json.dumps(self.document).encode() + self.tail


def json_request(pixels: np.ndarray[Any, Any], name: str = "pixel_values", **fields: Any) -> Request:
    """All of it in JSON."""
    tensor = {"name": name, "datatype": "FP32", "shape": list(pixels.shape), "data": pixels.ravel().tolist()}
    return Request({"inputs": [tensor], **fields})


def binary_request(pixels: np.ndarray[Any, Any], name: str = "pixel_values", **fields: Any) -> Request:
    """The tensor as bytes behind the JSON, and the answer's too."""
    data = pixels.astype("<f4").tobytes()
    parameters = {"binary_data_size": len(data)}
    tensor = {"name": name, "datatype": "FP32", "shape": list(pixels.shape), "parameters": parameters}
    document = {"inputs": [tensor], "parameters": {"binary_data_output": True}, **fields}
    length = len(json.dumps(document).encode())
    return Request(document, data, {"Inference_Header_Content_Length": str(length)})


class Asking:
    """Infer requests for the linear classifier that are on their way, each in a thread of its own."""

    def __init__(self, live: Live, request: Request, count: int = 1) -> None:
        self._live, self._request = live, request
        self._replies: list[Reply] = []
        self._threads = [threading.Thread(target=self._ask) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        reply = self._live.ask("POST", "/v2/models/linear/infer", self._request.body, **self._request.headers)
        self._replies.append(reply)

    def replies(self) -> list[Reply]:
        """Wait for all answers."""
        for thread in self._threads:
            thread.join(PATIENCE)
        assert len(self._replies) == len(self._threads)
        return self._replies


def logits_of(reply: Reply) -> np.ndarray[Any, Any]:
    """The output ``logits`` of an answer, JSON or binary, in float64."""
    assert reply.status == 200, reply
    length = reply.headers.get("inference-header-content-length")
    document = json.loads(reply.body if length is None else reply.body[: int(length)])
    (output,) = document["outputs"]
    assert (output["name"], output["datatype"]) == ("logits", "FP32")
    if length is None:
        return np.array(output["data"], np.float64).reshape(output["shape"])
    data = reply.body[int(length) :]
    assert output["parameters"]["binary_data_size"] == len(data)
    return np.frombuffer(data, "<f4").astype(np.float64).reshape(output["shape"])
