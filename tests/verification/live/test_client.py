"""URLs of servers and those that are none; whatever a server says is read, or refused as no answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitdeploy.errors import UsageError
from vitdeploy.verification.live.client import (
    Address,
    AnswerError,
    LiveTensor,
    parse_address,
    read_index,
    read_model,
    read_server,
)
from vitdeploy.verification.live.image_endpoints import read_predictions

WORDS = (
    "name version versions extensions inputs outputs datatype shape models state config max_batch_size "
    "parameters string_value predictions label index score"
)
KEYS = st.sampled_from(WORDS.split())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=6),
    max_leaves=12,
)


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "read", [read_server, read_index, read_predictions, lambda said: read_model(said, said)]
)
def test_any_json(read: Callable[[Any], Any]) -> None:
    @given(JSON)
    def check(said: Any) -> None:
        with contextlib.suppress(AnswerError):
            read(said)

    check()


def test_what_grpc_says_as_json() -> None:
    model = read_model(
        {
            "name": "m",
            "versions": ["1"],
            "inputs": [{"name": "x", "datatype": "FP32", "shape": ["-1", "3"]}],
            "outputs": [{"name": "y", "datatype": "FP32"}],
        },
        {"config": {"max_batch_size": 4, "parameters": {"vitdeploy_bundle": {"string_value": "abc"}}}},
    )
    assert model.inputs == (LiveTensor("x", "FP32", (-1, 3)),)
    assert model.outputs == (LiveTensor("y", "FP32", ()),)
    assert (model.max_batch, model.digest, model.artifact) == (4, "abc", None)
    assert read_index({}) == ()
    assert [entry.ready for entry in read_index({"models": [{"name": "m", "state": "READY"}]})] == [True]
