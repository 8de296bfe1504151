"""Talks to a v2 server through NVIDIA's tritonclient, which only this file imports."""

from __future__ import annotations

import importlib
import json
import socket
import ssl
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vitdeploy.backends.base import Array
from vitdeploy.errors import MissingDependency, ServerError, UsageError, VitdeployError
from vitdeploy.verification.live.client import (
    Address,
    AnswerError,
    Client,
    IndexEntry,
    InferResult,
    ModelFacts,
    ServerFacts,
    read_index,
    read_model,
    read_server,
)

_T = TypeVar("_T")

_STATUS = {
    "INVALID_ARGUMENT": 400,
    "OUT_OF_RANGE": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "FAILED_PRECONDITION": 400,
    "RESOURCE_EXHAUSTED": 429,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
}
"""HTTP statuses of gRPC's codes, as google.rpc.Code has them; all others are 500."""

_NETWORK = (
    "failed to connect",
    "connection",
    "socket",
    "handshake",
    "dns",
    "name resolution",
    "errors resolving",
    "domain name",
    "unreachable",
    "http1",
    "http2",
    "stream removed",
    "rst_stream",
    "goaway",
    "recvmsg",
    "broken pipe",
    "endpoint closing",
    "transport",
)
"""Words with which gRPC itself says that nobody answered; a server's own errors have the same codes."""


def connect(
    address: Address, *, timeout: float, headers: Mapping[str, str], ca: Path | None = None
) -> Client:
    """A client of the server at ``address``. Nothing is sent yet.

    Args:
        timeout: seconds for each call, all of it.
        headers: sent with every call; of gRPC its metadata.
        ca: a PEM file with the certificates to trust; the system's where it is None.

    Raises:
        MissingDependency: tritonclient is not installed.
        UsageError: ``ca`` cannot be read.
    """
    if ca is not None:
        try:
            ssl.create_default_context(cafile=ca)
        except (OSError, ssl.SSLError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"--ca-cert {ca}: has no certificates that can be read ({reason})") from error
    kind = HttpClient if address.protocol == "http" else GrpcClient
    return kind(address, timeout, headers, ca)


