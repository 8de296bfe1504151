"""Bodies over HTTP: read within limits of size and time, answered in the protocol's shape."""

from __future__ import annotations

import asyncio
import math
import zlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Concatenate, ParamSpec, TypeVar

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from vitdeploy.server.connections import WHOLE_BODY
from vitdeploy.server.messages import ErrorKind, RequestError
from vitdeploy.server.service import RequestLimits

_T = TypeVar("_T")
_More = ParamSpec("_More")
_IN_A_WORKER = 1 << 18
"""Bytes of a body from which on it is parsed away from the event loop."""
_PATIENCE = 0.02
"""Seconds: what is answered sooner is answered whether the client is there or not."""
_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
_STATUS: Mapping[ErrorKind, int] = {
    "invalid": 400,
    "not found": 404,
    "too slow": 408,
    "timeout": 504,
    "too large": 413,
    "overloaded": 429,
    "unavailable": 503,
    "internal": 500,
}


async def read_body(request: Request, limits: RequestLimits) -> bytes:
    """The whole body, decompressed where ``Content-Encoding`` says so.

    Raises:
        RequestError: too large, too slow, or not what its headers say.
        ClientDisconnect: its end will not come.
    """
    body: bytes | None = request.scope.get(WHOLE_BODY)
    if body is None:
        body = await _awaited(request, limits)
    if len(body) > limits.body_bytes:
        raise _too_large(limits)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in _WINDOWS:
        raise RequestError(
            "invalid", f"Content-Encoding {encoding[:40]!r} is not supported: gzip and deflate are"
        )
    return _decompressed(body, encoding, limits)


async def _awaited(request: Request, limits: RequestLimits) -> bytes:
    """The body as it is sent, within the limits.

    Raises:
        RequestError, ClientDisconnect: as ``read_body``.
    """
    announced = request.headers.get("content-length")
    if announced is not None and announced.isdecimal() and int(announced[:19]) > limits.body_bytes:
        raise _too_large(limits)
    parts, size, more = list[bytes](), 0, True
    try:
        async with asyncio.timeout(limits.body_seconds):
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                parts.append(message.get("body", b""))
                more = message.get("more_body", False)
                size += len(parts[-1])
                if size > limits.body_bytes:
                    raise _too_large(limits)
    except TimeoutError:
        raise RequestError("too slow", f"the body did not arrive within {limits.body_seconds:g} s") from None
    return b"".join(parts)


async def parsed(
    parse: Callable[Concatenate[memoryview, _More], _T],
    body: bytes,
    *more: _More.args,
    **named: _More.kwargs,
) -> _T:
    """What ``parse`` makes of a body, in a worker where it is long."""
    if len(body) < _IN_A_WORKER:
        return parse(memoryview(body), *more, **named)
    return await asyncio.to_thread(parse, memoryview(body), *more, **named)


def compressed(body: bytes, accept: str) -> tuple[bytes, str]:
    """The body as the client's ``Accept-Encoding`` asks for it, and the encoding; "" is as it is."""
    if not accept:
        return body, ""
    offered = [part.partition(";") for part in accept.lower().split(",")]
    names = [name.strip() for name, _, weight in offered if weight.replace(" ", "") not in ("q=0", "q=0.0")]
    encoding = next((name for name in names if name in _WINDOWS), "")
    if not encoding:
        return body, ""
    packer = zlib.compressobj(1, wbits=_WINDOWS[encoding])
    return packer.compress(body) + packer.flush(), encoding


def json_response(document: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON document as an answer."""
    return Response(orjson.dumps(document), status, dict(headers or {}), "application/json")


def error_response(error: RequestError, content: object = None) -> Response:
    """A refusal as the protocol has it; another protocol has another ``content`` than the message."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return json_response({"error": content or error.message}, _STATUS[error.kind], headers)


async def until_disconnect(request: Request, work: Awaitable[_T]) -> _T:
    """Wait for ``work``, and cancel it when the client goes away. Call it once the body is read.

    Raises:
        ClientDisconnect: nobody is there to be answered.
    """
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None, "called outside of a task"
    watching: asyncio.Task[None] | None = None
    left = False

    async def watch() -> None:
        nonlocal left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        left = True
        task.cancel()

    def begin() -> None:
        nonlocal watching
        watching = loop.create_task(watch())

    beginning = loop.call_later(_PATIENCE, begin)
    try:
        return await work
    except asyncio.CancelledError:
        if not left:
            raise
        task.uncancel()
        raise ClientDisconnect from None
    finally:
        beginning.cancel()
        if watching is not None:
            watching.cancel()


def _decompressed(body: bytes, encoding: str, limits: RequestLimits) -> bytes:
    unpacker = zlib.decompressobj(wbits=_WINDOWS[encoding])
    try:
        unpacked = unpacker.decompress(body, limits.body_bytes + 1)
    except zlib.error as error:
        raise RequestError("invalid", f"the body is not {encoding}: {error}") from error
    if len(unpacked) > limits.body_bytes or unpacker.unconsumed_tail:
        raise _too_large(limits)
    if not unpacker.eof or unpacker.unused_data:
        raise RequestError("invalid", f"the body is not one whole {encoding} stream")
    return unpacked


def _too_large(limits: RequestLimits) -> RequestError:
    return RequestError("too large", f"the body has more than {limits.body_bytes} bytes")
