"""Live verification over and over, until it is interrupted."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from vitdeploy.errors import BundleError, MissingDependency, ParityError, VitdeployError
from vitdeploy.verification.live.metrics import WatchMetrics
from vitdeploy.verification.live.report import LiveReport
from vitdeploy.verification.live.round import LiveVerification

Result = TypeVar("Result")

CALLS = 20
"""For the latency of a round: fewer than of a single verification, so as not to be a load."""


@dataclass(frozen=True)
class Round:
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
class Watch:
    """All rounds together."""

    rounds: int = 0
    mismatches: int = 0
    unreachable: int = 0
    last: Round | None = None
    last_failure: Round | None = None
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

    def count(self, done: Round) -> None:
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


def watch(
    whole: LiveVerification,
    seconds: float,
    *,
    ended: Callable[[Round], None],
    metrics: WatchMetrics | None = None,
    total: Watch | None = None,
) -> None:
    """Compare every ``seconds``, from the beginning of one round to the next, until KeyboardInterrupt.

    A server that cannot be asked makes a round fail, and does not end the watch. All rounds run in one thread
    aside, so that an interruption is heard at once; the round that it meets is given up.

    Args:
        ended: is called after every round.
        total: every round is counted in it.

    Raises:
        BundleError, MissingDependency, ParityError: the bundle, or this machine, cannot go on.
        KeyboardInterrupt: that is how it ends.
    """
    stop = threading.Event()

    def rounds() -> Iterator[Round]:
        for number in itertools.count(1):
            begin = time.monotonic()
            yield _round(whole, number)
            if stop.wait(max(0.0, seconds - (time.monotonic() - begin))):
                return

    total = total if total is not None else Watch()
    try:
        for done in _aside(rounds()):
            total.count(done)
            if metrics is not None:
                _export(metrics, done)
            ended(done)
    finally:
        stop.set()


def in_a_thread(work: Callable[[], Result]) -> Result:
    """Run ``work`` in a thread of its own and wait for it, so that Ctrl-C is heard at once.

    The HTTP client's event loop would print a traceback where a signal reaches it.
    """
    return next(_aside(work() for _ in range(1)))


def _aside(results: Iterator[Result]) -> Iterator[Result]:
    """The same items, each made in one other thread, which does not keep the process alive."""
    made: queue.SimpleQueue[tuple[list[Result], BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            for result in results:
                made.put(([result], None))
            made.put(([], None))
        except BaseException as error:
            made.put(([], error))

    threading.Thread(target=run, name="live verification", daemon=True).start()
    while True:
        items, error = made.get()
        if error is not None:
            raise error
        if not items:
            return
        yield items[0]


def _round(whole: LiveVerification, number: int) -> Round:
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    try:
        return Round(number, now, whole.round())
    except (BundleError, MissingDependency, ParityError):
        raise
    except VitdeployError as error:
        return Round(number, now, None, error)


def _export(metrics: WatchMetrics, done: Round) -> None:
    if done.report is None:
        metrics.unreachable()
    elif done.passed:
        metrics.passed(done.report, time.time())
    else:
        metrics.mismatched(done.report)
