"""Verification over and over: what ends it, what does not, and what it exports."""

from __future__ import annotations

import contextlib
import socket
import urllib.request
from collections.abc import Callable

import numpy as np
import pytest

from tests.fakes.v2_models import linear, served
from tests.fakes.v2_server import V2Server
from vitdeploy.bundle.folder import Bundle
from vitdeploy.errors import ParityError, UsageError
from vitdeploy.verification.live.round import LiveRequest, LiveVerification
from vitdeploy.verification.live.watch import WatchMetrics, WatchRound, WatchSummary, in_a_thread, watch


def run(
    bundle: Bundle,
    url: str,
    rounds: int,
    between: Callable[[WatchRound], None],
    metrics: WatchMetrics | None = None,
) -> WatchSummary:
    """That many rounds, one right after the other."""
    total = WatchSummary()

    def ended(done: WatchRound) -> None:
        between(done)
        if done.number == rounds:
            raise KeyboardInterrupt

    request = LiveRequest(url, calls=5, batches=[1])
    with LiveVerification(bundle, request) as whole, contextlib.suppress(KeyboardInterrupt):
        watch(whole, 0.01, ended=ended, metrics=metrics, total=total)
    return total


def samples(port: int) -> dict[str, float]:
    """What Prometheus would read."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    rows = [line.rpartition(" ") for line in lines if not line.startswith("#")]
    return {name: float(value) for name, _, value in rows}


def test_rounds_that_all_pass(bundle: Bundle) -> None:
    with V2Server({"linear": served()}) as server:
        total = run(bundle, server.url, 3, lambda done: None)
    assert (total.rounds, total.failures) == (3, 0)
    total.check()
    assert total.as_dict()["ok"] is True
    assert total.worst is not None
    assert len(total.medians_ms) == 3


@pytest.mark.slow
def test_a_server_that_breaks_goes_down_and_comes_back(bundle: Bundle) -> None:
    model = served()
    seen: list[tuple[bool, str]] = []
    metrics = WatchMetrics(0, bundle="abc", url="http://x")
    first = V2Server({"linear": model})
    first.__enter__()
    second = V2Server({"linear": served()}, port=first.port)

    def between(done: WatchRound) -> None:
        seen.append((done.passed, done.reason))
        if done.number == 1:
            model.versions["1"] = lambda x: linear()(x[:, ::-1])
        elif done.number == 2:
            first.__exit__()
        elif done.number == 3:
            second.__enter__()

    total = run(bundle, first.url, 4, between, metrics)
    try:
        assert [passed for passed, _ in seen] == [True, False, False, True]
        assert "likely cause: the answers are what the model gives for BGR tensors" in seen[1][1]
        assert "nothing listens there" in seen[2][1]
        assert (total.rounds, total.mismatches, total.unreachable) == (4, 1, 1)
        with pytest.raises(ParityError, match=r"2 of 4 rounds failed, the last of them at .*nothing listens"):
            total.check()
        assert total.as_dict()["last_failure"]["reason"] == seen[2][1]
        found = samples(metrics.port)
        assert found["vitdeploy_live_rounds_total"] == 4
        assert found['vitdeploy_live_failures_total{reason="mismatch"}'] == 1
        assert found['vitdeploy_live_failures_total{reason="unreachable"}'] == 1
        assert found["vitdeploy_live_passed"] == 1
        assert found["vitdeploy_live_last_success_timestamp_seconds"] > 1e9
        assert 0 < found["vitdeploy_live_max_relative_error"] < 1e-6
        assert found["vitdeploy_live_latency_seconds_count"] == 15
        assert found['vitdeploy_live_target_info{bundle="abc",url="http://x"}'] == 1
    finally:
        second.__exit__()
        metrics.close()


def test_the_bundle_cannot_be_watched_without_golden_data(bundle: Bundle) -> None:
    with V2Server({"linear": served()}) as server, LiveVerification(bundle, LiveRequest(server.url)) as whole:
        whole.subjects[0].golden = {}
        with pytest.raises(ParityError, match="no golden data"):
            watch(whole, 0.01, ended=lambda done: None)


def test_nothing_compared_is_no_success() -> None:
    with pytest.raises(ParityError, match="before the first round was over"):
        WatchSummary().check()
    assert WatchSummary().as_dict()["ok"] is False


def test_a_port_in_use() -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"--metrics-port {port}: cannot be listened on"):
            WatchMetrics(port, bundle="", url="")


def test_errors_come_out_of_the_thread() -> None:
    assert in_a_thread(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        in_a_thread(lambda: 1 // 0)


def test_nan_does_not_hide_in_the_summary(bundle: Bundle) -> None:
    with V2Server({"linear": served(lambda x: linear()(x) * np.float32(np.nan))}) as server:
        total = run(bundle, server.url, 1, lambda done: None)
    assert total.mismatches == 1
    assert total.as_dict()["max_relative_error"] is None
