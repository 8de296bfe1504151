"""What a watch over a live server exports for Prometheus."""

from __future__ import annotations

import importlib
from typing import Any

from vitdeploy.errors import MissingDependency, UsageError
from vitdeploy.verification.live.report import LiveReport

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class WatchMetrics:
    """Metrics in a registry of their own, served over HTTP while it is open.

    Args:
        port: where; 0 is any free one. All of the machine's addresses are listened on.

    Raises:
        MissingDependency: prometheus_client is not installed.
        UsageError: the port is not free.
    """

    def __init__(self, port: int, *, bundle: str, url: str) -> None:
        try:
            prometheus: Any = importlib.import_module("prometheus_client")
        except ImportError as error:
            raise MissingDependency("prometheus_client", extra="serve", purpose="--metrics-port") from error
        registry = prometheus.CollectorRegistry()

        def named(kind: str, name: str, text: str, *labels: str, **more: Any) -> Any:
            return getattr(prometheus, kind)(
                f"vitdeploy_live_{name}", text, labels, registry=registry, **more
            )

        self._rounds = named("Counter", "rounds", "Rounds of verification.")
        self._failures = named("Counter", "failures", "Rounds that failed.", "reason")
        for reason in ("mismatch", "unreachable"):
            self._failures.labels(reason)
        self._passed = named("Gauge", "passed", "1 if the last round passed.")
        self._success = named(
            "Gauge", "last_success_timestamp_seconds", "When a round last passed, in seconds since 1970."
        )
        self._error = named(
            "Gauge", "max_relative_error", "Largest relative error of the last round's golden tensors."
        )
        self._latency = named("Histogram", "latency_seconds", "Of single-image calls.", buckets=_SECONDS)
        named("Info", "target", "What is compared with what.").info({"bundle": bundle, "url": url})
        try:
            self._server, _ = prometheus.start_http_server(port, registry=registry)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise UsageError(
                f"--metrics-port {port}: cannot be listened on: {why}", hint="0 takes any free one"
            ) from error

    @property
    def port(self) -> int:
        """Where they are served."""
        return int(self._server.server_port)

    def passed(self, report: LiveReport, now: float) -> None:
        """A round that ended well, at ``now`` in seconds since 1970."""
        self._compared(report)
        self._passed.set(1)
        self._success.set(now)

    def mismatched(self, report: LiveReport) -> None:
        """A round that found something wrong."""
        self._compared(report)
        self._failures.labels("mismatch").inc()
        self._passed.set(0)

    def unreachable(self) -> None:
        """A round in which the server could not be asked."""
        self._rounds.inc()
        self._failures.labels("unreachable").inc()
        self._passed.set(0)

    def close(self) -> None:
        """Stop serving them."""
        self._server.shutdown()
        self._server.server_close()

    def _compared(self, report: LiveReport) -> None:
        self._rounds.inc()
        if report.worst is not None:
            self._error.set(report.worst)
        for seconds in report.latency.seconds if report.latency else ():
            self._latency.observe(seconds)
