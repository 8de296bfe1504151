"""The Open Inference Protocol v2 over HTTP, with the extensions that Triton's clients use.

Specification: github.com/kserve/open-inference-protocol, and Triton Inference Server's protocol documents for
the extensions of ``service.EXTENSIONS``. Statuses and messages are those of the real server where it has one.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from vitdeploy._version import __version__
from vitdeploy.errors import VitdeployError
from vitdeploy.server import http_embeddings, http_explanations, http_images, pages
from vitdeploy.server.codec import parse_json, parse_request, render_response
from vitdeploy.server.http_io import (
    compressed,
    error_response,
    json_response,
    parsed,
    read_body,
    until_disconnect,
)
from vitdeploy.server.messages import RequestError
from vitdeploy.server.service import EXTENSIONS, Service

_HEADER_LENGTH = "Inference-Header-Content-Length"

Handler = Callable[[Request, Service], Awaitable[Response]]
Endpoint = Callable[[Request], Awaitable[Response]]


def asgi_application(service: Service) -> ASGIApp:
    """The application."""
    hot = [(path, _guarded(handler, service)) for path, handler in _HOT]
    return _hot_first(hot, starlette_application(service))


def starlette_application(service: Service) -> Starlette:
    """The application as the web framework has it."""
    http_images.register_names()
    model = "/v2/models/{model}"
    version = model + "/versions/{version}"
    table: list[tuple[str, str, Handler]] = [
        *(("POST", f"{base}/infer", _infer) for base in (model, version)),
        *http_images.ROUTES,
        *http_explanations.ROUTES,
        *http_embeddings.ROUTES,
        ("GET", "/v2/health/live", _live),
        ("GET", "/v2/health/ready", _ready),
        *(("GET", path, _server) for path in ("/v2", "/v2/")),  # the protocol's documents have both
        ("GET", "/v2/models/stats", _all_statistics),
        *(
            (method, base + path, handler)
            for base in (model, version)
            for method, path, handler in (
                ("GET", "", _metadata),
                ("GET", "/ready", _model_ready),
                ("GET", "/config", _config),
                ("GET", "/stats", _statistics),
            )
        ),
        ("POST", "/v2/repository/index", _index),
        ("POST", "/v2/repository/models/{model}/load", _load),
        ("POST", "/v2/repository/models/{model}/unload", _unload),
        ("GET", "/metrics", _metrics),
        *pages.ROUTES,
    ]
    routes = [Route(path, _guarded(handler, service), methods=[method]) for method, path, handler in table]
    handlers: dict[Any, Any] = {404: _no_such_path, 405: _no_such_method, Exception: _broken}
    application = Starlette(routes=routes, exception_handlers=handlers)
    application.router.redirect_slashes = False  # to answer in the protocol's shape
    return application


def _hot_first(hot: Sequence[tuple[re.Pattern[str], Endpoint]], others: ASGIApp) -> ASGIApp:
    """The application with requests to models going past the middleware and the routes.

    Those are the same for every request, and a small model's answer should not wait for them.
    """

    async def answer(endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        try:
            response = await endpoint(request)
        except Exception as error:
            await (await _broken(request, error))(scope, receive, send)
            raise
        await response(scope, receive, send)

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("method") == "POST":
            for path, endpoint in hot:
                if asked := path.fullmatch(scope["path"]):
                    scope["path_params"] = asked.groupdict("")
                    return await answer(endpoint, scope, receive, send)
        return await others(scope, receive, send)

    return application


def _guarded(handler: Handler, service: Service) -> Endpoint:
    """The handler, with every error in the protocol's shape."""

    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request, service)
        except RequestError as error:
            return error_response(error)
        except VitdeployError as error:
            return error_response(RequestError("internal", error.message))
        except ClientDisconnect:
            return Response(status_code=400)  # that nobody will read

    return endpoint


async def _no_such_path(request: Request, error: Exception) -> Response:
    return json_response({"error": f"there is nothing at {request.url.path[:200]}"}, 404)


