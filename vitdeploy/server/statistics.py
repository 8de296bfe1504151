"""What a served model has done: the v2 statistics extension, and Prometheus metrics."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from vitdeploy.config import Size, size_name
from vitdeploy.errors import MissingDependency
from vitdeploy.server.batcher import RequestOutputs
from vitdeploy.server.messages import RequestError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass
class Duration:
    """How often something was done, and for how many nanoseconds in all."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float, times: int = 1) -> None:
        self.count += times
        self.ns += round(1e9 * seconds)

    def __add__(self, other: Duration) -> Duration:
        return Duration(self.count + other.count, self.ns + other.ns)

    def as_dict(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.ns}


class Metrics:
    """The server's Prometheus metrics, in a registry of their own.

    Raises:
        MissingDependency: prometheus-client is not installed.
    """

    def __init__(self) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise MissingDependency("prometheus-client", extra="serve", purpose="serving") from error
        self.registry: CollectorRegistry = prometheus.CollectorRegistry()
        labels = ("model", "version")
        sized = (*labels, "image_size")

        def made(kind: Any, name: str, text: str, labels: Sequence[str], **more: Any) -> Any:
            return kind(name, text, labelnames=labels, registry=self.registry, **more)

        counter, gauge, histogram = prometheus.Counter, prometheus.Gauge, prometheus.Histogram
        seconds = partial(made, histogram, buckets=_SECONDS)
        outcomes = partial(made, counter, labels=(*labels, "outcome"))
        self.requests = outcomes("vitdeploy_requests", "Requests by how they ended.")
        self.seconds = seconds("vitdeploy_request_seconds", "From the decoded request to its answer.", labels)
        self.queue_seconds = seconds("vitdeploy_queue_seconds", "Waiting for a free session.", sized)
        self.compute_seconds = seconds("vitdeploy_compute_seconds", "One run of the session.", sized)
        self.batch = made(
            histogram, "vitdeploy_batch_size", "Images that ran together.", sized, buckets=_SIZES
        )
        self.images = made(counter, "vitdeploy_images", "Images that were run.", sized)
        self.padding = made(counter, "vitdeploy_padding_images", "Images run only to fill a batch up.", sized)
        self.queue = made(gauge, "vitdeploy_queue_images", "Images that wait.", sized)
        self.reloads = outcomes("vitdeploy_loads", "Loads of a bundle by how they ended.")
        self._text: Callable[[CollectorRegistry], bytes] = prometheus.generate_latest
        self.content_type = prometheus.CONTENT_TYPE_LATEST

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return self._text(self.registry)


class SizeStatistics:
    """Of one image size of a served model: what its sessions did."""

    def __init__(self, metrics: Metrics, name: str, version: str, size: str) -> None:
        self.size = size
        self.inferences = 0
        self.executions = 0
        self.queue, self.compute = Duration(), Duration()
        self.batches = defaultdict[int, Duration](Duration)
        labels = (name, version, size)
        self._queue_seconds = metrics.queue_seconds.labels(*labels)
        self._compute_seconds = metrics.compute_seconds.labels(*labels)
        self._batch = metrics.batch.labels(*labels)
        self._images = metrics.images.labels(*labels)
        self._padding = metrics.padding.labels(*labels)
        self._queue = metrics.queue.labels(*labels)

    def queued(self, rows: int) -> None:
        """So many rows wait now."""
        self._queue.set(rows)

    def executed(self, rows: int, padded: int, seconds: float) -> None:
        """A batch was run."""
        self.executions += 1
        self.inferences += rows
        self.batches[rows].add(seconds)
        self._compute_seconds.observe(seconds)
        self._batch.observe(rows)
        self._images.inc(rows)
        self._padding.inc(padded - rows)

    def answered(self, answer: RequestOutputs) -> None:
        """A request's rows came back."""
        self.queue.add(answer.waited)
        self.compute.add(answer.computed)
        self._queue_seconds.observe(answer.waited)

    def as_dict(self) -> dict[str, Any]:
        """In the words of the v2 statistics extension."""
        return {
            "image_size": self.size,
            "inference_count": self.inferences,
            "execution_count": self.executions,
            "inference_stats": {"queue": self.queue.as_dict(), "compute_infer": self.compute.as_dict()},
            "batch_stats": _batch_stats(self.batches),
        }


class Statistics:
    """Of one version of one model, since it was loaded."""

    def __init__(self, metrics: Metrics, name: str, version: str) -> None:
        self.name, self.version = name, version
        self.last = 0
        """Milliseconds since 1970 of the last request."""
        self._metrics = metrics
        self._success, self._fail = Duration(), Duration()
        self._sizes: list[SizeStatistics] = []
        self._seconds = metrics.seconds.labels(name, version)
        # labels() checks and looks up its arguments under a lock each time.
        self._outcome = cache(lambda outcome: metrics.requests.labels(name, version, outcome))

    def of(self, size: Size | None) -> SizeStatistics:
        """Begin those of one image size; None is one that nobody tells."""
        text = "" if size is None else size_name(size)
        self._sizes.append(SizeStatistics(self._metrics, self.name, self.version, text))
        return self._sizes[-1]

    def began(self) -> float:
        """A request arrived; returns when, for ``ended``."""
        self.last = round(1000 * time.time())
        return time.perf_counter()

    def ended(self, begin: float, error: BaseException | None) -> None:
        """It was answered, or ended with an error; any but a refusal is that the client went away."""
        seconds = time.perf_counter() - begin
        if error is None:
            outcome = "ok"
            self._success.add(seconds)
            self._seconds.observe(seconds)
        else:
            outcome = error.kind if isinstance(error, RequestError) else "cancelled"
            self._fail.add(seconds)
        self._outcome(outcome).inc()

    def as_dict(self) -> dict[str, Any]:
        """As the v2 statistics extension has it; and of several image sizes each, under a name of our own."""
        sizes, nothing = self._sizes, Duration().as_dict()
        batches = defaultdict[int, Duration](Duration)
        for size in sizes:
            for rows, duration in size.batches.items():
                batches[rows] += duration
        done = {
            "success": self._success,
            "fail": self._fail,
            "queue": sum((size.queue for size in sizes), Duration()),
            "compute_infer": sum((size.compute for size in sizes), Duration()),
        }
        names = (
            *("success", "fail", "queue", "compute_input", "compute_infer", "compute_output"),
            *("cache_hit", "cache_miss"),
        )
        document = {
            "name": self.name,
            "version": self.version,
            "last_inference": self.last,
            "inference_count": sum(size.inferences for size in sizes),
            "execution_count": sum(size.executions for size in sizes),
            "inference_stats": {name: done[name].as_dict() if name in done else nothing for name in names},
            "batch_stats": _batch_stats(batches),
        }
        if len(sizes) > 1:
            document["image_sizes"] = [size.as_dict() for size in sizes]
        return document


def _batch_stats(batches: Mapping[int, Duration]) -> list[dict[str, Any]]:
    nothing = Duration().as_dict()
    return [
        {
            "batch_size": size,
            "compute_input": nothing,
            "compute_infer": duration.as_dict(),
            "compute_output": nothing,
        }
        for size, duration in sorted(batches.items())
    ]
