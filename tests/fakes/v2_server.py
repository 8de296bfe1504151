"""A small server of the Open Inference Protocol v2, written from its specification, with faults on order.

Independent of vitdeploy: http.server, json and numpy. What a model computes is a function of the test.
"""

from __future__ import annotations

import json
import ssl
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import numpy as np

Array = np.ndarray[Any, Any]

DTYPES = {"FP32": np.dtype("<f4"), "FP64": np.dtype("<f8"), "FP16": np.dtype("<f2"), "UINT8": np.dtype("u1")}
EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration", "model_repository")


@dataclass
class Served:
    """A model: a function per version, and what the server says of it."""

    versions: dict[str, Callable[[Array], Any]]
    """Arrays in; an array or, of a model that takes files, a dict of them out."""
    input: tuple[str, str, list[int]] = ("pixel_values", "FP32", [-1, 3, 8, 8])
    output: tuple[str, str, list[int]] = ("logits", "FP32", [-1, 5])
    labels: tuple[str, ...] = ()
    max_batch: int | None = 8
    parameters: dict[str, str] = field(default_factory=dict)
    ready: bool = True

    def function(self, version: str) -> tuple[str, Callable[[Array], Any]]:
        """The version that answers, and its function: the highest where none is named."""
        chosen = version or max(self.versions, key=int)
        return chosen, self.versions[chosen]


@dataclass
class V2Server:
    """A server in a thread of this process; a context manager."""

    models: dict[str, Served]
    name: str = "some-server"
    extensions: tuple[str, ...] = EXTENSIONS
    index: bool = True
    """Whether it has a repository index."""
    encodings: tuple[str, ...] = ("binary", "json")
    fault: str = ""
    """Of infer: error, close, half, slow, drip, html, garbage, liar, other-version, no-output."""
    predict: Callable[[bytes, str], Any] | None = None
    """What ``POST /v1/models/...:predict`` answers for a file and its media type."""
    tls: tuple[Path, Path] | None = None
    """Certificate and key."""
    port: int = 0
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """Paths and headers of all requests."""
    batches: list[tuple[str, int]] = field(default_factory=list)
    """Encoding and rows of every infer."""

    stopped: threading.Event = field(default_factory=threading.Event)
    """Set when it stops: until then a slow one keeps its callers waiting."""

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"app": self})
        self._http = _Quiet(("127.0.0.1", self.port), handler)
        self._http.daemon_threads = True
        if self.tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self.tls)
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self._http.shutdown()
        self._http.server_close()

    @property
    def url(self) -> str:
        return f"http{'s' * bool(self.tls)}://127.0.0.1:{self.port}"


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that hangs up is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    app: V2Server
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer goes out in one piece, or every call waits for an acknowledgement
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes) -> None:
        self.app.requests.append((self.path, dict(self.headers.items())))
        parts = self.path.partition("?")[0].strip("/").split("/")
        try:
            if parts[-1].endswith(":predict") and self.app.predict:
                kind = self.headers.get("Content-Type", "")
                self._send(200, json.dumps(self.app.predict(body, kind)).encode())
            elif parts == ["v2"]:
                about = {"name": self.app.name, "version": "1.0", "extensions": self.app.extensions}
                self._send(200, json.dumps(about).encode())
            elif parts == ["v2", "repository", "index"] and self.app.index:
                self._send(200, json.dumps(self._index()).encode())
            elif parts[:2] == ["v2", "models"]:
                self._model(parts[2:], body)
            else:
                raise LookupError("there is nothing here")
        except LookupError as error:
            self._send(404, json.dumps({"error": str(error.args[0])}).encode())
        except ValueError as error:
            self._send(400, json.dumps({"error": str(error)}).encode())

    def _index(self) -> list[dict[str, str]]:
        return [
            {
                "name": name,
                "version": version,
                "state": "READY" if model.ready else "UNAVAILABLE",
                "reason": "" if model.ready else "still loading",
            }
            for name, model in self.app.models.items()
            for version in model.versions
        ]

    def _model(self, parts: list[str], body: bytes) -> None:
        name, rest = parts[0], parts[1:]
        version = ""
        if rest[:1] == ["versions"]:
            version, rest = rest[1], rest[2:]
        model = self.app.models.get(name)
        if model is None or (version and version not in model.versions):
            raise LookupError(f"unknown model {name} {version}")
        if not rest:
            self._send(200, json.dumps(self._metadata(name, model)).encode())
        elif rest == ["config"] and model.max_batch is not None:
            parameters = {key: {"string_value": value} for key, value in model.parameters.items()}
            said = {"name": name, "max_batch_size": model.max_batch, "parameters": parameters}
            self._send(200, json.dumps(said).encode())
        elif rest == ["infer"]:
            self._infer(name, model, version, body)
        else:
            raise LookupError("no such thing of a model")

    def _metadata(self, name: str, model: Served) -> dict[str, Any]:
        inputs, outputs = (
            [{"name": label, "datatype": kind, "shape": shape}]
            for label, kind, shape in (model.input, model.output)
        )
        versions = list(model.versions)
        return {"name": name, "versions": versions, "platform": "x", "inputs": inputs, "outputs": outputs}

    def _infer(self, name: str, model: Served, version: str, body: bytes) -> None:
        length = self.headers.get("Inference-Header-Content-Length")
        encoding = "json" if length is None else "binary"
        if encoding not in self.app.encodings:
            raise ValueError(f"{encoding} tensors are not supported")
        head = len(body) if length is None else int(length)
        request = json.loads(body[:head])
        array = read_tensor(request["inputs"][0], body[head:])
        self.app.batches.append((encoding, len(array)))
        if self.app.fault and self._misbehave():
            return
        if model.max_batch and len(array) > model.max_batch:
            raise ValueError(f"batch size {len(array)} exceeds {model.max_batch}")
        answered, function = model.function(version)
        outputs = function(array)
        outputs = outputs if isinstance(outputs, dict) else {model.output[0]: outputs}
        wanted = (request.get("outputs") or [{}])[0]
        count = wanted.get("parameters", {}).get("classification", 0)
        if count:
            outputs = {key: classes(value, count, model.labels) for key, value in outputs.items()}
        if self.app.fault == "other-version":
            answered = "99"
        said: dict[str, Any] = {"model_name": name, "model_version": answered, "outputs": []}
        raw = b""
        for key, value in outputs.items():
            kind, data = write_tensor(value)
            row = {"name": key, "datatype": kind, "shape": list(value.shape)}
            if encoding == "binary":
                row["parameters"] = {"binary_data_size": len(data) - 4 * (self.app.fault == "liar")}
                raw += data
            else:
                row["data"] = [v.decode() if isinstance(v, bytes) else v for v in value.reshape(-1).tolist()]
            if self.app.fault != "no-output":
                said["outputs"].append(row)
        text = json.dumps(said).encode()
        headers = {"Inference-Header-Content-Length": str(len(text))} if encoding == "binary" else {}
        self._send(200, text + (raw if encoding == "binary" else b""), headers)

    def _misbehave(self) -> bool:
        """Answer an infer wrongly, if that is the fault; else go on."""
        match self.app.fault:
            case "error":
                self._send(500, b'{"error": "the model is on fire"}')
            case "close":
                self.close_connection = True
            case "half":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b"{")
                self.close_connection = True
            case "slow":
                self.app.stopped.wait()
            case "drip":
                self.send_response(200)
                self.send_header("Content-Length", "100000")
                self.end_headers()
                while not self.app.stopped.wait(0.1):
                    self.wfile.write(b" ")
                    self.wfile.flush()
            case "html":
                self._send(502, b"<html><body>Bad Gateway</body></html>")
            case "garbage":
                self._send(200, b"\x00\xff not json")
            case _:
                return False
        return True

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)


