"""A replica of Ray Serve without Ray: requests, and batches of one image each."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

MAX_BATCH, MAX_DELAY_MS = 4, 20
"""What replicas here are to be asked for."""


def post(body: bytes) -> Request:
    """A request to ``:predict``."""
    sent = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        return sent.pop()

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/models/m:predict",
        "query_string": b"",
        "headers": [],
        "server": ("127.0.0.1", 80),
        "scheme": "http",
    }
    return Request(scope, receive)


def gathering(max_batch_size: int, batch_wait_timeout_s: float) -> Any:
    """In place of Ray Serve's batching, which runs within Ray only: each image is a batch of its own."""

    def decorate(run: Any) -> Any:
        async def one(pixels: Any) -> Any:
            (row,) = await run([pixels])
            return row

        return one

    assert (max_batch_size, batch_wait_timeout_s) == (MAX_BATCH, MAX_DELAY_MS / 1000)
    return decorate
