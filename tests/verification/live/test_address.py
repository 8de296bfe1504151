"""URLs of servers, and those that are none."""

from __future__ import annotations

import pytest

from vitdeploy.errors import UsageError
from vitdeploy.verification.live.address import Address, parse_address


@pytest.mark.parametrize(
    "url, address",
    [
        ("http://127.0.0.1:8000", Address("http", "127.0.0.1", 8000)),
        ("HTTP://Host/", Address("http", "host", 80)),
        ("https://vit.example.org/models/a/", Address("http", "vit.example.org", 443, "/models/a", tls=True)),
        ("grpc://[::1]:8001", Address("grpc", "::1", 8001)),
        ("grpcs://vit.example.org", Address("grpc", "vit.example.org", 443, tls=True)),
    ],
)
def test_urls(url: str, address: Address) -> None:
    assert parse_address(url) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "url, problem",
    [
        ("127.0.0.1:8000", "no http:// or grpc:// in front"),
        ("htpt://a:1", "unknown protocol 'htpt'; did you mean 'http'"),
        ("http://", "names no host"),
        ("http://:8000", "names no host"),
        ("http://a b:8000", "names no host"),
        ("http://a:port", "port"),
        ("http://a:70000", "0-65535"),
        ("http://a:0", "names no port"),
        ("grpc://a", "names no port"),
        ("grpc://a:8001/path", "has a path (/path), which gRPC does not know"),
        ("http://a:8000/v2/models/x", "goes on after the server's address"),
        ("http://a:8000/?x=1", "query or fragment"),
        ("http://[::1:8000", "IPv6"),
    ],
)
def test_what_is_no_url_of_a_server(url: str, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_address(url)
    assert problem in caught.value.message
    assert caught.value.hint


def test_a_password_is_not_repeated() -> None:
    with pytest.raises(UsageError, match="user name") as caught:
        parse_address("http://me:secret@host:8000")
    assert "secret" not in caught.value.message + str(caught.value.hint)
    assert "--header" in str(caught.value.hint)
