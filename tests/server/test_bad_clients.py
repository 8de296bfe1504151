"""Clients that are slow, vanish, or only sit there."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc

from tests.helpers.bundles import answer
from tests.helpers.live_server import PATIENCE, Live, binary_request, logits_of, serving
from tests.helpers.processes import wait_for

INFER = "/v2/models/linear/infer"
FULL = np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)
PIXELS = FULL[:2]
GATHERING = ("--max-batch", 8, "--max-delay-ms", 60_000, "--timeout", "2m")
"""Requests wait until there are eight images, so that one that is to be cancelled does not run before."""
BODY_SECONDS = 1.0
IMPATIENT = f"""
import sys
from vitdeploy.server.process import Endpoint, run_server
from vitdeploy.server.repository import parse_named_bundles
from vitdeploy.server.loading import ModelSettings
from vitdeploy.server.service import RequestLimits

endpoint = Endpoint(port=0, limits=RequestLimits(body_seconds={BODY_SECONDS}))
run_server(parse_named_bundles(sys.argv[1:]), ModelSettings(), endpoint,
           started=lambda server: print("serving", server.url, file=sys.stderr, flush=True))
"""
"""A server that gives a client one second for a body; the command line's has 30."""


@pytest.fixture(scope="module")
def shared_impatient(linear: Path) -> Iterator[Live]:
    with serving(linear, command=(sys.executable, "-c", IMPATIENT)) as server:
        yield server


@pytest.fixture
def impatient(shared_impatient: Live) -> Iterator[Live]:
    with shared_impatient.watched() as server:
        yield server


@pytest.fixture(scope="module")
def shared_gathering(linear: Path) -> Iterator[Live]:
    with serving(linear, *GATHERING) as server:
        yield server


@pytest.fixture
def gathering(shared_gathering: Live) -> Iterator[Live]:
    """A server whose requests wait; its statistics are of the test at hand."""
    with shared_gathering.watched() as server:
        assert server.ask("POST", "/v2/repository/models/linear/load", b"{}").status == 200
        yield server


def require_right(live: Live, pixels: np.ndarray[Any, Any] = PIXELS) -> None:
    """The server lives, said nothing of a crash, and answers rightly."""
    live.require_well()
    request = binary_request(pixels)
    reply = live.ask("POST", INFER, request.body, **request.headers)
    assert np.allclose(logits_of(reply), answer(pixels), rtol=1e-4, atol=1e-4)


def head(length: int | str, path: str = INFER, extra: str = "") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{extra}\r\n".encode()


def connected(live: Live) -> socket.socket:
    return socket.create_connection(("127.0.0.1", live.port), PATIENCE)


def reset(connection: socket.socket) -> None:
    """Close at once, without a goodbye."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.slow
@pytest.mark.parametrize("path", [INFER, "/v1/models/linear:predict", "/v2/repository/index"])
def test_a_body_that_comes_one_byte_at_a_time(impatient: Live, path: str) -> None:
    with connected(impatient) as slow:
        slow.sendall(head(1000, path))
        over = threading.Event()

        def trickle() -> None:
            while not over.wait(0.2):
                try:
                    slow.sendall(b"x")
                except OSError:
                    return

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            require_right(impatient)  # nobody else waits
            reply = http.client.HTTPResponse(slow)
            reply.begin()
            error = json.loads(reply.read())
        finally:
            over.set()
            thread.join()
    assert (reply.status, error) == (408, {"error": "the body did not arrive within 1 s"})
    require_right(impatient)


@pytest.mark.parametrize("part", [0, 1, 100, 1000])
def test_clients_that_vanish_while_they_send(live: Live, part: int) -> None:
    body = binary_request(PIXELS).body
    for leave in (socket.socket.close, reset):
        for _ in range(10):
            gone = connected(live)
            gone.sendall(head(len(body)) + body[:part])
            leave(gone)
    require_right(live)


@pytest.mark.slow
@pytest.mark.parametrize("behind", [b"", b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["one", "two"])
def test_clients_that_vanish_before_their_answer(gathering: Live, behind: bytes) -> None:
    """Their places in the queue are free again, nothing is logged, and they are counted."""
    before = cancelled(gathering)
    request = binary_request(PIXELS[:1])
    length = f"Inference-Header-Content-Length: {request.headers['Inference_Header_Content_Length']}\r\n"
    for leave in (socket.socket.close, reset):
        for _ in range(3):
            gone = connected(gathering)
            gone.sendall(head(len(request.body), extra=length) + request.body + behind)
            gathering.require_queued(1)
            leave(gone)
            gathering.require_queued(0)
    stats = gathering.ask("GET", "/v2/models/linear/stats").document["model_stats"][0]
    assert stats["inference_stats"]["success"]["count"] == 0
    assert stats["inference_stats"]["fail"]["count"] == 6
    assert stats["inference_count"] == 0
    assert cancelled(gathering) == before + 6
    require_right(gathering, FULL)


def cancelled(live: Live) -> float:
    """How many requests were given up by their clients, by the server's metrics."""
    begin = 'vitdeploy_requests_total{model="linear",outcome="cancelled",version="1"} '
    lines = live.ask("GET", "/metrics").body.decode().splitlines()
    return sum(float(line.removeprefix(begin)) for line in lines if line.startswith(begin))


