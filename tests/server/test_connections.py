"""The head of a request: too slow, too long, or none at all."""

from __future__ import annotations

import http.client
import json
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.live_server import Live, binary_request, serving

PATIENCE = 1.0
"""Seconds for a head; the command line's server gives 30."""
MOST = 4096
SOON = 8.0
GATHERING = 2.0
"""Seconds that an answer takes: longer than the patience."""
SERVER = f"""
import sys
from vitdeploy.server.served_model import ModelSettings
from vitdeploy.server.repository import parse_named_bundles
from vitdeploy.server.process import Endpoint, run_server
from vitdeploy.server.service import RequestLimits

run_server(parse_named_bundles(sys.argv[1:]), ModelSettings(max_batch=8, max_delay={GATHERING}),
      Endpoint(port=0, limits=RequestLimits(head_seconds={PATIENCE}, head_bytes={MOST})),
      started=lambda server: print("serving", server.url, file=sys.stderr, flush=True))
"""
LATE = (408, {"error": "the request's head did not arrive within 1 s"})
GET = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def impatient(linear: Path) -> Iterator[Live]:
    with serving(linear, command=(sys.executable, "-c", SERVER)) as server:
        yield server


@pytest.fixture
def client(impatient: Live) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", impatient.port), 30) as made:
        yield made


def reply(client: socket.socket) -> tuple[int, object]:
    found = http.client.HTTPResponse(client)
    found.begin()
    return found.status, json.loads(found.read())


def require_closed(client: socket.socket) -> None:
    assert client.recv(1) == b""


@pytest.mark.parametrize("before", [b"", GET])
def test_a_head_that_never_ends(client: socket.socket, before: bytes) -> None:
    if before:  # a connection that was good once is not trusted for ever
        client.sendall(before)
        assert reply(client) == (200, {"live": True})
    begin = time.perf_counter()
    client.sendall(b"POST /v2")
    time.sleep(0.5 * PATIENCE)
    client.sendall(b"/models/linear")  # what still comes does not win time
    assert reply(client) == LATE
    assert 0.5 * PATIENCE < time.perf_counter() - begin < PATIENCE + SOON
    require_closed(client)


def test_a_connection_on_which_nothing_is_said(client: socket.socket) -> None:
    begin = time.perf_counter()
    require_closed(client)
    assert 0.5 * PATIENCE < time.perf_counter() - begin < PATIENCE + SOON


def test_a_pause_between_two_requests_is_no_fault(client: socket.socket) -> None:
    for _ in range(2):
        client.sendall(GET)
        assert reply(client) == (200, {"live": True})
        time.sleep(1.5 * PATIENCE)
    client.sendall(GET[:10])
    time.sleep(0.2 * PATIENCE)
    client.sendall(GET[10:])
    assert reply(client) == (200, {"live": True})


def test_a_late_head_waits_behind_the_answer_before_it(client: socket.socket) -> None:
    request = binary_request(np.zeros((1, 3, 8, 8), np.float32))
    length = request.headers["Inference_Header_Content_Length"]
    head = f"POST /v2/models/linear/infer HTTP/1.1\r\nInference-Header-Content-Length: {length}\r\n"
    head += f"Content-Length: {len(request.body)}\r\n\r\n"
    begin = time.perf_counter()
    client.sendall(head.encode() + request.body + b"POST /v2")
    first = http.client.HTTPResponse(client)
    first.begin()
    assert first.status == 200
    first.read()
    assert time.perf_counter() - begin > GATHERING
    assert reply(client) == LATE


def test_headers_without_end(impatient: Live, client: socket.socket) -> None:
    before = impatient.rss()
    client.sendall(b"GET /v2 HTTP/1.1\r\nX-Long: ")
    try:
        for _ in range(2000):
            client.sendall(b"x" * 1024)
    except OSError:
        pass  # the server has said what it has to say
    assert client.recv(1 << 16).startswith(b"HTTP/1.1 431 ")
    assert impatient.rss() - before < 16 * 1024


@pytest.mark.parametrize(
    "text", [b"nonsense\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9\r\n\r\n"]
)
def test_what_is_no_http(client: socket.socket, text: bytes) -> None:
    client.sendall(text)
    assert reply(client) == (400, {"error": "Invalid HTTP request received."})
    require_closed(client)
