"""What every transport of a server shares."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from vitdeploy.errors import ImageError
from vitdeploy.server.explaining import Explained, Explainer
from vitdeploy.server.messages import InferRequest, InferResponse, RequestError
from vitdeploy.server.repository import ModelRepository
from vitdeploy.server.served_model import ServedModel
from vitdeploy.server.statistics import Metrics

EXTENSIONS = (
    *("binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics"),
    "parameters",
)
"""Of the v2 protocol, as Triton Inference Server names them."""


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What a client may send."""

    head_bytes: int = 64 * 2**10
    """Of one request's line and headers, where they come in more than one piece."""
    head_seconds: float = 30.0
    """For sending these, and for a new connection to begin."""
    body_bytes: int = 64 * 2**20
    """Of one request, compressed and decompressed."""
    body_seconds: float = 30.0
    """For sending one."""
    images: int = 64
    """Files of one request."""


@dataclass
class Service:
    """The models, the limits, and whether the server is on its way out."""

    repository: ModelRepository
    metrics: Metrics
    limits: RequestLimits = field(default_factory=RequestLimits)
    draining: bool = False
    control: bool = True
    """Whether clients may load and unload models."""
    explainer: Explainer | None = None
    """Shows where models look; None refuses that."""

    def require_open(self) -> None:
        """Raise a RequestError once the server is shutting down."""
        if self.draining:
            raise RequestError("unavailable", "the server is shutting down", retry_after=1.0)

    def require_control(self) -> None:
        """Raise a RequestError where clients may not change what is served."""
        if not self.control:
            raise RequestError("invalid", "this server's models are not for its clients to load and unload")

    async def infer(self, name: str, version: str, request: InferRequest) -> InferResponse:
        """Run a request on a model.

        Raises:
            RequestError: the model, the inputs, or the moment is wrong.
        """
        self.require_open()
        with self.repository.using(name, version) as model:
            return await model.infer(request)

    async def explain(self, model: ServedModel, images: Sequence[bytes]) -> list[Explained | ImageError]:
        """Where a model looks in each image; one that cannot be read has its error.

        Raises:
            RequestError: the model or the moment is wrong, or nobody may ask.
        """
        if self.explainer is None:
            raise RequestError("unavailable", "this server shows no attention rollouts (--no-explain)")
        return await self.explainer.explain(model, images)

    async def drain(self, seconds: float) -> bool:
        """Refuse what is new; wait until what was accepted is answered, this long at most.

        What still waits for a session then is refused, too; returns whether nothing was.
        """
        self.draining, complete = True, True
        for limit in (seconds, 1.0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit):
                    while self.repository.busy:
                        await asyncio.sleep(0.01)
            complete = complete and not self.repository.busy
            self.repository.abandon()
            if self.explainer is not None:
                self.explainer.abandon()
        return complete
