"""Answers over HTTP in the protocol's shape."""

from __future__ import annotations

import math
from collections.abc import Mapping

import orjson
from starlette.responses import Response

from vitdeploy.server.messages import Kind, Refusal

STATUS: Mapping[Kind, int] = {
    "invalid": 400,
    "not found": 404,
    "too slow": 408,
    "timeout": 504,
    "too large": 413,
    "overloaded": 429,
    "unavailable": 503,
    "internal": 500,
}


def json_response(document: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON document as an answer."""
    return Response(orjson.dumps(document), status, dict(headers or {}), "application/json")


def refused(refusal: Refusal) -> Response:
    """A refusal as the protocol has it."""
    headers = {}
    if refusal.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(refusal.retry_after)))
    return json_response({"error": refusal.message}, STATUS[refusal.kind], headers)
