"""Connections that end while requests are in hand: who is told, who never begins, what is still written."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
import uvloop

from tests.helpers.http_connections import LIMITS, Server, run
from vitdeploy.server.connections import BoundedHttpProtocol

GARBAGE = [b"nonsense\r\n\r\n"]
ENDLESS = [b"GET /v2 HTTP/1.1\r\nX-Long: ", b"x" * (LIMITS.head_bytes + 1)]
ENDS = {"garbage": (GARBAGE, b"HTTP/1.1 400 "), "an endless head": (ENDLESS, b"HTTP/1.1 431 ")}
end = pytest.mark.parametrize("chunks, refusal", ENDS.values(), ids=list(ENDS))
queued = pytest.mark.parametrize("behind", [b"", b"GET /queued HTTP/1.1\r\n\r\n"], ids=["alone", "queue"])


def receive_all(protocol: BoundedHttpProtocol, chunks: Sequence[bytes]) -> None:
    for chunk in chunks:
        protocol.data_received(chunk)


@end
@queued
@pytest.mark.parametrize("path", ["/answers", "/listens"])
def test_a_refusal_behind_a_request(path: str, behind: bytes, chunks: list[bytes], refusal: bytes) -> None:
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

    run(test)


@queued
@pytest.mark.parametrize("path", ["/answers", "/listens"])
@pytest.mark.parametrize("why", [None, ConnectionResetError()], ids=["closed", "reset"])
def test_a_client_that_leaves(path: str, behind: bytes, why: Exception | None) -> None:
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

    run(test)


@queued
@pytest.mark.parametrize("chunks", [[], GARBAGE], ids=["leaves", "garbage"])
def test_a_client_that_takes_no_answers(behind: bytes, chunks: list[bytes]) -> None:
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

    run(test)


@end
def test_half_an_answer_is_not_followed_by_a_refusal(chunks: list[bytes], refusal: bytes) -> None:
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

    run(test)


def test_what_is_answered_is_not_held_against_the_next() -> None:
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

    run(test)


@queued
def test_garbage_behind_a_request_over_a_socket(behind: bytes) -> None:
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

    run(test, uvloop.new_event_loop)
