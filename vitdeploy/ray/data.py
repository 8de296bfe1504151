"""Ray Data: a pool of actors over the pieces of a job.

Beside ``serving.py``, the only file that imports ray.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from vitdeploy.backends.base import one_line
from vitdeploy.errors import BundleError, DeviceUnavailable, MissingDependency
from vitdeploy.ray.tables import Table
from vitdeploy.ray.work import ActorPlan, RayResources
from vitdeploy.ray.worker import Classifier

_OBJECT_STORE = 256 * 2**20
"""Bytes of shared memory for a Ray of our own: only lists of paths and results pass through it."""
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
"""How a Ray of our own behaves where the environment does not say: it tells nobody, and our user little."""
_KNOCK_SECONDS = 5.0
_RETRIES = 3
"""How often an actor that dies is started again, and a piece of work is tried again."""


@contextlib.contextmanager
def connected() -> Iterator[RayResources]:
    """Join the Ray that ``RAY_ADDRESS`` names (``auto``: the one on this machine), else start one meanwhile.

    Raises:
        MissingDependency: Ray is not installed.
        DeviceUnavailable: the one that ``RAY_ADDRESS`` names cannot be reached.
    """
    ray = _library()
    if ray.is_initialized():
        yield _resources(ray)
        return
    with _kept_signals():
        _join(ray)
    try:
        yield _resources(ray)
    finally:
        ray.shutdown()


def _library() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingDependency("ray", extra="ray", purpose="--engine ray") from error
    return ray


def _join(ray: Any) -> None:
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    named = os.environ.get("RAY_ADDRESS", "local")
    if named != "local":
        try:
            _knock(named)
            ray.init(address=named, **quiet)
        except OSError as error:
            raise DeviceUnavailable(
                f"no Ray cluster at RAY_ADDRESS={named}: {one_line(error)}",
                hint="without RAY_ADDRESS, a Ray is started for this job alone",
            ) from error
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE, **quiet)


def _knock(address: str) -> None:
    """See whether anything listens there; Ray itself would try for minutes.

    Raises:
        OSError: nothing does.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK_SECONDS).close()


@contextlib.contextmanager
def _kept_signals() -> Iterator[None]:
    """Keep the handler of SIGTERM, which Ray replaces by one that knows of no clean-up but its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _resources(ray: Any) -> RayResources:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = tuple(int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1)
    free = int(ray.available_resources().get("CPU", 0))
    return RayResources(cpus, int(sum(node.get("GPU", 0) for node in nodes)), free)


def _retries(map_batches: Any) -> dict[str, Any]:
    """The argument that bounds retries; Ray Data's own choice is for ever, whatever kills the process."""
    name = "ray_remote_args_fn"
    bound = {"max_restarts": _RETRIES, "max_task_retries": _RETRIES}
    return {name: lambda: bound} if name in inspect.signature(map_batches).parameters else {}


def classify(
    pieces: Sequence[Table], plan: ActorPlan, *, workers: int, threads: int, gpus: float = 0
) -> Generator[Table]:
    """What ``Classifier`` makes of the pieces, in whatever order they are finished.

    Args:
        pieces: one task each.
        workers: actors, one session each.
        threads: CPUs that each actor takes.
        gpus: GPUs that each actor takes.

    Raises:
        BundleError: an actor dies again and again.
    """
    ray = _library()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    bars, context.enable_progress_bars = context.enable_progress_bars, False  # there is one of our own
    try:
        dataset = ray.data.from_arrow(list(pieces))
        with warnings.catch_warnings():
            # Ray announces the end of these arguments, but has no others for retries yet.
            warnings.filterwarnings("ignore", message=".*ray_remote_args")
            dataset = dataset.map_batches(
                Classifier,
                fn_constructor_args=(plan,),
                batch_size=None,  # a piece at a time
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=workers),
                num_cpus=threads,
                num_gpus=gpus or None,
                **_retries(dataset.map_batches),
            )
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    except ray.exceptions.RayError as error:
        raise BundleError(
            f"the job on Ray failed: {one_line(error)}", hint="what is done is kept: start it again"
        ) from error
    finally:
        context.enable_progress_bars = bars