async def _broken(request: Request, error: Exception) -> Response:
    """An error of ours; it is raised again behind this, and logged with its traceback."""
    return error_response(RequestError("internal", f"{type(error).__name__}, which is a fault of the server"))


async def _no_such_method(request: Request, error: Exception) -> Response:
    allowed = getattr(error, "headers", None) or {}
    return json_response(
        {"error": f"{request.method} is not for {request.url.path[:200]}"}, 405, headers=allowed
    )


def _where(request: Request) -> tuple[str, str]:
    """The model and version of the path."""
    return request.path_params["model"], request.path_params.get("version", "")


async def _live(request: Request, service: Service) -> Response:
    return json_response({"live": True})


async def _ready(request: Request, service: Service) -> Response:
    ready = service.repository.ready and not service.draining
    return json_response({"ready": ready}, 200 if ready else 503)


async def _server(request: Request, service: Service) -> Response:
    return json_response({"name": "vitdeploy", "version": __version__, "extensions": list(EXTENSIONS)})


async def _metadata(request: Request, service: Service) -> Response:
    return json_response(service.repository.metadata(*_where(request)))


async def _model_ready(request: Request, service: Service) -> Response:
    name, version = _where(request)
    try:
        service.repository.get(name, version)
    except RequestError as error:
        # As the real server: asking whether an unknown model is ready is a bad request, not a lost one.
        raise RequestError("invalid", error.message) from error
    return json_response({"name": name, "ready": True})


async def _config(request: Request, service: Service) -> Response:
    return json_response(service.repository.get(*_where(request)).config())


async def _statistics(request: Request, service: Service) -> Response:
    model = service.repository.get(*_where(request))
    return json_response({"model_stats": [model.statistics.as_dict()]})


async def _all_statistics(request: Request, service: Service) -> Response:
    statistics = [model.statistics.as_dict() for model in service.repository.models]
    return json_response({"model_stats": statistics})


async def _infer(request: Request, service: Service) -> Response:
    service.require_open()
    service.repository.get(*_where(request))  # before a long body is read for nothing
    body = await read_body(request, service.limits)
    asked = await parsed(parse_request, body, _header_length(request))
    answer = await until_disconnect(request, service.infer(*_where(request), asked))
    parts, json_length = render_response(answer)
    content, encoding = compressed(b"".join(parts), request.headers.get("accept-encoding", ""))
    headers = {} if json_length is None else {_HEADER_LENGTH: str(json_length)}
    if encoding:
        headers["Content-Encoding"] = encoding
    kind = "application/json" if json_length is None else "application/octet-stream"
    return Response(content, 200, headers, kind)


def _header_length(request: Request) -> int | None:
    text = request.headers.get(_HEADER_LENGTH)
    if text is None:
        return None
    if not text.isdecimal() or len(text) > 18:
        raise RequestError("invalid", f"{_HEADER_LENGTH} is not a number")
    return int(text)


async def _document(request: Request, service: Service) -> dict[str, Any]:
    """A body that may be left out."""
    body = await read_body(request, service.limits)
    return parse_json(body) if body.strip() else {}


async def _index(request: Request, service: Service) -> Response:
    ready = (await _document(request, service)).get("ready", False)
    if not isinstance(ready, bool):
        raise RequestError("invalid", "ready is neither true nor false")
    return json_response(service.repository.index(ready=ready))


async def _load(request: Request, service: Service) -> Response:
    service.require_open()
    service.require_control()
    if (await _document(request, service)).get("parameters"):
        raise RequestError(
            "invalid", "load takes no parameters: a model is loaded from where the server has it"
        )
    await service.repository.load(request.path_params["model"])
    return json_response({})


async def _unload(request: Request, service: Service) -> Response:
    service.require_control()
    await _document(request, service)
    await service.repository.unload(request.path_params["model"])
    return json_response({})


async def _metrics(request: Request, service: Service) -> Response:
    return Response(service.metrics.text(), media_type=service.metrics.content_type)


_INFER = re.compile(r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?/infer")
_HOT: Sequence[tuple[re.Pattern[str], Handler]] = ((_INFER, _infer), (http_images.PATH, http_images.predict))
"""What is asked most: its path, and what answers it."""
