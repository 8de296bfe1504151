"""What a server of the Open Inference Protocol v2 looks like to its client, whatever carries the messages.

Where it is (``http://host:port/base``, ``grpc://host:port``, both with TLS too), what can be asked of it, and
what it says of itself and its models, of which nothing is trusted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import SplitResult, urlsplit

from vitdeploy.backends.base import Array
from vitdeploy.errors import UsageError, did_you_mean

Transport = Literal["http", "grpc"]

_SCHEMES: dict[str, tuple[Transport, bool, int | None]] = {
    "http": ("http", False, 80),
    "https": ("http", True, 443),
    "grpc": ("grpc", False, None),
    "grpcs": ("grpc", True, 443),
}
"""The protocol, whether with TLS, and the port where none is said."""


@dataclass(frozen=True)
class Address:
    """A parsed ``--url``."""

    protocol: Transport
    host: str
    """A name or an address; of IPv6 without brackets."""
    port: int
    base: str = ""
    """HTTP: the path in front of ``/v2``, beginning with a slash, or empty."""
    tls: bool = False

    @property
    def place(self) -> str:
        """``host:port``, with brackets around an IPv6 address."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.protocol}{'s' * self.tls}://{self.place}{self.base}"


def parse_address(url: str) -> Address:
    """Read a URL.

    Raises:
        UsageError: it is not one of a server; says what is wrong with it.
    """
    hint = "--url http://127.0.0.1:8000, or grpc://127.0.0.1:8001 (https and grpcs: with TLS)"
    scheme, separator, _ = url.partition("://")
    if not separator:
        raise UsageError(f"--url {url}: has no http:// or grpc:// in front", hint=hint)
    if scheme.lower() not in _SCHEMES:
        raise UsageError(
            f"--url {url}: unknown protocol {scheme!r}{did_you_mean(scheme, _SCHEMES)}", hint=hint
        )
    protocol, tls, port = _SCHEMES[scheme.lower()]
    try:
        parts = urlsplit(url)
        port = parts.port if parts.port is not None else port
    except ValueError as error:
        raise UsageError(f"--url {url}: {error}", hint=hint) from error
    base = parts.path.rstrip("/")
    if problem := _address_problem(parts, protocol, port, base):
        raise UsageError(
            f"--url {parts._replace(netloc=parts.netloc.rpartition('@')[2]).geturl()}: {problem[0]}",
            hint=problem[1] or hint,
        )
    return Address(protocol, parts.hostname or "", port or 0, base, tls)


def _address_problem(
    parts: SplitResult, protocol: Transport, port: int | None, base: str
) -> tuple[str, str] | None:
    """What is wrong with a URL, and a hint where there is a better one than an example."""
    if not parts.hostname or any(c.isspace() for c in parts.netloc):
        return "names no host", ""
    if parts.username is not None:
        return "has a user name in it", 'pass credentials as --header "Authorization: ..."'
    if parts.query or parts.fragment:
        return "has a query or fragment, which no server's address has", ""
    if port is None or port == 0:
        return "names no port", ""
    if protocol == "grpc" and base:
        return f"has a path ({base}), which gRPC does not know", ""
    if "v2" in base.split("/"):
        return "goes on after the server's address", "leave out /v2 and what follows; --model names the model"
    return None


class AnswerError(Exception):
    """The server answered, but with an error, or with what the protocol does not allow.

    Args:
        message: one line.
        status: HTTP's status, or the one that a gRPC code corresponds to; None of a broken answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status

    @property
    def refused(self) -> bool:
        """Whether the server blames the request, whenever it is sent."""
        return self.status is not None and 400 <= self.status < 500 and self.status not in (408, 429)


@dataclass(frozen=True)
class ServerFacts:
    """What a server says of itself."""

    name: str
    version: str
    extensions: tuple[str, ...] = ()


@dataclass(frozen=True)
class LiveTensor:
    """An input or output as a server describes it; -1 in ``shape`` varies."""

    name: str
    datatype: str
    """``"FP32"``."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelFacts:
    """What a server says of a model."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[LiveTensor, ...]
    outputs: tuple[LiveTensor, ...]
    max_batch: int | None = None
    """From its configuration; None where the server shows none, or batching is not configured there."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Of its metadata and its configuration."""

    @property
    def artifact(self) -> str | None:
        """The name of the bundle's artifact that it runs, where vitdeploy serves or packaged it."""
        return self.parameters.get("artifact") or self.parameters.get("vitdeploy_artifact")

    @property
    def digest(self) -> str | None:
        """The digest of the bundle it was made of, likewise."""
        return self.parameters.get("bundle_digest") or self.parameters.get("vitdeploy_bundle")

    @property
    def fit(self) -> str | None:
        """The rule by which it says that images get one of several sizes, likewise."""
        return self.parameters.get("fit") or self.parameters.get("vitdeploy_fit")

    @property
    def takes_image_files(self) -> bool:
        """Whether its one input is bytes."""
        return len(self.inputs) == 1 and self.inputs[0].datatype == "BYTES"


