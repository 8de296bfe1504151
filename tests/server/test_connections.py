"""The head of a request: too slow, too long, or none at all."""

from __future__ import annotations

import http.client
import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.clock import Clock
from tests.helpers.http_connections import LIMITS, Server, run
from tests.helpers.live_server import PATIENCE, Live, serving

SECONDS = LIMITS.head_seconds
GET = b"GET /answers HTTP/1.1\r\nHost: x\r\n\r\n"
OK = b"HTTP/1.1 200 "
IMPATIENT = """
import sys
from vitdeploy.server.process import Endpoint, run_server
from vitdeploy.server.repository import parse_named_bundles
from vitdeploy.server.loading import ModelSettings
from vitdeploy.server.service import RequestLimits

endpoint = Endpoint(port=0, limits=RequestLimits(head_seconds=3))
run_server(parse_named_bundles(sys.argv[1:]), ModelSettings(), endpoint,
           started=lambda server: print("serving", server.url, file=sys.stderr, flush=True))
"""
"""A server that gives a client three seconds for a head; the command line's gives 30."""


def late(seconds: float) -> dict[str, str]:
    return {"error": f"the request's head did not arrive within {seconds:g} s"}


@pytest.mark.parametrize("before", [b"", GET])
def test_a_head_that_never_ends(before: bytes) -> None:
    clock = Clock()

    async def test(server: Server) -> None:
        server.may_answer.set()
        protocol, transport = server.connected()
        if before:  # a connection that was good once is not trusted for ever
            protocol.data_received(before)
            await clock.advance(2 * SECONDS)
            assert transport.written.startswith(OK)
            transport.written = b""
        protocol.data_received(b"POST /v2")
        await clock.advance(SECONDS - 1)
        protocol.data_received(b"/models/linear")  # what still comes does not win time
        await clock.advance(0.999)
        assert transport.written == b""
        assert not transport.closed
        await clock.advance(0.001)
        assert transport.written.startswith(b"HTTP/1.1 408 ")
        assert json.loads(transport.written.partition(b"\r\n\r\n")[2]) == late(SECONDS)
        assert transport.closed

    run(test, lambda: clock)


def test_a_connection_on_which_nothing_is_said() -> None:
    clock = Clock()

    async def test(server: Server) -> None:
        _, transport = server.connected()
        await clock.advance(SECONDS - 0.001)
        assert not transport.closed
        await clock.advance(0.001)
        assert transport.closed
        assert transport.written == b""

    run(test, lambda: clock)


def test_a_pause_between_two_requests_is_no_fault() -> None:
    clock = Clock()

    async def test(server: Server) -> None:
        server.may_answer.set()
        protocol, transport = server.connected()
        for _ in range(2):
            protocol.data_received(GET)
            await clock.advance(5 * SECONDS)
        protocol.data_received(GET[:10])
        await clock.advance(SECONDS - 0.001)
        protocol.data_received(GET[10:])
        await clock.advance(5 * SECONDS)
        assert transport.written.count(b"HTTP/1.1") == transport.written.count(OK) == 3
        assert not transport.closed

    run(test, lambda: clock)


def test_a_late_head_waits_behind_the_answer_before_it() -> None:
    clock = Clock()

    async def test(server: Server) -> None:
        protocol, transport = server.connected()
        protocol.data_received(GET + b"POST /v2")
        await clock.advance(3.5 * SECONDS)
        assert transport.written == b""
        server.may_answer.set()
        await clock.advance(0.0)
        assert transport.written.count(b"HTTP/1.1") == transport.written.count(OK) == 1
        await clock.advance(SECONDS)
        assert transport.written.count(b"HTTP/1.1 408 ") == 1
        assert transport.closed

    run(test, lambda: clock)


def test_nothing_is_said_on_a_connection_that_is_being_closed() -> None:
    """The server ends, and the answer before may still be on its way to the client."""
    clock = Clock()

    async def test(server: Server) -> None:
        server.may_answer.set()
        protocol, transport = server.connected()
        protocol.data_received(GET)
        await clock.advance(0.0)
        answered = transport.written
        assert answered.startswith(OK)
        protocol.data_received(b"POST /v2")
        protocol.shutdown()
        assert transport.closed
        await clock.advance(2 * SECONDS)
        assert transport.written == answered

    run(test, lambda: clock)


@pytest.fixture
def client(live: Live) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", live.port), PATIENCE) as made:
        yield made


def reply(client: socket.socket) -> tuple[int, object]:
    found = http.client.HTTPResponse(client)
    found.begin()
    return found.status, json.loads(found.read())


@pytest.mark.slow
def test_heads_that_never_end_over_sockets(linear: Path) -> None:
    """One that has begun is told; one that has not is only closed."""
    with (
        serving(linear, command=(sys.executable, "-c", IMPATIENT)) as server,
        socket.create_connection(("127.0.0.1", server.port), PATIENCE) as silent,
        socket.create_connection(("127.0.0.1", server.port), PATIENCE) as begun,
    ):
        begun.sendall(b"POST /v2")
        assert reply(begun) == (408, late(3))
        assert begun.recv(1) == silent.recv(1) == b""


def test_headers_without_end(live: Live, client: socket.socket) -> None:
    before = live.rss()
    client.sendall(b"GET /v2 HTTP/1.1\r\nX-Long: ")
    try:
        for _ in range(2000):
            client.sendall(b"x" * 1024)
    except OSError:
        pass  # the server has said what it has to say
    assert client.recv(1 << 16).startswith(b"HTTP/1.1 431 ")
    assert live.rss() - before < 16 * 1024


@pytest.mark.parametrize(
    "text", [b"nonsense\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9\r\n\r\n"]
)
def test_what_is_no_http(client: socket.socket, text: bytes) -> None:
    client.sendall(text)
    assert reply(client) == (400, {"error": "Invalid HTTP request received."})
    assert client.recv(1) == b""
