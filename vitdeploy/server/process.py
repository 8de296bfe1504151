"""The process: sockets, signals, startup and an end that loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from vitdeploy.errors import MissingDependency, UsageError
from vitdeploy.images.decode import keep_quiet
from vitdeploy.machine.processors import processors
from vitdeploy.progress import Progress
from vitdeploy.server.explaining import Explainer
from vitdeploy.server.loading import ModelSettings
from vitdeploy.server.repository import ModelRepository, NamedBundle
from vitdeploy.server.service import RequestLimits, Service
from vitdeploy.server.statistics import Metrics

_BACKLOG = 2048
_SWITCH = 5e-5
"""Seconds after which a thread lets others have the interpreter. A session that has a result, or begins,
waits for it that long while the event loop is busy; Python's 5 ms are longer than a small model runs."""


@dataclass(frozen=True)
class Endpoint:
    """Where and how the server listens."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 is any free one."""
    grpc_port: int | None = None
    """None is no gRPC."""
    reload_seconds: float = 2.0
    """How often the bundles are looked at for changes; 0 is never."""
    drain_seconds: float = 30.0
    """How long the end waits for requests in hand."""
    control: bool = True
    """Whether clients may load and unload models."""
    explain: Sequence[str] = ()
    """What shows where models look, a command (``server.explaining``); empty is nothing."""
    limits: RequestLimits = field(default_factory=RequestLimits)


@dataclass(frozen=True)
class RunningServer:
    """What a server that accepts requests can tell."""

    url: str
    grpc: str | None
    repository: ModelRepository


@dataclass(frozen=True)
class Shutdown:
    """How a server came to its end."""

    signal: int
    """Its number; 0 where the web server ended by itself."""
    complete: bool
    """Whether every accepted request was answered."""


def run_server(
    bundles: Sequence[NamedBundle],
    settings: ModelSettings,
    endpoint: Endpoint,
    *,
    started: Callable[[RunningServer], None],
    progress: Progress | None = None,
) -> Shutdown:
    """Serve bundles until SIGINT or SIGTERM.

    Args:
        started: is called when requests are accepted.

    Raises:
        MissingDependency: the server's libraries are not installed.
        UsageError: a port is not free.
        VitdeployError: a bundle cannot be loaded.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH)
    keep_quiet()
    try:
        with asyncio.Runner(loop_factory=_new_event_loop) as runner:
            return runner.run(_serve(bundles, settings, endpoint, started, progress or Progress()))
    finally:
        sys.setswitchinterval(before)


def _new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's, which is written in C."""
    if sys.platform == "win32":  # for which there is no uvloop
        return asyncio.new_event_loop()
    try:
        import uvloop
    except ImportError as error:
        raise MissingDependency("uvloop", extra="serve", purpose="serving") from error
    return uvloop.new_event_loop()


async def _serve(
    bundles: Sequence[NamedBundle],
    settings: ModelSettings,
    endpoint: Endpoint,
    started: Callable[[RunningServer], None],
    progress: Progress,
) -> Shutdown:
    metrics = Metrics()
    with ThreadPoolExecutor(processors(), thread_name_prefix="decode") as workers:
        repository = ModelRepository(bundles, settings, metrics, workers, progress)
        explainer = Explainer(endpoint.explain, settings) if endpoint.explain else None
        service = Service(repository, metrics, endpoint.limits, control=endpoint.control, explainer=explainer)
        web = _uvicorn(service, endpoint)
        async with contextlib.AsyncExitStack() as stack:
            bound = stack.enter_context(contextlib.closing(_bind(endpoint.host, endpoint.port)))
            with _signals() as told:  # before the first model is loaded: Ctrl-C ends that, too
                loading = asyncio.create_task(repository.load_all())
                await asyncio.wait((loading, told), return_when=asyncio.FIRST_COMPLETED)
                if told.done():
                    loading.cancel()
                    return Shutdown(told.result(), complete=True)
                await loading
                grpc = await _start_grpc(endpoint, service, stack)
                running = asyncio.create_task(web.serve(sockets=[bound]))
                watching = asyncio.create_task(repository.watch(endpoint.reload_seconds))
                host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
                started(RunningServer(f"http://{host}:{bound.getsockname()[1]}", grpc, repository))
                await asyncio.wait((running, told), return_when=asyncio.FIRST_COMPLETED)
                complete = await service.drain(endpoint.drain_seconds)
                watching.cancel()
                web.should_exit = True
                await running
                await stack.aclose()
                if explainer is not None:
                    await explainer.close()
                await repository.close()
                return Shutdown(told.result() if told.done() else 0, complete)


def _bind(host: str, port: int) -> socket.socket:
    """A listening socket; taken before anything is loaded, so that a port in use is said at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named, or asyncio leaves Nagle's algorithm on, and answers wait 40 ms for an ACK.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or str(error)
        taken = getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES)
        hint = "--port 0 takes any free one" if taken else None
        raise UsageError(f"cannot listen on {host} port {port}: {reason}", hint=hint) from error
    bound.setblocking(False)
    return bound


def _uvicorn(service: Service, endpoint: Endpoint) -> Any:
    """The web server, without signal handlers of its own.

    Raises:
        MissingDependency: a library that it needs is not installed.
    """
    try:
        import uvicorn

        from vitdeploy.server import http
        from vitdeploy.server.connections import BoundedHttpProtocol
    except ImportError as error:
        raise MissingDependency(error.name or "uvicorn", extra="serve", purpose="serving") from error

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    protocol: Any = functools.partial(BoundedHttpProtocol, limits=endpoint.limits)
    config = uvicorn.Config(
        http.asgi_application(service),
        http=protocol,
        ws="none",
        proxy_headers=False,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(endpoint.drain_seconds)),
    )
    return Server(config)


async def _start_grpc(endpoint: Endpoint, service: Service, stack: contextlib.AsyncExitStack) -> str | None:
    if endpoint.grpc_port is None:
        return None
    from vitdeploy.server.grpc import listening

    return await stack.enter_async_context(listening(endpoint.host, endpoint.grpc_port, service))


@contextlib.contextmanager
def _signals() -> Iterator[asyncio.Future[int]]:
    """A future that becomes the number of the signal that asks the server to end; a second one kills."""
    loop = asyncio.get_running_loop()
    told: asyncio.Future[int] = loop.create_future()

    def tell(number: int) -> None:
        if told.done():
            os._exit(128 + number)
        told.set_result(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        loop.add_signal_handler(number, tell, number)
    try:
        yield told
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