@dataclass(frozen=True)
class IndexEntry:
    """A version of a model in the server's repository."""

    name: str
    version: str
    ready: bool
    reason: str = ""
    """Why it is not ready."""


@dataclass(frozen=True)
class InferResult:
    """What one inference gave."""

    outputs: Mapping[str, Array]
    """BYTES tensors as object arrays of bytes."""
    version: str
    """Of the model that answered; empty where the server does not say."""
    seconds: float
    """From the call to the decoded answer, as a caller sees it."""


class Client(ABC):
    """A connection to one server; for one thread.

    Every method raises:
        ServerError: it cannot be reached, does not answer in time, hangs up, or does not speak the protocol.
        AnswerError: it answers with an error.
    """

    def __init__(self, address: Address) -> None:
        self.address = address

    @abstractmethod
    def server(self) -> ServerFacts:
        """What the server says of itself."""

    @abstractmethod
    def index(self) -> tuple[IndexEntry, ...] | None:
        """All models and versions; None where the server has no such list."""

    @abstractmethod
    def model(self, name: str, version: str) -> ModelFacts:
        """What it says of a model; an empty ``version`` is the server's choice."""

    @abstractmethod
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
        """Run a model.

        Args:
            inputs: arrays as they go out; bytes as object arrays.
            outputs: those that are asked for; none named is all.
            as_json: numbers as JSON instead of bytes; HTTP only.
            classes: ask for the likeliest this many as text instead of the tensor; 0 is the tensor.
        """

    @abstractmethod
    def close(self) -> None:
        """Hang up."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_server(said: Any) -> ServerFacts:
    """The answer to ``GET /v2``.

    Raises:
        AnswerError: it is no such answer.
    """
    name = _mapping(said, "its metadata").get("name")
    if not isinstance(name, str):
        raise AnswerError("its metadata has no name")
    extensions = said.get("extensions")
    extensions = tuple(map(str, extensions)) if isinstance(extensions, list) else ()
    return ServerFacts(name, str(said.get("version") or ""), extensions)


def read_index(said: Any) -> tuple[IndexEntry, ...]:
    """A repository's index: over HTTP a list, over gRPC one inside of an object.

    Raises:
        AnswerError: it is no index.
    """
    rows = said.get("models", []) if isinstance(said, Mapping) else said
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) and "name" in row for row in rows):
        raise AnswerError("its repository index is not a list of models")
    return tuple(
        IndexEntry(
            name=str(row["name"]),
            version=str(row.get("version") or ""),
            ready=row.get("state") == "READY",
            reason=str(row.get("reason") or ""),
        )
        for row in rows
    )


def read_model(said: Any, configuration: Any) -> ModelFacts:
    """A model's metadata, and its configuration where there is one (empty where not).

    Raises:
        AnswerError: the metadata is none.
    """
    said = _mapping(said, "the model's metadata")
    versions = said.get("versions")
    configuration = configuration if isinstance(configuration, Mapping) else {}
    configuration = configuration.get("config", configuration)  # gRPC wraps it
    return ModelFacts(
        name=str(said.get("name") or ""),
        versions=tuple(map(str, versions)) if isinstance(versions, list) else (),
        platform=str(said.get("platform") or ""),
        inputs=_tensors(said.get("inputs"), "input"),
        outputs=_tensors(said.get("outputs"), "output"),
        max_batch=_max_batch(configuration),
        parameters={**_parameters(configuration), **_parameters(said)},
    )


def _mapping(said: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(said, Mapping):
        raise AnswerError(f"{what} is not a JSON object")
    return said


def _tensors(rows: Any, kind: str) -> tuple[LiveTensor, ...]:
    try:
        return tuple(
            LiveTensor(str(row["name"]), str(row["datatype"]), tuple(int(n) for n in row.get("shape") or ()))
            for row in rows or ()
        )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise AnswerError(f"the model's metadata describes its {kind}s in a way of its own") from error


def _max_batch(configuration: Any) -> int | None:
    try:
        size = int(configuration["max_batch_size"])
    except (KeyError, OverflowError, TypeError, ValueError):
        return None
    return size if size > 0 else None


def _parameters(said: Any) -> dict[str, str]:
    """Those of our own metadata, or of a configuration, where each has a ``string_value``."""
    parameters = said.get("parameters") if isinstance(said, Mapping) else None
    if not isinstance(parameters, Mapping):
        return {}
    return {
        str(key): str(value.get("string_value", "") if isinstance(value, Mapping) else value)
        for key, value in parameters.items()
    }
