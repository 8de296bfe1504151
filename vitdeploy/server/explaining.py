"""Attention rollouts of images, by a process beside the server that is started when somebody asks for one.

The server itself has no PyTorch and no model's code. What answers is a command that speaks JSON lines
(``vitdeploy.machine.child``); whoever starts the server says which.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vitdeploy.errors import BundleError, ImageError, MissingDependency, UsageError
from vitdeploy.images.fitting import rule_name
from vitdeploy.machine.child import Worker, WorkerFailure, child_environment
from vitdeploy.server.loading import ModelSettings
from vitdeploy.server.messages import ErrorKind, RequestError
from vitdeploy.server.served_model import ServedModel

MOST_WAITING = 16
"""Images, of all requests, that wait for a rollout or have theirs computed."""
_PATIENCE = 120.0
"""Seconds for one answer, PyTorch's start and a model's loading included; then the process is ended."""
_IDLE = 300.0
"""Seconds after which a process that nobody asks is ended, and its memory is free again."""

_CLOSING = "the server is shutting down"


@dataclass(frozen=True)
class Explained:
    """Where a model looks in one image."""

    rollout: list[list[float]]
    """Rows of patches: how much of each reaches what the model reads."""
    picture: str
    """The same over the image as the model is given it, as a data URL."""
    size: str
    """Of the image as the model is given it, "HxW"."""


class Explainer:
    """Asks the process, one image after the other. Lives on the event loop; ``close`` it there.

    Args:
        command: the process.
        settings: how images are read and get their size, and how long a request waits for its turn.
    """

    def __init__(self, command: Sequence[str], settings: ModelSettings) -> None:
        self._command, self._settings = command, settings
        self._turn = asyncio.Lock()
        self._worker: Worker | None = None
        self._waiting = 0
        self._closed = False
        self._idle: asyncio.TimerHandle | None = None
        self._ending: asyncio.Task[None] | None = None

    async def explain(self, model: ServedModel, images: Sequence[bytes]) -> list[Explained | ImageError]:
        """The rollout of each image; one that cannot be read has its error.

        Raises:
            RequestError: the model has none, too many wait, or it cannot be computed.
        """
        if model.bundle.manifest.model is None:
            raise RequestError(
                "invalid",
                f"model '{model.name}' is a module of somebody's own, a graph without parts that are known: "
                "there is no attention to show",
            )
        if len(images) > MOST_WAITING:
            raise RequestError(
                "invalid", f"{len(images)} images, but {MOST_WAITING} at a time can be explained"
            )
        with self._counted(len(images)):
            return [await self._explain(model, image) for image in images]

    @contextlib.contextmanager
    def _counted(self, images: int) -> Iterator[None]:
        if self._waiting + images > MOST_WAITING:
            raise RequestError("overloaded", f"{self._waiting} images wait to be explained", retry_after=1.0)
        self._waiting += images
        try:
            yield
        finally:
            self._waiting -= images

    async def _explain(self, model: ServedModel, image: bytes) -> Explained | ImageError:
        request = {
            "bundle": str(model.bundle.root.resolve()),
            "digest": model.bundle.manifest.digest,
            "fit": rule_name(self._settings.fit),
            "max_pixels": self._settings.max_pixels,
        }
        seconds = self._settings.timeout
        try:
            async with asyncio.timeout(seconds):
                await self._turn.acquire()
        except TimeoutError:
            raise RequestError("timeout", f"no rollout could be begun within {seconds:g} s") from None
        try:
            return Explained(**await self._asked(request, image))
        except WorkerFailure as failure:
            if isinstance(failure.__cause__, ImageError):
                return failure.__cause__
            raise self._refusal(failure, model.name) from failure
        finally:
            self._turn.release()

    async def _asked(self, request: dict[str, Any], image: bytes) -> dict[str, Any]:
        """What the process answers; who goes away meanwhile keeps the turn, as it answers one at a time."""
        work = asyncio.ensure_future(asyncio.to_thread(self._ask, request, image))
        try:
            return await asyncio.shield(work)
        finally:
            await asyncio.wait([work])
            work.exception()  # of one that nobody waits for
            self._rest()

    def _ask(self, request: dict[str, Any], image: bytes) -> dict[str, Any]:
        """In a thread, of which there is one at a time.

        Raises:
            WorkerFailure: there is no answer, or it is an error, which is the cause.
        """
        self._require_open()
        try:
            if self._worker is None:
                self._worker = Worker(self._command, {}, child_environment(), _PATIENCE, name="the rollout")
            self._require_open()  # again, so that nothing was started that nobody ends
            return self._worker.ask("rollout", **request, image=base64.b64encode(image).decode())
        except OSError as error:
            raise WorkerFailure(f"the rollout cannot be started: {error}", fatal=True) from error
        except WorkerFailure as failure:
            if failure.fatal:
                self._end()
            raise

    def _require_open(self) -> None:
        if self._closed:
            raise WorkerFailure(_CLOSING, fatal=True)

    def _end(self) -> None:
        """End the process, if there is one; the next request starts another. For who has the turn."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def _rest(self) -> None:
        """Set, or set again, when the process has been idle for long enough."""
        loop = asyncio.get_running_loop()
        if self._idle is not None:
            self._idle.cancel()
        self._idle = None if self._closed else loop.call_later(_IDLE, self._end_idle)

    def _end_idle(self) -> None:
        self._ending = asyncio.create_task(self._end_in_turn())

    async def _end_in_turn(self) -> None:
        async with self._turn:
            await asyncio.to_thread(self._end)

    def abandon(self) -> None:
        """Refuse every request that there is, and all that come."""
        self._closed = True
        if (worker := self._worker) is not None:
            worker.kill()

    async def close(self) -> None:
        """End the process; a request that it has in hand is refused."""
        self.abandon()
        if self._idle is not None:
            self._idle.cancel()
        await self._end_in_turn()

    def _refusal(self, failure: WorkerFailure, name: str) -> RequestError:
        if self._closed:
            return RequestError("unavailable", _CLOSING, retry_after=1.0)
        cause = failure.__cause__
        kind: ErrorKind = "internal"
        if isinstance(cause, UsageError):
            kind = "invalid"
        elif isinstance(cause, BundleError | MissingDependency) or failure.killed:
            kind = "unavailable"
        hint = getattr(cause, "hint", None)
        return RequestError(kind, f"model '{name}': {failure}{f' ({hint})' if hint else ''}")
