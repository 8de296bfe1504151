"""HTTP connections without sockets, and an application whose requests a test holds in its hands."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any
from unittest import TestCase

from uvicorn import Config
from uvicorn.server import ServerState

from tests.helpers.live_server import PATIENCE
from vitdeploy.server.connections import BoundedHttpProtocol
from vitdeploy.server.service import RequestLimits

LIMITS = RequestLimits(head_bytes=4096, head_seconds=2.0)


class Transport(asyncio.Transport):
    """As strict as uvloop's, and closed the moment that it is asked to be."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: Any) -> None:
        if self.closed:
            raise RuntimeError(
                "unable to perform operation on <Transport closed=True>; the handler is closed"
            )
        self.written += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class Server:
    """Protocols, and an application whose requests do what their path says."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.told: list[str] = []
        """Those that heard that their client left."""
        self.may_answer = asyncio.Event()
        self.state = ServerState()
        self.config = Config(
            self._answer,
            interface="asgi3",
            ws="none",
            proxy_headers=False,
            lifespan="off",
            timeout_keep_alive=75,
            log_config=None,
        )

    def protocol(self) -> BoundedHttpProtocol:
        return BoundedHttpProtocol(self.config, self.state, {}, limits=LIMITS)

    def connected(self) -> tuple[BoundedHttpProtocol, Transport]:
        made, transport = self.protocol(), Transport()
        made.connection_made(transport)
        return made, transport

    async def over(self) -> None:
        """Let every request end."""
        self.may_answer.set()
        await self.until(lambda: not self.state.tasks)

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            await asyncio.sleep(0)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        self.begun.append(path)
        if path == "/listens":
            while (await receive())["type"] != "http.disconnect":
                pass
            self.told.append(path)
        if path != "/halves":
            await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await self.may_answer.wait()
        await send({"type": "http.response.body", "body": b"ok"})


def run(
    test: Callable[[Server], Awaitable[None]],
    loop: Callable[[], Any] | None = None,
) -> None:
    """Run it; no request may fail."""

    async def main() -> None:
        async with asyncio.timeout(PATIENCE):
            await test(Server())

    with TestCase().assertNoLogs(level=logging.ERROR), asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())
