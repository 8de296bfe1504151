"""What a served model has done: the v2 statistics extension, and Prometheus metrics."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any

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
        counter = partial(prometheus.Counter, labelnames=labels, registry=self.registry)
        gauge = partial(prometheus.Gauge, labelnames=labels, registry=self.registry)
        histogram = partial(prometheus.Histogram, labelnames=labels, registry=self.registry)
        seconds = partial(histogram, buckets=_SECONDS)
        outcomes = partial(counter, labelnames=(*labels, "outcome"))
        self.requests = outcomes("vitdeploy_requests", "Requests by how they ended.")
        self.seconds = seconds("vitdeploy_request_seconds", "From the decoded request to its answer.")
        self.queue_seconds = seconds("vitdeploy_queue_seconds", "Waiting for a free session.")
        self.compute_seconds = seconds("vitdeploy_compute_seconds", "One run of the session.")
        self.batch = histogram("vitdeploy_batch_size", "Images that ran together.", buckets=_SIZES)
        self.images = counter("vitdeploy_images", "Images that were run.")
        self.padding = counter("vitdeploy_padding_images", "Images run only to fill a batch up.")
        self.queue = gauge("vitdeploy_queue_images", "Images that wait.")
        self.reloads = outcomes("vitdeploy_loads", "Loads of a bundle by how they ended.")
        self._text: Callable[[CollectorRegistry], bytes] = prometheus.generate_latest
        self.content_type = prometheus.CONTENT_TYPE_LATEST

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return self._text(self.registry)


@dataclass
class Statistics:
    """Of one version of one model, since it was loaded."""

    metrics: Metrics
    name: str
    version: str
    inferences: int = 0
    executions: int = 0
    last: int = 0
    """Milliseconds since 1970 of the last request."""
    durations: dict[str, Duration] = field(default_factory=lambda: defaultdict(Duration))
    batches: dict[int, Duration] = field(default_factory=lambda: defaultdict(Duration))

    def __post_init__(self) -> None:
        labels = (self.name, self.version)
        self._seconds = self.metrics.seconds.labels(*labels)
        self._queue_seconds = self.metrics.queue_seconds.labels(*labels)
        self._compute_seconds = self.metrics.compute_seconds.labels(*labels)
        self._batch = self.metrics.batch.labels(*labels)
        self._images = self.metrics.images.labels(*labels)
        self._padding = self.metrics.padding.labels(*labels)
        self._queue = self.metrics.queue.labels(*labels)
        # labels() checks and looks up its arguments under a lock each time.
        self._outcome = cache(lambda outcome: self.metrics.requests.labels(*labels, outcome))

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
        self.durations["queue"].add(answer.waited)
        self.durations["compute_infer"].add(answer.computed)
        self._queue_seconds.observe(answer.waited)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around a request, from its arrival to its answer."""
        begin, outcome = time.perf_counter(), "ok"
        self.last = round(1000 * time.time())
        try:
            yield
        except RequestError as error:
            outcome = error.kind
            raise
        except BaseException:  # the client went away
            outcome = "cancelled"
            raise
        finally:
            seconds = time.perf_counter() - begin
            self.durations["success" if outcome == "ok" else "fail"].add(seconds)
            self._outcome(outcome).inc()
            if outcome == "ok":
                self._seconds.observe(seconds)

    def as_dict(self) -> dict[str, Any]:
        """As the v2 statistics extension has it."""
        names = (
            *("success", "fail", "queue", "compute_input", "compute_infer", "compute_output"),
            *("cache_hit", "cache_miss"),
        )
        nothing = Duration().as_dict()
        return {
            "name": self.name,
            "version": self.version,
            "last_inference": self.last,
            "inference_count": self.inferences,
            "execution_count": self.executions,
            "inference_stats": {name: self.durations[name].as_dict() for name in names},
            "batch_stats": [
                {
                    "batch_size": size,
                    "compute_input": nothing,
                    "compute_infer": duration.as_dict(),
                    "compute_output": nothing,
                }
                for size, duration in sorted(self.batches.items())
            ],
        }
