"""uvicorn's HTTP connections, with the head and the body of an answer in one packet.

uvicorn writes them apart. Of what a small answer costs, sending is the largest part: half as many packets,
and the client is woken once.
"""

from __future__ import annotations

import asyncio
from typing import Any

from vitdeploy.errors import MissingDependency

_HEAD = b"HTTP/1."


def protocol() -> type[asyncio.Protocol]:
    """What ``uvicorn.Config`` takes as ``http``.

    Raises:
        MissingDependency: uvicorn or httptools is not installed.
    """
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError as error:
        raise MissingDependency("httptools", extra="serve", purpose="serving") from error

    class Protocol(HttpToolsProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(_Together(transport))  # type: ignore[arg-type]

    return Protocol


class _Together:
    """A transport that keeps an answer's head until its body comes, or nothing more happens at once."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""

    def write(self, data: bytes) -> None:
        if not self._head and data.startswith(_HEAD):
            self._head = data
            asyncio.get_running_loop().call_soon(self._flush)
            return
        head, self._head = self._head, b""
        self._transport.write(head + data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        head, self._head = self._head, b""
        if head:
            self._transport.write(head)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
