"""Pages for people: try an image at /, read the interface at /docs. One file each, no network."""

from __future__ import annotations

import html
import json
from importlib import resources
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from vitdeploy._version import __version__
from vitdeploy.server.http_io import json_response
from vitdeploy.server.service import Service

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def _status(request: Request, service: Service) -> Response:
    return _page(_file("status.html"))


async def _openapi(request: Request, service: Service) -> Response:
    return json_response(_interface(service))


async def _docs(request: Request, service: Service) -> Response:
    """The interface as a table: every path with what it takes and what it answers."""
    document = _interface(service)
    rows = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            body = ", ".join(operation.get("requestBody", {}).get("content", {}))
            statuses = " ".join(operation["responses"])
            cells = (method.upper(), path, operation["summary"], body, statuses)
            rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    title = html.escape(f"{document['info']['title']} {document['info']['version']}")
    description = html.escape(document["info"]["description"])
    return _page(_DOCS.format(title=title, description=description, rows="\n".join(rows)))


async def _icon(request: Request, service: Service) -> Response:
    return Response(status_code=204)


ROUTES = [
    ("GET", "/", _status),
    ("GET", "/docs", _docs),
    ("GET", "/openapi.json", _openapi),
    ("GET", "/favicon.ico", _icon),
]


def _interface(service: Service) -> dict[str, Any]:
    """The OpenAPI document, with what depends on this server filled in."""
    document: dict[str, Any] = json.loads(_file("openapi.json"))
    document["info"]["version"] = __version__
    names = sorted({model.name for model in service.repository.models})
    document["components"]["parameters"]["Model"]["schema"]["examples"] = names
    return document


def _file(name: str) -> str:
    return resources.files("vitdeploy.server").joinpath(name).read_text(encoding="utf-8")


def _page(text: str) -> Response:
    return HTMLResponse(text, headers={"Content-Security-Policy": _POLICY})


_DOCS = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}: interface</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
td, th {{ border-bottom: 1px solid #8884; padding: .35rem .8rem .35rem 0; text-align: left; }}
td:nth-child(2) {{ font-family: ui-monospace, monospace; white-space: nowrap; }}
</style></head><body>
<h1>{title}</h1><p>{description}</p>
<p>For programs: <a href="openapi.json">openapi.json</a>. To try an image: <a href="./">here</a>.</p>
<div><table><tr><th>method</th><th>path</th><th>what</th><th>body</th><th>statuses</th></tr>
{rows}
</table></div></body></html>
"""
