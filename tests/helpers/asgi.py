"""The application without sockets: requests are handed to it as a web server would."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

from tests.helpers.live_server import Reply
from vitdeploy.progress import Progress
from vitdeploy.server import http
from vitdeploy.server.explaining import Explainer
from vitdeploy.server.loading import ModelSettings
from vitdeploy.server.repository import ModelRepository, parse_named_bundles
from vitdeploy.server.service import RequestLimits, Service
from vitdeploy.server.statistics import Metrics


@dataclass(frozen=True)
class Application:
    """An application, and what is behind it."""

    app: Any
    service: Service

    async def ask(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Reply:
        """One request. Whatever the application raises, it raises here."""
        target, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(target),
            "raw_path": target.encode(),
            "query_string": query.encode(),
            "headers": [
                (k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in (headers or {}).items()
            ],
            "server": ("127.0.0.1", 80),
            "client": ("127.0.0.1", 1),
        }
        waiting = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if waiting:
                return waiting.pop()
            return await asyncio.get_running_loop().create_future()  # it never disconnects

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        found = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in sent[0]["headers"]}
        return Reply(sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:]))


@asynccontextmanager
async def application(
    *bundles: object, limits: RequestLimits | None = None, explain: Sequence[str] = (), **settings: Any
) -> AsyncIterator[Application]:
    """Serve bundles, named as on the command line, without a socket.

    Args:
        explain: the command that shows where models look.
    """
    metrics = Metrics()
    with ThreadPoolExecutor(2) as workers:
        named = parse_named_bundles([str(bundle) for bundle in bundles])
        chosen = replace(ModelSettings(), **settings)
        repository = ModelRepository(named, chosen, metrics, workers, Progress())
        explainer = Explainer(explain, chosen) if explain else None
        service = Service(repository, metrics, limits or RequestLimits(), explainer=explainer)
        await repository.load_all()
        try:
            yield Application(http.asgi_application(service), service)
        finally:
            if explainer is not None:
                await explainer.close()
            await repository.close()