def _library(name: str) -> Any:
    """A module of tritonclient or of what it stands on."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: installed without this protocol
        raise MissingDependency("tritonclient", extra="client", purpose="talking to a live server") from error


class _TritonClient(Client):
    """What both protocols have in common: they differ in keywords, and in how they fail."""

    def __init__(self, address: Address, timeout: float, headers: Mapping[str, str], ca: Path | None) -> None:
        super().__init__(address)
        self.timeout = timeout
        self._headers = headers
        self._library = _library(f"tritonclient.{address.protocol}")
        self._failure: type[Exception] = _library("tritonclient.utils").InferenceServerException
        self._client = self._guard(lambda: self._connect(ca))

    def server(self) -> ServerFacts:
        return read_server(self._call("get_server_metadata"))

    def index(self) -> tuple[IndexEntry, ...] | None:
        try:
            return read_index(self._call("get_model_repository_index"))
        except AnswerError:  # an extension that few servers have
            return None

    def model(self, name: str, version: str) -> ModelFacts:
        said = self._call("get_model_metadata", name, version)
        try:
            configuration = self._call("get_model_config", name, version)
        except AnswerError:  # an extension too
            configuration = {}
        return read_model(said, configuration)

    def infer(
        self,
        name: str,
        version: str,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] = (),
        *,
        as_json: bool = False,
        classes: int = 0,
    ) -> InferResult:
        numpy_name = _library("tritonclient.utils").np_to_triton_dtype
        begin = time.perf_counter()
        tensors = []
        for key, array in inputs.items():
            tensor = self._library.InferInput(key, list(array.shape), numpy_name(array.dtype))
            tensor.set_data_from_numpy(array, **self._binary(not as_json))
            tensors.append(tensor)
        how = self._binary(not as_json)
        asked = [self._library.InferRequestedOutput(key, class_count=classes, **how) for key in outputs]
        result = self._call("infer", name, tensors, version, asked or None, as_message=True)
        names, answered = self._guard(lambda: self._answered(result))
        arrays = self._guard(lambda: {key: result.as_numpy(key) for key in names})
        seconds = time.perf_counter() - begin
        if broken := [key for key, array in arrays.items() if not isinstance(array, np.ndarray)]:
            raise AnswerError(f"the output {broken[0]!r} has no data")
        return InferResult(arrays, answered, seconds)

    def close(self) -> None:
        self._client.close()

    def _call(self, method: str, *arguments: Any, as_message: bool = False) -> Any:
        return self._guard(lambda: self._send(getattr(self._client, method), arguments, as_message))

    def _guard(self, work: Callable[[], _T]) -> _T:
        """Run something of tritonclient; whatever it raises becomes an error of ours."""
        try:
            return work()
        except (VitdeployError, AnswerError):
            raise
        except self._failure as error:
            raise self._of_server(error) from error
        except Exception as error:
            raise self._of_network(error) from error

    def _unreachable(self, what: str, hint: str | None = None) -> ServerError:
        return ServerError(f"{self.address}: {what}", hint=hint)

    def _silent(self) -> ServerError:
        return self._unreachable(f"no answer within {self.timeout:g} s", hint="--timeout waits longer")

    def _of_network(self, error: Exception) -> Exception:
        """An error that is not one of the server's."""
        name = type(error).__name__
        if isinstance(error, ssl.SSLCertVerificationError):
            return self._unreachable(
                f"its certificate is not trusted: {error.verify_message}",
                hint="--ca-cert names whom to trust",
            )
        if isinstance(error, ssl.SSLError):
            return self._unreachable(f"no TLS with it: {_line(error)}", hint="without TLS it is http://")
        if isinstance(error, ConnectionRefusedError):
            return self._unreachable("nothing listens there (connection refused)")
        if isinstance(error, socket.gaierror):
            return self._unreachable(f"no such host: {self.address.host}")
        if isinstance(error, TimeoutError) or name == "Timeout":
            return self._silent()
        closed = name == "HTTPParseError" and any(w in str(error) for w in ("ncomplete", "closed"))
        if isinstance(error, ConnectionError) or name == "HTTPConnectionClosed" or closed:
            return self._unreachable("hung up before its answer was complete")
        if isinstance(error, OSError):
            return self._unreachable(f"cannot be reached: {error.strerror or _line(error)}")
        if name in ("HTTPParseError", "HTTPProtocolViolationError"):
            return self._unreachable("does not speak HTTP", hint="a gRPC server? then grpc://")
        return AnswerError(f"the answer is not of the v2 protocol: {_line(error)}")

    @abstractmethod
    def _connect(self, ca: Path | None) -> Any:
        """Tritonclient's own client."""

    @abstractmethod
    def _send(self, method: Callable[..., Any], arguments: tuple[Any, ...], as_message: bool) -> Any:
        """Call one of its methods, in time and with the headers."""

    @abstractmethod
    def _binary(self, yes: bool) -> dict[str, bool]:
        """How tensors are told to travel as bytes."""

    @abstractmethod
    def _answered(self, result: Any) -> tuple[list[str], str]:
        """The names of an answer's outputs, and the version that answered."""

    @abstractmethod
    def _of_server(self, error: Any) -> Exception:
        """An error that the server answered with."""


