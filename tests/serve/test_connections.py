"""Answers go out at once, and whole."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest

from vitdeploy.serve.connections import _Together
from vitdeploy.serve.server import _bind

HEAD, BODY = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n", b"body"


async def received(act: Callable[[_Together], None], reads: int) -> list[bytes]:
    """What a client reads when the server does this once it is connected."""

    class Protocol(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            assert transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            act(_Together(transport))

    bound = _bind("127.0.0.1", 0)
    async with await asyncio.get_running_loop().create_server(Protocol, sock=bound):
        reader, writer = await asyncio.open_connection(*bound.getsockname())
        try:
            async with asyncio.timeout(10):
                return [await reader.read(1 << 16) for _ in range(reads)]
        finally:
            writer.close()


def both(transport: _Together) -> None:
    transport.write(HEAD)
    transport.write(BODY)


def head_alone(transport: _Together) -> None:
    transport.write(HEAD)


def head_and_the_end(transport: _Together) -> None:
    transport.write(HEAD)
    assert not transport.is_closing()
    transport.close()


def two_answers(transport: _Together) -> None:
    both(transport)
    both(transport)
    transport.close()


@pytest.mark.parametrize(
    "act, parts",
    [(both, [HEAD + BODY]), (head_alone, [HEAD]), (head_and_the_end, [HEAD, b""])],
)
def test_an_answer_is_one_packet(act: Callable[[_Together], None], parts: list[bytes]) -> None:
    assert asyncio.run(received(act, len(parts))) == parts


def test_answers_keep_their_order() -> None:
    assert b"".join(asyncio.run(received(two_answers, 3))) == 2 * (HEAD + BODY)
