"""Connections that end while requests are in hand: who is told, who never begins, what is still written."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import uvloop
from uvicorn import Config
from uvicorn.server import ServerState

from vitdeploy.server.connections import BoundedHttpProtocol
from vitdeploy.server.service import RequestLimits

MOST = 4096
GARBAGE = [b"nonsense\r\n\r\n"]
ENDLESS = [b"GET /v2 HTTP/1.1\r\nX-Long: ", b"x" * (MOST + 1)]
ENDS = {"garbage": (GARBAGE, b"HTTP/1.1 400 "), "an endless head": (ENDLESS, b"HTTP/1.1 431 ")}
end = pytest.mark.parametrize("chunks, refusal", ENDS.values(), ids=list(ENDS))
queued = pytest.mark.parametrize("behind", [b"", b"GET /queued HTTP/1.1\r\n\r\n"], ids=["alone", "queue"])
Test = Callable[["Server"], Any]


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
            log_config=None,
        )

    def protocol(self) -> BoundedHttpProtocol:
        return BoundedHttpProtocol(self.config, self.state, {}, limits=RequestLimits(head_bytes=MOST))

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
            await asyncio.sleep(0.001)

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


def run(test: Test, caplog: pytest.LogCaptureFixture, loop: Callable[[], Any] | None = None) -> None:
    """Run it; no request may fail."""

    async def main() -> None:
        async with asyncio.timeout(60):
            await test(Server())

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def receive_all(protocol: BoundedHttpProtocol, chunks: Sequence[bytes]) -> None:
    for chunk in chunks:
        protocol.data_received(chunk)


@end
@queued
@pytest.mark.parametrize("path", ["/answers", "/listens"])
def test_a_refusal_behind_a_request(
    path: str, behind: bytes, chunks: list[bytes], refusal: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """The transport is closed, and nobody has called ``connection_lost`` yet."""

    async def test(server: Server) -> None:
        protocol, transport = server.connected()
        protocol.data_received(f"GET {path} HTTP/1.1\r\n\r\n".encode())
        await server.until(lambda: server.begun)
        receive_all(protocol, [behind + chunks[0], *chunks[1:]])
        assert transport.closed
        await server.over()
        assert server.begun == [path]
        assert server.told == [path] * (path == "/listens")
        assert transport.written.startswith(refusal)
        assert transport.written.count(b"HTTP/1.1") == 1
        protocol.connection_lost(None)

    run(test, caplog)


@queued
@pytest.mark.parametrize("path", ["/answers", "/listens"])
@pytest.mark.parametrize("why", [None, ConnectionResetError()], ids=["closed", "reset"])
def test_a_client_that_leaves(
    path: str, behind: bytes, why: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    """The request in hand hears of it, although another one came after it."""

    async def test(server: Server) -> None:
        protocol, transport = server.connected()
        protocol.data_received(f"GET {path} HTTP/1.1\r\n\r\n".encode() + behind)
        await server.until(lambda: server.begun)
        transport.close()
        protocol.connection_lost(why)
        await server.over()
        assert server.begun == [path]
        assert server.told == [path] * (path == "/listens")
        assert transport.written == b""

    run(test, caplog)


@queued
@pytest.mark.parametrize("chunks", [[], GARBAGE], ids=["leaves", "garbage"])
def test_a_client_that_takes_no_answers(
    behind: bytes, chunks: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """An answer waits until there is room, for which there is no more reason once the connection ends."""

    async def test(server: Server) -> None:
        protocol, transport = server.connected()
        protocol.pause_writing()
        server.may_answer.set()
        protocol.data_received(b"GET /answers HTTP/1.1\r\n\r\n" + behind)
        await server.until(lambda: server.begun)
        if chunks:
            receive_all(protocol, chunks)
        else:
            transport.close()
            protocol.connection_lost(None)
        try:
            await server.over()
        finally:
            protocol.resume_writing()  # so that a failure does not hang
        assert server.begun == ["/answers"]
        assert b"HTTP/1.1 200" not in transport.written

    run(test, caplog)


@end
def test_half_an_answer_is_not_followed_by_a_refusal(
    chunks: list[bytes], refusal: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """The client would take it for the answer's body."""

    async def test(server: Server) -> None:
        protocol, transport = server.connected()
        protocol.data_received(b"GET /halves HTTP/1.1\r\n\r\n")
        await server.until(lambda: transport.written)
        half = transport.written
        assert half.startswith(b"HTTP/1.1 200 ")
        receive_all(protocol, chunks)
        assert transport.closed
        await server.over()
        assert transport.written == half

    run(test, caplog)


def test_what_is_answered_is_not_held_against_the_next(caplog: pytest.LogCaptureFixture) -> None:
    """Requests one after the other and in a queue are all answered, and then garbage is refused."""

    async def test(server: Server) -> None:
        protocol, transport = server.connected()
        server.may_answer.set()
        for requests in (1, 3, 1):
            protocol.data_received(b"GET /answers HTTP/1.1\r\n\r\n" * requests)
            await server.until(lambda: not server.state.tasks)
        assert transport.written.count(b"HTTP/1.1 200 ") == 5
        receive_all(protocol, GARBAGE)
        assert transport.written.count(b"HTTP/1.1 400 ") == 1

    run(test, caplog)


@queued
def test_garbage_behind_a_request_over_a_socket(behind: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """uvloop's own transport: the request answers when the connection is gone."""

    async def test(server: Server) -> None:
        listening = await asyncio.get_running_loop().create_server(server.protocol, "127.0.0.1", 0)
        async with listening:
            reader, writer = await asyncio.open_connection(*listening.sockets[0].getsockname())
            writer.write(b"GET /answers HTTP/1.1\r\n\r\n")
            await server.until(lambda: server.begun)
            writer.write(behind + GARBAGE[0])
            assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
            await server.until(lambda: not server.state.connections)
            await server.over()
            assert server.begun == ["/answers"]
            writer.close()

    run(test, caplog, uvloop.new_event_loop)
