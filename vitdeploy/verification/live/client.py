"""What a server of the Open Inference Protocol v2 looks like from here, whatever carries the messages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np

from vitdeploy.verification.live.address import Address

Array = np.ndarray[Any, Any]


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


@dataclass(frozen=True)
class IndexEntry:
    """A version of a model in the server's repository."""

    name: str
    version: str
    ready: bool
    reason: str = ""
    """Why it is not ready."""


@dataclass(frozen=True)
class Answer:
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
        output: str | None = None,
        *,
        as_json: bool = False,
        classes: int = 0,
    ) -> Answer:
        """Run a model.

        Args:
            inputs: arrays as they go out; bytes as object arrays.
            output: the only one wanted; None is all.
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
