"""HTTP connections: uvicorn's, with bounds on the head of a request, and every error in the protocol's shape.

The application only hears of a request once its head is whole, so what goes wrong before is answered here. A
body that comes together with its head is in the scope already, under ``WHOLE_BODY``.
"""

from __future__ import annotations

import asyncio
import http
from collections import deque
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from vitdeploy.server.service import RequestLimits

WHOLE_BODY = "vitdeploy.body"
"""Of an ASGI scope: all of the body, where nothing is to be waited for."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """What ``uvicorn.Config`` takes as ``http``, its limits bound."""

    _begun = False
    """Whether a head has begun and is not whole."""
    _length = 0
    """Bytes of that head so far, beyond those that came together with its first."""
    _expiry: asyncio.TimerHandle | None = None
    _fresh = False
    """Whether the application cannot have asked for anything of the newest request yet."""

    def __init__(self, *uvicorn: Any, limits: RequestLimits, **more: Any) -> None:
        super().__init__(*uvicorn, **more)
        self._limits = limits
        self._cycles: deque[RequestResponseCycle] = deque()
        """What is not answered yet, in the order of its arrival; answered ones in front go with the next."""

    # uvicorn narrows asyncio's BaseTransport in the same way.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._give_up()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._begun:
            self._length += len(data)
        super().data_received(data)
        self._fresh = False
        if not self._begun or self.transport.is_closing():
            return
        if self._length > self._limits.head_bytes:
            self._refuse(431, f"the request's head has more than {self._limits.head_bytes} bytes")
        elif self._expiry is None:
            self._wait_for_head()

    def on_message_begin(self) -> None:
        self._begun, self._length = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._begun = False
        self._stop_waiting()
        super().on_headers_complete()
        while self._cycles and self._cycles[0].response_complete:
            self._cycles.popleft()
        self._cycles.append(self.cycle)
        self._fresh = True

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self._fresh:
            self.scope[WHOLE_BODY] = bytes(self.cycle.body)  # type: ignore[literal-required]

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing is logged: an offer of another protocol is no fault; the request is answered."""

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _wait_for_head(self) -> None:
        self._expiry = self.loop.call_later(self._limits.head_seconds, self._expire)

    def _stop_waiting(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    def _give_up(self) -> None:
        """End what is not answered: requests in hand hear that the client left, queued ones never begin.

        uvicorn tells only the newest request, and only once the connection is lost. An older one would answer
        after that, and uvloop's transport, unlike asyncio's, raises when it is closed and written to.
        """
        self.pipeline.clear()
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self._cycles.clear()
        self.flow.resume_writing()  # for an answer that waits until there is room

    def _expire(self) -> None:
        if self.transport.is_closing():
            return  # there is an answer that the client has not taken yet, and nothing comes after it
        answered = getattr(self.cycle, "response_complete", True)  # there is none before the first request
        if not answered:
            self._wait_for_head()  # the answer to the request before this one goes first
        elif self._begun:
            self._refuse(408, f"the request's head did not arrive within {self._limits.head_seconds:g} s")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        self._stop_waiting()
        body = orjson.dumps({"error": message})
        lines = (
            f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
        )
        # Half an answer cannot be followed by another.
        if not any(cycle.response_started and not cycle.response_complete for cycle in self._cycles):
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self._give_up()
        self.transport.close()