def read_tensor(said: dict[str, Any], raw: bytes) -> Array:
    """The first input of a request."""
    shape = said["shape"]
    if said["datatype"] == "BYTES":
        found, at = [], 0
        while at < len(raw):
            (length,) = struct.unpack_from("<I", raw, at)
            found.append(raw[at + 4 : at + 4 + length])
            at += 4 + length
        array = np.empty(len(found), dtype=object)
        array[:] = found
        return array.reshape(shape)
    dtype = DTYPES[said["datatype"]]
    if "data" in said:
        return np.array(said["data"], dtype=dtype).reshape(shape)
    return np.frombuffer(raw, dtype=dtype).reshape(shape)


def write_tensor(array: Array) -> tuple[str, bytes]:
    """The datatype and the raw bytes of an output."""
    if array.dtype == object:
        return "BYTES", b"".join(struct.pack("<I", len(item)) + item for item in array.reshape(-1))
    kind = next(name for name, dtype in DTYPES.items() if dtype == array.dtype)
    return kind, array.tobytes()


def classes(scores: Array, count: int, labels: tuple[str, ...]) -> Array:
    """The classification extension: "score:index:label" of the best classes."""
    rows = []
    for row in scores:
        best = np.argsort(-row, kind="stable")[:count]
        texts = [f"{row[i]:f}:{i}" + (f":{labels[i]}" if labels else "") for i in best]
        rows.append([text.encode() for text in texts])
    return np.array(rows, dtype=object)
