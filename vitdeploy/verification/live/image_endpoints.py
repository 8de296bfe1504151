"""Servers that take image files: our own ``:predict``, and packaged models that take them as v2 tensors."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np

from vitdeploy.errors import ServerError
from vitdeploy.verification.live.client import Address, AnswerError, Client, ModelFacts
from vitdeploy.verification.live.discovery import IMAGE_SUFFIX, LiveModel

_MOST_BYTES = 16 * 2**20
"""Of an answer; a thousand classes have some 100 KB."""


@dataclass(frozen=True)
class Scored:
    """A class that a server answers with."""

    label: str
    index: int | None
    """None where it gives names only."""
    score: float


@dataclass(frozen=True)
class ImageAnswer:
    """What a server says of one image."""

    classes: list[Scored]
    size: str | None = None
    """The image size that it took, as HxW; None where it does not say."""


class ImageEndpoint(Protocol):
    """Takes one image file."""

    @property
    def title(self) -> str:
        """For messages."""

    def ask(self, data: bytes, media_type: str, top_k: int) -> ImageAnswer:
        """Classify one image file; ``top_k`` is how many classes are asked for, which it may not follow.

        Raises:
            ServerError: the server cannot be asked.
            AnswerError: it answers with an error, or with something else than classes.
        """


@dataclass(frozen=True)
class PredictEndpoint:
    """``POST /v1/models/{name}:predict`` of ``vitdeploy serve``."""

    address: Address
    model: LiveModel
    timeout: float
    headers: Mapping[str, str]
    ca: Path | None = None

    @property
    def title(self) -> str:
        return f"{self.model.title} at :predict"

    @property
    def path(self) -> str:
        version = f"/versions/{quote(self.model.asked)}" if self.model.asked else ""
        return f"{self.address.base}/v1/models/{quote(self.model.name)}{version}:predict"

    def ask(self, data: bytes, media_type: str, top_k: int) -> ImageAnswer:
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

    def ask(self, data: bytes, media_type: str, top_k: int) -> ImageAnswer:
        tensor = self.model.inputs[0]
        shape = [1 if size == -1 else size for size in tensor.shape] or [1]
        array = np.empty(shape, dtype=object)
        array[...] = data
        outputs = self.client.infer(self.model.name, self.version, {tensor.name: array}).outputs
        if missing := [name for name in ("labels", "scores") if name not in outputs]:
            raise AnswerError(
                f"the answer lacks the output {missing[0]}; it has {', '.join(outputs) or 'none'}"
            )
        labels, scores = list(outputs["labels"].reshape(-1)), list(outputs["scores"].reshape(-1))
        indices = list(outputs["indices"].reshape(-1)) if "indices" in outputs else None
        if len(labels) != len(scores) or (indices is not None and len(indices) != len(scores)):
            raise AnswerError(f"the answer has {len(labels)} labels for {len(scores)} scores")
        classes = [
            Scored(_text(label), None if indices is None else int(indices[i]), float(scores[i]))
            for i, label in enumerate(labels)
        ]
        sizes = list(outputs["image_size"].reshape(-1)) if "image_size" in outputs else []
        return ImageAnswer(classes, _text(sizes[0])[:40] if sizes else None)


def find_endpoint(
    client: Client, model: LiveModel, timeout: float, headers: Mapping[str, str], ca: Path | None
) -> ImageEndpoint | str:
    """Where this server takes image files, or the reason why it is asked for none.

    Raises:
        ServerError: the server cannot be asked.
    """
    if model.facts.takes_image_files:
        return TensorEndpoint(client, model.facts, model.asked)
    if model.server.name == "vitdeploy":
        if client.address.protocol == "http":
            return PredictEndpoint(client.address, model, timeout, headers, ca)
        return "vitdeploy serve takes image files over HTTP only"
    name = f"{model.name}{IMAGE_SUFFIX}"
    if model.index is None or any(entry.name == name for entry in model.index):
        try:
            companion = client.model(name, "")
        except AnswerError as error:
            if model.index is not None:
                return f"{name} does not work: {error.message}"
        else:
            if companion.takes_image_files:
                return TensorEndpoint(client, companion, "")
            return f"{name} takes no image files"
    return f"the server has no {name} beside {model.name}, so nothing on it takes image files"


def read_predictions(said: Any) -> ImageAnswer:
    """The classes of the one image in an answer of ``:predict``, and its size.

    Raises:
        AnswerError: it is no such answer.
    """
    try:
        (rows,) = said["predictions"]
        classes = [Scored(str(row["label"]), int(row["index"]), float(row["score"])) for row in rows]
        sizes = list(said.get("image_sizes") or ())
        return ImageAnswer(classes, str(sizes[0])[:40] if sizes else None)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise AnswerError("the answer is not one list of label, index and score") from error


def _text(label: Any) -> str:
    return label.decode(errors="replace") if isinstance(label, bytes) else str(label)