class HttpClient(_TritonClient):
    """HTTP, with tensors as JSON or as bytes behind it."""

    def _connect(self, ca: Path | None) -> Any:
        address, tls = self.address, {}
        if address.tls:
            secure = _library("gevent.ssl")
            tls = {"ssl": True, "ssl_context_factory": lambda: secure.create_default_context(cafile=ca)}
        return self._library.InferenceServerClient(
            f"{address.place}{address.base}",
            connection_timeout=self.timeout,
            network_timeout=self.timeout,
            **tls,
        )

    def _send(self, method: Callable[..., Any], arguments: tuple[Any, ...], as_message: bool) -> Any:
        # The client's own timeouts begin anew with every byte.
        with _library("gevent").Timeout(self.timeout, TimeoutError()):
            if as_message:
                name, tensors, version, outputs = arguments
                return method(name, tensors, version, outputs, headers=dict(self._headers))
            return method(*arguments, headers=dict(self._headers))

    def _binary(self, yes: bool) -> dict[str, bool]:
        return {"binary_data": yes}

    def _answered(self, result: Any) -> tuple[list[str], str]:
        said = result.get_response()
        return [output["name"] for output in said["outputs"]], str(said.get("model_version") or "")

    def _of_server(self, error: Any) -> Exception:
        status, body = error.status(), error.debug_details()
        if status is None:
            return AnswerError(f"the answer is not of the v2 protocol: {_line(error.message())}")
        if body is not None or not isinstance(error.message(), str):
            return AnswerError(f"HTTP {status}: {_line(_detail(body)) or 'without a word'}", int(status))
        return AnswerError(f"HTTP {status}: {_line(error.message())}", int(status))


class GrpcClient(_TritonClient):
    """gRPC."""

    def _connect(self, ca: Path | None) -> Any:
        tls = {"ssl": True, "root_certificates": None if ca is None else str(ca)} if self.address.tls else {}
        return self._library.InferenceServerClient(self.address.place, **tls)

    def _send(self, method: Callable[..., Any], arguments: tuple[Any, ...], as_message: bool) -> Any:
        common = {"headers": {k.lower(): v for k, v in self._headers.items()}, "client_timeout": self.timeout}
        if as_message:
            name, tensors, version, outputs = arguments
            return method(name, tensors, version, outputs, **common)
        return method(*arguments, as_json=True, **common)

    def _binary(self, yes: bool) -> dict[str, bool]:
        return {}

    def _answered(self, result: Any) -> tuple[list[str], str]:
        said = result.get_response()
        return [output.name for output in said.outputs], str(said.model_version)

    def _of_server(self, error: Any) -> Exception:
        code = str(error.status() or "").removeprefix("StatusCode.")
        text = _line(error.message() or "")
        folded = text.casefold()
        if code == "DEADLINE_EXCEEDED":
            return self._silent()
        if code in ("UNAVAILABLE", "UNKNOWN", "INTERNAL", "CANCELLED") and any(w in folded for w in _NETWORK):
            return self._of_channel(text, folded)
        if not code:
            return AnswerError(f"the answer is not of the v2 protocol: {text}")
        return AnswerError(f"{code}: {text}", _STATUS.get(code, 500))

    def _of_channel(self, text: str, folded: str) -> ServerError:
        if "refused" in folded:
            return self._unreachable("nothing listens there (connection refused)")
        if "dns" in folded or "name resolution" in folded or "domain name" in folded:
            return self._unreachable(f"no such host: {self.address.host}")
        if "http1" in folded or "http2" in folded or "settings frame" in folded:
            return self._unreachable("does not speak gRPC", hint="an HTTP server? then http://")
        if "handshake" in folded or "certificate" in folded:
            return self._unreachable(f"no TLS with it: {text}", hint="--ca-cert names whom to trust")
        if "failed to connect" in folded:
            return self._unreachable(f"cannot be reached: {text}")
        return self._unreachable("hung up before its answer was complete")


def _detail(body: object) -> str:
    """What a server that is no v2 server says for an error: KServe's and FastAPI's word is ``detail``."""
    text = str(body or "")
    try:
        said = json.loads(text)
    except ValueError:
        return "" if "<" in text else text  # a proxy's web page
    if isinstance(said, dict):
        said = said.get("error") or said.get("detail") or said.get("message") or said
    return str(said)


def _line(text: object) -> str:
    """One line, not too long."""
    line = " ".join(str(text).split())
    return line if len(line) <= 300 else f"{line[:300]}..."
