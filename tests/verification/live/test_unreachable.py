"""Servers that cannot be asked: each way of it is one clear line, and none is waited for without end."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest

from tests.fakes.v2_grpc_server import GrpcServer
from tests.fakes.v2_models import served
from tests.fakes.v2_server import V2Server
from vitdeploy.bundle.folder import Bundle
from vitdeploy.errors import ServerError, UsageError
from vitdeploy.verification.live.round import LiveRequest, verify_live


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def tcp_server(greeting: bytes | None) -> Iterator[int]:
    """Accepts; then says ``greeting`` and hangs up, or with None says nothing at all."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        connections = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                connections.append(connection)
                if greeting is not None:
                    connection.recv(65536)
                    connection.sendall(greeting)
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]
        for connection in connections:
            connection.close()


@pytest.mark.parametrize("scheme", ["http", "https", "grpc", "grpcs"])
def test_nothing_listens(bundle: Bundle, scheme: str) -> None:
    with pytest.raises(ServerError, match="nothing listens there") as caught:
        verify_live(bundle, LiveRequest(f"{scheme}://127.0.0.1:{free_port()}", timeout=10))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_no_such_host(bundle: Bundle, scheme: str) -> None:
    with pytest.raises(ServerError, match=r"no such host: no-such-host\.invalid"):
        verify_live(bundle, LiveRequest(f"{scheme}://no-such-host.invalid:8000"))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["http", "https", "grpc", "grpcs"])
def test_a_server_that_says_nothing(bundle: Bundle, scheme: str) -> None:
    with tcp_server(None) as port, pytest.raises(ServerError, match=r"127\.0\.0\.1"):
        verify_live(bundle, LiveRequest(f"{scheme}://127.0.0.1:{port}", timeout=0.5))


@pytest.mark.parametrize(
    "greeting, message",
    [
        (b"", "hung up before its answer was complete"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n{", "hung up before its answer was complete"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nhere", "no server of the Open Inference Protocol v2"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", "its metadata is not a JSON object"),
        (
            b'HTTP/1.1 404 Not Found\r\nContent-Length: 22\r\n\r\n{"detail":"Not Found"}',
            "HTTP 404: Not Found",
        ),
        (b"HTTP/1.1 502 Bad\r\nContent-Length: 13\r\n\r\n<html></html>", "HTTP 502: without a word"),
    ],
)
def test_servers_of_something_else(bundle: Bundle, greeting: bytes, message: str) -> None:
    with tcp_server(greeting) as port, pytest.raises(ServerError) as caught:
        verify_live(bundle, LiveRequest(f"http://127.0.0.1:{port}"))
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_grpc_to_an_http_server_and_the_other_way_round(bundle: Bundle) -> None:
    with V2Server({"linear": served()}) as server, pytest.raises(ServerError):
        verify_live(bundle, LiveRequest(f"grpc://127.0.0.1:{server.port}"))
    with GrpcServer({"linear": served()}) as server, pytest.raises(ServerError, match=r"127\.0\.0\.1"):
        verify_live(bundle, LiveRequest(f"http://127.0.0.1:{server.port}"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, timeout, message",
    [
        ("close", 30, "hung up before its answer was complete"),
        ("half", 30, "hung up before its answer was complete"),
        ("slow", 1, "no answer within 1 s"),
        ("drip", 1, "no answer within 1 s"),
    ],
)
def test_in_the_middle(bundle: Bundle, fault: str, timeout: float, message: str) -> None:
    with V2Server({"linear": served()}, fault=fault) as server, pytest.raises(ServerError, match=message):
        verify_live(bundle, LiveRequest(server.url, timeout=timeout))


@pytest.mark.parametrize("code", [grpc.StatusCode.DEADLINE_EXCEEDED])
def test_grpc_in_the_middle(bundle: Bundle, code: grpc.StatusCode) -> None:
    with GrpcServer({"linear": served()}, code=code) as server, pytest.raises(ServerError, match="no answer"):
        verify_live(bundle, LiveRequest(server.url))


def test_headers_are_sent_with_every_request(bundle: Bundle) -> None:
    with V2Server({"linear": served()}) as server:
        report = verify_live(bundle, LiveRequest(server.url, headers={"X-Tenant": "seven"}, calls=5))
    assert report.passed
    assert len(server.requests) > 20
    assert {headers.get("X-Tenant") for _, headers in server.requests} == {"seven"}


def test_a_timeout_has_to_be_a_time() -> None:
    with pytest.raises(UsageError, match="timeout"):
        LiveRequest("http://a:1", timeout=0)