def test_grpc_clients_that_cancel(gathering: Live) -> None:
    """And those whose channel breaks, or whose time is over: nothing runs for them, and nothing is logged."""
    tensor = tritonclient.grpc.InferInput("pixel_values", [2, 3, 8, 8], "FP32").set_data_from_numpy(PIXELS)

    def ask(client: tritonclient.grpc.InferenceServerClient, **how: float) -> Any:
        return client.async_infer("linear", [tensor], lambda result, error: None, **how)

    with tritonclient.grpc.InferenceServerClient(gathering.grpc) as client:
        calls = [ask(client) for _ in range(3)]
        gathering.require_queued(6)
        for call in calls:
            call.cancel()
        gathering.require_queued(0)
        ask(client, client_timeout=1.0)  # which may be over before the server hears of it
    with tritonclient.grpc.InferenceServerClient(gathering.grpc) as client:
        ask(client)
        assert wait_for(lambda: gathering.queued() >= 2, PATIENCE)
    gathering.require_queued(0)
    stats = gathering.ask("GET", "/v2/models/linear/stats").document["model_stats"][0]
    assert stats["inference_stats"]["fail"]["count"] in (4, 5)
    assert stats["inference_count"] == 0
    require_right(gathering, FULL)


@pytest.mark.parametrize("text", [
    b"GET\r\n\r\n",
    b"POST " + INFER.encode() + b" HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    head("12x"),
    head("1" * 30),
    head(10, extra="Content-Length: 11\r\n"),
    head(10, extra="Transfer-Encoding: chunked\r\n") + b"zz\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
], ids=range(11))  # fmt: skip
def test_no_http(live: Live, text: bytes) -> None:
    """An error or a closed connection."""
    with connected(live) as odd:
        try:
            odd.sendall(text)
            found = odd.recv(65536)
        except (ConnectionResetError, BrokenPipeError):
            found = b""
        assert not found or found.split()[1] in (b"200", b"400", b"413", b"431", b"501"), found
    require_right(live)


def test_chunked_bodies(live: Live) -> None:
    """Without a length announced they are read all the same, and limited all the same."""
    request = binary_request(PIXELS)
    extra = "\r\n".join(
        f"{name.replace('_', '-')}: {value}"
        for name, value in (
            *request.headers.items(),
            ("Transfer-Encoding", "chunked"),
            ("Connection", "close"),
        )
    )
    with connected(live) as client:
        client.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\n{extra}\r\n\r\n".encode())
        for begin in range(0, len(request.body), 100):
            piece = request.body[begin : begin + 100]
            client.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        client.sendall(b"0\r\n\r\n")
        text = b"".join(iter(lambda: client.recv(65536), b""))
    assert text.startswith(b"HTTP/1.1 200 ")


def test_clients_that_ask_before_they_send(live: Live) -> None:
    """``Expect: 100-continue``, as curl does with a large file: told to go on, or that it is for nothing."""
    request = binary_request(PIXELS)
    length = f"Inference-Header-Content-Length: {request.headers['Inference_Header_Content_Length']}\r\n"
    expect = f"{length}Expect: 100-continue\r\nConnection: close\r\n"
    with connected(live) as client:
        client.sendall(head(len(request.body), extra=expect))
        assert client.recv(1000).startswith(b"HTTP/1.1 100 ")
        client.sendall(request.body)
        assert b"".join(iter(lambda: client.recv(65536), b"")).startswith(b"HTTP/1.1 200 ")
    with connected(live) as client:
        client.sendall(head(2**40, extra=expect))
        assert client.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_an_endless_body_is_cut_off(strict: Live) -> None:
    with connected(strict) as client:
        client.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        before = strict.rss()
        piece = b"10000\r\n" + bytes(65536) + b"\r\n"
        for _ in range(64):
            client.sendall(piece)
        assert client.recv(65536).startswith(b"HTTP/1.1 413 ")
        assert strict.rss() - before < 64 * 1024
        require_right(strict)


def test_pipelined_requests_are_answered_in_order(live: Live) -> None:
    paths = ["/v2", "/v2/nothing", "/v2/models/linear", "/v2/models/nope", "/v2/health/live"] * 4
    text = b"".join(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for path in paths)
    text += b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with connected(live) as client:
        client.sendall(text)
        found = b"".join(iter(lambda: client.recv(65536), b""))
    statuses = [int(part[:3]) for part in found.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [200, 404, 200, 404, 200] * 4 + [200]


@pytest.mark.parametrize("protocol", ["websocket", "h2c"])
def test_an_offer_to_speak_another_protocol(live: Live, protocol: str) -> None:
    """The server goes on as if it were not there, and says nothing of it."""
    offer = f"Connection: upgrade\r\nUpgrade: {protocol}\r\nSec-WebSocket-Version: 13\r\n"
    with connected(live) as client:
        for extra in (offer, "", offer):
            client.sendall(f"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n{extra}\r\n".encode())
            reply = http.client.HTTPResponse(client)
            reply.begin()
            assert (reply.status, json.loads(reply.read())) == (200, {"live": True})
    assert live.said() == ""


@pytest.mark.slow
def test_hundreds_of_idle_connections(live: Live) -> None:
    """Silent ones, and ones that began to say something; the others are served as ever."""
    idle = [connected(live) for _ in range(400)]
    try:
        for number, connection in enumerate(idle):
            connection.sendall((b"", b"POST /v2", head(100), head(100) + b"x" * 50)[number % 4])
        for _ in range(20):
            require_right(live)
    finally:
        for number, connection in enumerate(idle):
            (reset if number % 2 else socket.socket.close)(connection)
    require_right(live)


def test_a_client_that_does_not_read_its_answers(live: Live) -> None:
    """Others do not wait for it."""
    with connected(live) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.settimeout(1)
        try:
            for _ in range(2000):
                deaf.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
        except TimeoutError:
            pass
        for _ in range(10):
            require_right(live)
    require_right(live)
