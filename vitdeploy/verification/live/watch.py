"""Live verification over and over, until it is interrupted."""

from __future__ import annotations

import importlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from vitdeploy.errors import BundleError, MissingDependency, ParityError, UsageError, VitdeployError
from vitdeploy.verification.live.report import LiveReport
from vitdeploy.verification.live.round import LiveVerification

_T = TypeVar("_T")

WATCH_LATENCY_CALLS = 20
"""For the latency of a round: fewer than of a single verification, so as not to be a load."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the latency histogram's buckets, in seconds."""


@dataclass(frozen=True)
class WatchRound:
    """One comparison of many."""

    number: int
    """From 1."""
    time: str
    """When it began: UTC, ``2026-11-21T03:00:00Z``."""
    report: LiveReport | None
    """None where the server could not be asked."""
    error: VitdeployError | None = None
    """Why it could not."""

    @property
    def passed(self) -> bool:
        return self.report is not None and self.report.passed

    @property
    def reason(self) -> str:
        """Why it failed, in one line; empty if it did not."""
        if self.error is not None:
            return self.error.message
        return "" if self.report is None else self.report.reason


@dataclass
class WatchSummary:
    """All rounds together."""

    rounds: int = 0
    mismatches: int = 0
    unreachable: int = 0
    last: WatchRound | None = None
    last_failure: WatchRound | None = None
    worst: float | None = None
    """The largest relative error of the golden tensors, of all rounds."""
    medians_ms: list[float] = field(default_factory=list)

    @property
    def failures(self) -> int:
        return self.mismatches + self.unreachable

    @property
    def passed(self) -> bool:
        """Whether there was a round, and each of them passed."""
        return self.rounds > 0 and not self.failures

    def check(self) -> None:
        """Raise if any round failed, or there was none.

        Raises:
            ParityError: says how many, and the last reason.
        """
        if self.last_failure is not None:
            last = self.last_failure
            how_many = f"{self.failures} of {self.rounds} rounds failed"
            raise ParityError(f"{how_many}, the last of them at {last.time}: {last.reason}")
        if not self.rounds:
            raise ParityError("interrupted before the first round was over, so nothing was compared")

    def count(self, done: WatchRound) -> None:
        """Add a round."""
        self.rounds += 1
        self.last = done
        if done.report is None:
            self.unreachable += 1
        elif not done.passed:
            self.mismatches += 1
        if not done.passed:
            self.last_failure = done
        if done.report is not None and done.report.worst is not None:
            self.worst = max(self.worst or 0.0, done.report.worst)
        if done.report is not None and done.report.latency is not None:
            self.medians_ms.append(done.report.latency.median_ms)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        failure = self.last_failure
        return {
            "ok": self.passed,
            "rounds": self.rounds,
            "mismatches": self.mismatches,
            "unreachable": self.unreachable,
            "max_relative_error": self.worst,
            "median_latency_ms": sorted(self.medians_ms)[len(self.medians_ms) // 2]
            if self.medians_ms
            else None,
            "last_failure": None if failure is None else {"time": failure.time, "reason": failure.reason},
            "last": None if self.last is None or self.last.report is None else self.last.report.as_dict(),
        }


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

    def record(self, done: WatchRound) -> None:
        """Count a round that is over."""
        self._rounds.inc()
        self._passed.set(done.passed)
        if done.passed:
            self._success.set(time.time())
        else:
            self._failures.labels("unreachable" if done.report is None else "mismatch").inc()
        if done.report is not None and done.report.worst is not None:
            self._error.set(done.report.worst)
        for seconds in done.report.latency.seconds if done.report and done.report.latency else ():
            self._latency.observe(seconds)

    def close(self) -> None:
        """Stop serving them."""
        self._server.shutdown()
        self._server.server_close()


def watch(
    verification: LiveVerification,
    seconds: float,
    *,
    ended: Callable[[WatchRound], None],
    metrics: WatchMetrics | None = None,
    total: WatchSummary | None = None,
) -> None:
    """Compare every ``seconds``, from the beginning of one round to the next, until KeyboardInterrupt.

    A server that cannot be asked makes a round fail, and does not end the watch. All rounds run in one other
    thread, so that an interruption is heard at once; the round that it meets is given up.

    Args:
        ended: is called after every round, before the next.
        total: every round is counted in it.

    Raises:
        BundleError, MissingDependency, ParityError: the bundle, or this machine, cannot go on.
        KeyboardInterrupt: that is how it ends.
    """
    total = total if total is not None else WatchSummary()
    begin = time.monotonic()
    for done in _in_one_thread(_round(verification, number) for number in itertools.count(1)):
        total.count(done)
        if metrics is not None:
            metrics.record(done)
        ended(done)
        time.sleep(max(0.0, seconds - (time.monotonic() - begin)))
        begin = time.monotonic()


def in_a_thread(work: Callable[[], _T]) -> _T:
    """Run ``work`` in a thread of its own and wait for it, so that Ctrl-C is heard at once.

    The HTTP client's event loop would print a traceback where a signal reaches it.
    """
    return next(_in_one_thread(work() for _ in range(1)))


def _in_one_thread(results: Iterator[_T]) -> Iterator[_T]:
    """The same items, each made when it is asked for, all in one other thread.

    One thread for all, because the HTTP client keeps an event loop for each that it meets. It does not keep
    the process alive.
    """
    asked = queue.SimpleQueue[bool]()
    made = queue.SimpleQueue[tuple[Sequence[_T], BaseException | None]]()

    def run() -> None:
        while asked.get():
            try:
                made.put((list(itertools.islice(results, 1)), None))
            except BaseException as error:
                made.put(((), error))

    threading.Thread(target=run, name="live verification", daemon=True).start()
    try:
        while True:
            asked.put(True)
            items, error = made.get()
            if error is not None:
                raise error
            if not items:
                return
            yield items[0]
    finally:
        asked.put(False)


def _round(verification: LiveVerification, number: int) -> WatchRound:
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    try:
        return WatchRound(number, now, verification.round())
    except (BundleError, MissingDependency, ParityError):
        raise
    except VitdeployError as error:
        return WatchRound(number, now, None, error)
