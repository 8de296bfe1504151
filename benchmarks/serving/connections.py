"""HTTP/1.1 connections that carry prepared requests, one in flight on each; whatever is more waits in order.

Needs the standard library only. A request is bytes that were put together beforehand, and an answer is not
looked at beyond its status and length: what the load itself costs has to stay small beside the server.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


class Exchange:
    """A request and, later, its answer.

    Args:
        request: whole, see :func:`whole_request`.
    """

    __slots__ = ("answer", "done", "due", "request", "sent", "status", "tag")

    def __init__(self, request: bytes, due: float, tag: int = 0) -> None:
        self.request = request
        self.due = due
        """As ``sent`` and ``done``, by ``time.monotonic``; 0 is not yet."""
        self.tag = tag
        """Whatever whoever asks wants to find again."""
        self.sent = 0.0
        self.done = 0.0
        self.status = 0
        """0 where there is no answer."""
        self.answer = b""
        """Head and body, where answers are kept."""


class Connections:
    """Up to ``most`` connections to one server; to be used on the running event loop.

    Args:
        finished: is called with each exchange that has its answer, or can have none.
        keep: whether the answers are kept.
    """

    def __init__(
        self, host: str, port: int, most: int, finished: Callable[[Exchange], None], *, keep: bool = False
    ) -> None:
        self._where, self._most, self._finished = (host, port), most, finished
        self._idle: list[_Connection] = []
        self._waiting: deque[Exchange] = deque()
        self._opening: set[asyncio.Task[Any]] = set()
        self._open = 0
        self.keep = keep

    def ask(self, exchange: Exchange) -> None:
        """Send a request as soon as a connection is free."""
        if self._idle:
            self._idle.pop().send(exchange)
        else:
            self._waiting.append(exchange)
            self._open_another()

    def free(self, connection: _Connection) -> None:
        """A connection can take a request."""
        if self._waiting:
            connection.send(self._waiting.popleft())
        else:
            self._idle.append(connection)

    def finish(self, exchange: Exchange, status: int) -> None:
        """An exchange is over."""
        exchange.done, exchange.status = time.monotonic(), status
        self._finished(exchange)

    def lost(self, connection: _Connection) -> None:
        """A connection is gone, perhaps with its request."""
        self._open -= 1
        if connection in self._idle:
            self._idle.remove(connection)
        if connection.exchange is not None:
            self.finish(connection.exchange, 0)
        if self._waiting:
            self._open_another()

    def _open_another(self) -> None:
        if self._open < self._most:
            self._open += 1
            loop = asyncio.get_running_loop()
            task = loop.create_task(loop.create_connection(lambda: _Connection(self), *self._where))
            self._opening.add(task)
            task.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task[Any]) -> None:
        self._opening.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._open -= 1
            if self._waiting:  # refused: that is an answer, too
                self.finish(self._waiting.popleft(), 0)


class _Connection(asyncio.Protocol):
    """A connection with one request in flight at most."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._buffer = bytearray()
        self._end = 0
        self._status = 0
        self._transport: Any = None
        self.exchange: Exchange | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._connections.free(self)

    def send(self, exchange: Exchange) -> None:
        """Send a request; none is in flight."""
        self.exchange = exchange
        exchange.sent = time.monotonic()
        self._transport.write(exchange.request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._end:
            head = self._buffer.find(b"\r\n\r\n")
            if head < 0:
                return
            length = _LENGTH.search(self._buffer, 0, head + 2)
            if length is None:
                raise ValueError(f"an answer without a length: {bytes(self._buffer[:head])!r}")
            self._status = int(self._buffer[9:12])
            self._end = head + 4 + int(length[1])
        if len(self._buffer) >= self._end:
            exchange, self.exchange = self.exchange, None
            assert exchange is not None, "an answer that nobody asked for"
            if self._connections.keep:
                exchange.answer = bytes(self._buffer)
            self._buffer.clear()
            self._end = 0
            self._connections.finish(exchange, self._status)
            self._connections.free(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._connections.lost(self)


def whole_request(host: str, port: int, path: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """A POST request with its head."""
    lines = [
        f"POST {path} HTTP/1.1",
        f"Host: {host}:{port}",
        *(f"{name}: {value}" for name, value in headers.items()),
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def whole_requests(job: Mapping[str, Any], bodies: list[bytes]) -> list[bytes]:
    """The requests of a job with ``host``, ``port``, ``path`` and ``headers``."""
    where = (job["host"], job["port"], job["path"], job["headers"])
    return [whole_request(*where, body) for body in bodies]
