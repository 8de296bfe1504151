"""Servers that take image files: our own ``:predict``, and packaged models that take them as v2 tensors."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np

from vitdeploy.errors import ServerError
from vitdeploy.verification.live.address import Address
from vitdeploy.verification.live.client import AnswerError, Array, Client, ModelFacts
from vitdeploy.verification.live.target import IMAGE_SUFFIX, Target

_MOST_BYTES = 16 * 2**20
"""Of an answer; a thousand classes have some 100 KB."""


@dataclass(frozen=True)
class Scored:
    """A class that a server answers with."""

    label: str
    index: int | None
    """None where it gives names only."""
    score: float


class ImageEndpoint(Protocol):
    """Takes one image file."""

    @property
    def title(self) -> str:
        """For messages."""

    def ask(self, data: bytes, media_type: str, top_k: int) -> list[Scored]:
        """Classify one image file; ``top_k`` is how many classes are wanted, which it may not follow.

        Raises:
            ServerError: the server cannot be asked.
            AnswerError: it answers with an error, or with something else than classes.
        """


@dataclass(frozen=True)
class PredictEndpoint:
    """``POST /v1/models/{name}:predict`` of ``vitdeploy serve``."""

    address: Address
    target: Target
    timeout: float
    headers: Mapping[str, str]
    ca: Path | None = None

    @property
    def title(self) -> str:
        return f"{self.target.title} at :predict"

    @property
    def path(self) -> str:
        version = f"/versions/{quote(self.target.asked)}" if self.target.asked else ""
        return f"{self.address.base}/v1/models/{quote(self.target.name)}{version}:predict"

    def ask(self, data: bytes, media_type: str, top_k: int) -> list[Scored]:
        try:
            status, body = self._post(f"{self.path}?top_k={top_k}", data, media_type)
        except TimeoutError as error:
            raise self._lost(f"no answer within {self.timeout:g} s") from error
        except (ConnectionError, http.client.HTTPException) as error:
            raise self._lost("hung up before its answer was complete") from error
        except (OSError, socket.gaierror) as error:
            raise self._lost(f"cannot be reached: {error.strerror or error}") from error
        try:
            said = json.loads(body)
        except ValueError as error:
            raise AnswerError(f"HTTP {status}, and no JSON", status if status >= 400 else None) from error
        if status != 200:
            reason = said.get("error") if isinstance(said, dict) else said
            raise AnswerError(f"HTTP {status}: {' '.join(str(reason).split())[:300]}", status)
        return read_predictions(said)

    def _post(self, path: str, data: bytes, media_type: str) -> tuple[int, bytes]:
        address = self.address
        if address.tls:
            context = ssl.create_default_context(cafile=self.ca)
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                address.host, address.port, timeout=self.timeout, context=context
            )
        else:
            connection = http.client.HTTPConnection(address.host, address.port, timeout=self.timeout)
        end = time.monotonic() + self.timeout
        try:
            connection.request("POST", path, data, {"Content-Type": media_type, **self.headers})
            answer = connection.getresponse()
            body = bytearray()
            while chunk := answer.read1(2**16):
                body += chunk
                if len(body) > _MOST_BYTES:
                    raise AnswerError(f"the answer has more than {_MOST_BYTES} bytes")
                if time.monotonic() > end:
                    raise TimeoutError
            return answer.status, bytes(body)
        finally:
            connection.close()

    def _lost(self, what: str) -> ServerError:
        return ServerError(f"{self.address}: {what} (POST {self.path})")


@dataclass(frozen=True)
class TensorEndpoint:
    """A v2 model with one BYTES input; its outputs: ``labels``, ``scores`` and, not always, ``indices``."""

    client: Client
    model: ModelFacts
    version: str

    @property
    def title(self) -> str:
        return self.model.name

    def ask(self, data: bytes, media_type: str, top_k: int) -> list[Scored]:
        wanted = self.model.inputs[0]
        shape = [1 if size == -1 else size for size in wanted.shape] or [1]
        array = np.empty(shape, dtype=object)
        array[...] = data
        outputs = self.client.infer(self.model.name, self.version, {wanted.name: array}).outputs
        if missing := [name for name in ("labels", "scores") if name not in outputs]:
            there = ", ".join(outputs) or "none"
            raise AnswerError(f"the answer lacks the output {missing[0]}; it has {there}")
        labels = _row(outputs["labels"])
        scores, indices = _row(outputs["scores"]), _row(outputs["indices"]) if "indices" in outputs else None
        if len(labels) != len(scores) or (indices is not None and len(indices) != len(scores)):
            raise AnswerError(f"the answer has {len(labels)} labels for {len(scores)} scores")
        return [
            Scored(_text(label), None if indices is None else int(indices[i]), float(scores[i]))
            for i, label in enumerate(labels)
        ]


def find_endpoint(
    client: Client, target: Target, timeout: float, headers: Mapping[str, str], ca: Path | None
) -> ImageEndpoint | str:
    """Where this server takes image files, or the reason why it is asked for none.

    Raises:
        ServerError: the server cannot be asked.
    """
    if takes_images(target.model):
        return TensorEndpoint(client, target.model, target.asked)
    if target.server.name == "vitdeploy":
        if client.address.protocol == "http":
            return PredictEndpoint(client.address, target, timeout, headers, ca)
        return "vitdeploy serve takes image files over HTTP only"
    name = f"{target.name}{IMAGE_SUFFIX}"
    if target.index is None or any(entry.name == name for entry in target.index):
        try:
            model = client.model(name, "")
        except AnswerError as error:
            if target.index is not None:
                return f"{name} does not work: {error.message}"
        else:
            if takes_images(model):
                return TensorEndpoint(client, model, "")
            return f"{name} takes no image files"
    return f"the server has no {name} beside {target.name}, so nothing on it takes image files"


def takes_images(model: ModelFacts) -> bool:
    """Whether a v2 model's one input is bytes."""
    return len(model.inputs) == 1 and model.inputs[0].datatype == "BYTES"


def read_predictions(said: Any) -> list[Scored]:
    """The classes of the one image in an answer of ``:predict``.

    Raises:
        AnswerError: it is no such answer.
    """
    try:
        (rows,) = said["predictions"]
        return [Scored(str(row["label"]), int(row["index"]), float(row["score"])) for row in rows]
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise AnswerError("the answer is not one list of label, index and score") from error


def _row(array: Array) -> Sequence[Any]:
    return list(array.reshape(-1))


def _text(label: Any) -> str:
    return label.decode(errors="replace") if isinstance(label, bytes) else str(label)
