"""What a client asks and what it gets, whatever the transport: HTTP's and gRPC's codecs meet here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, Any]

ErrorKind = Literal[
    "invalid", "not found", "too slow", "too large", "timeout", "overloaded", "unavailable", "internal"
]
"""Why a request is refused; each transport has its own codes for them."""

_LONGEST = 500
"""Characters of a message: what a client sent may be part of it."""


class RequestError(Exception):
    """A request that gets an error for an answer.

    Args:
        kind: whose fault it is, and whether trying again may help.
        message: one line, for the client.
        retry_after: seconds after which trying again makes sense; None where it does not.
        param: the field of the request that is at fault, where the protocol tells it.
    """

    def __init__(
        self, kind: ErrorKind, message: str, *, retry_after: float | None = None, param: str | None = None
    ) -> None:
        message = " ".join(message[: 2 * _LONGEST].split())
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST - 3]}..."
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.retry_after = retry_after
        self.param = param


@dataclass(frozen=True)
class RequestedOutput:
    """An output that a client names."""

    name: str
    classes: int = 0
    """Send the likeliest this many classes as text, "score:index:label", instead of the tensor
    (the classification extension); 0 is the tensor."""
    binary: bool = False
    """HTTP: as raw bytes behind the JSON, not as JSON numbers."""


@dataclass(frozen=True)
class InferRequest:
    """Tensors to run."""

    inputs: Mapping[str, Array]
    """(n, ...) each, by name; not yet held against what the model takes."""
    requested: tuple[RequestedOutput, ...] = ()
    """Empty is every output."""
    binary: bool = False
    """HTTP: whether outputs go out as raw bytes where none is named."""
    id: str = ""
    timeout: float | None = None
    """Seconds within which the run must begin; None leaves it to the server."""
    image_size: str | None = None
    """As HxW, the one that is meant, where the shape of the inputs is that of several."""


@dataclass(frozen=True)
class InferResponse:
    """Tensors that came out."""

    model: str
    version: str
    outputs: Mapping[str, Array]
    """By name, those asked for; classes as (n, k) object arrays of bytes."""
    request: InferRequest = field(default_factory=lambda: InferRequest({}))
    parameters: Mapping[str, str] = field(default_factory=dict)
    """What else there is to say: ``image_size``, of several the one that ran."""

    def binary(self, name: str) -> bool:
        """HTTP: whether this output goes out as raw bytes."""
        return next(
            (output.binary for output in self.request.requested if output.name == name), self.request.binary
        )
