"""MLPerf's LoadGen on the servers: its scenarios, its verdicts, and its accuracy mode on all golden inputs.

LoadGen (mlcommons-loadgen, in an environment of its own) decides when samples are due, measures the latencies
and says whether a run is valid. Runs are shorter than MLPerf's rules ask, which the record says; all else is
as they have it: SingleStream asks for one image after the other, Offline gives all samples at once, Server
has random arrivals and bounds a percentile of the latencies.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.environments import ROOT, EnvironmentFailure, ensure, requirements
from benchmarks.serving.checking import why_wrong
from benchmarks.serving.driving import Driver, Served, alone
from benchmarks.serving.processes import ServerFailure
from benchmarks.serving.servers import OURS
from benchmarks.serving.settings import MLPERF_PERCENTILE, MLPERF_SECONDS, Plan
from benchmarks.serving.subjects import Subject, logits_of
from vitdeploy.backends.base import Array
from vitdeploy.progress import Progress

ENVIRONMENT = "loadgen"
SERVER_RATES = (0.8, 0.65, 0.5, 0.35)
"""Of the Offline scenario's throughput: the first that is valid is the Server scenario's result."""
PER_S: Mapping[str, str] = {
    "SingleStream": "QPS w/ loadgen overhead",
    "Offline": "Samples per second",
    "Server": "Completed samples per second",
}
"""The scenarios, and what their summary calls images per second."""
_LEAST_QUERIES = 64
"""Of SingleStream, for its 90th percentile."""
_CONFIDENCE = 0.99
"""With which LoadGen wants to know that a percentile is within its bound."""
_PATIENCE = 180.0
"""Seconds of a run, at most."""
_NUMBER = re.compile(r"^(.+?)\s*:\s*(-?[\d.]+(?:e[+-]?\d+)?)$")
_UNMET = re.compile(r"^(.+?) satisfied\s*: NO$")
_PERCENTILES = ("50", "90", "99")


def measure(
    lanes: Sequence[tuple[Served, Subject]],
    running: Sequence[Served],
    expected: Mapping[str, float],
    plan: Plan,
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Drive every server in every scenario; returns that part of the record.

    Args:
        lanes: servers, and what they serve.
        running: whatever is to stand still meanwhile, the servers themselves among them.
        expected: images per second of each, where they are known, for LoadGen to ask for enough.

    Raises:
        ServerFailure: LoadGen cannot be installed, or fails on our own server.
    """
    try:
        python = ensure(ENVIRONMENT)
    except EnvironmentFailure as error:
        raise ServerFailure(str(error)) from error
    order, found, skipped = list(lanes), {}, {}
    random.Random(f"{plan.seed} loadgen").shuffle(order)
    for server, subject in order:
        with progress.stage(f"LoadGen: {server.name}"), alone(server, running):
            lane = _Lane(server, subject, plan, folder, python)
            try:
                found[server.name] = lane.measure(expected.get(server.name))
            except ServerFailure as error:
                if server.name == OURS:
                    raise
                skipped[server.name] = str(error)
    return {
        "version": _version(),
        "settings": {
            "min_duration_s": plan.loadgen_seconds,
            "mlperf_min_duration_s": MLPERF_SECONDS,
            "connections": plan.clients,
            "server_bound_ms": plan.bound_ms,
            "server_percentile": plan.loadgen_percentile,
            "mlperf_server_percentile": MLPERF_PERCENTILE,
        },
        "lanes": {server.name: found[server.name] for server, _ in lanes if server.name in found},
        "skipped": skipped,
    }


def _version() -> str:
    (line,) = (line for line in requirements(ENVIRONMENT).read_text().splitlines() if "loadgen==" in line)
    return line.partition("==")[2]


class _Lane:
    """LoadGen on one server."""

    def __init__(self, server: Served, subject: Subject, plan: Plan, folder: Path, python: Path) -> None:
        self._server, self._subject, self._plan = server, subject, plan
        self._folder, self._python = folder, python
        self._driver = Driver(folder)

    def measure(self, expected: float | None) -> dict[str, Any]:
        """Accuracy, then the scenarios."""
        accuracy = self._accuracy()
        single = self._performance("SingleStream", min_query_count=_LEAST_QUERIES)
        offline = self._offline(expected or single["per_s"])
        tries: list[dict[str, Any]] = []
        while len(tries) < len(SERVER_RATES) and not (tries and tries[-1]["valid"]):
            tries.append(self._server_scenario(SERVER_RATES[len(tries)] * offline["per_s"]))
        return {"accuracy": accuracy, "SingleStream": single, "Offline": offline, "Server": tries}

    def _accuracy(self) -> dict[str, Any]:
        """Every sample once, and every answer against the float64 reference."""
        folder = self._test("Offline", "AccuracyOnly", {"offline_expected_qps": 1.0})[0]
        entries = json.loads((folder / "mlperf_log_accuracy.json").read_text(encoding="utf-8"))
        return accuracy_of(entries, self._subject)

    def _offline(self, per_s: float) -> dict[str, Any]:
        """LoadGen gives as many samples as are expected to take long enough: more, until they do."""
        while True:
            figures = self._performance("Offline", offline_expected_qps=per_s, min_query_count=1)
            if figures["per_s"] <= per_s or "min duration" not in figures["reasons"]:
                return figures
            per_s = figures["per_s"]

    def _server_scenario(self, rate: float) -> dict[str, Any]:
        percentile = self._plan.loadgen_percentile
        figures = self._performance(
            "Server",
            server_target_qps=rate,
            server_target_latency_ns=round(1e6 * self._plan.bound_ms),
            server_target_latency_percentile=percentile,
            min_query_count=math.ceil(math.log(1 - _CONFIDENCE) / math.log(percentile)),
        )
        return {"target_per_s": round(rate, 3), **figures}

    def _performance(self, scenario: str, **settings: float) -> dict[str, Any]:
        milliseconds = round(1000 * self._plan.loadgen_seconds)
        folder, told = self._test(scenario, "PerformanceOnly", {"min_duration_ms": milliseconds, **settings})
        found = read_summary((folder / "mlperf_log_summary.txt").read_text(encoding="utf-8"))
        if told["failed"]:
            found["reasons"].append(f"{told['failed']} requests failed")
        return {**found, "valid": found["valid"] and not told["failed"], "load_cpu": told["cpu"]}

    def _test(self, scenario: str, mode: str, settings: Mapping[str, float]) -> tuple[Path, dict[str, Any]]:
        server, logs = self._server, self._folder / "loadgen"
        logs.mkdir(exist_ok=True)
        for old in logs.iterdir():
            old.unlink()
        asked = server.asks["tensor"]
        job = {
            "host": "127.0.0.1",
            "port": server.port,
            "path": asked.path,
            "headers": dict(asked.headers),
            "bodies": self._driver.bodies(server, "tensor"),
            "connections": self._plan.clients,
            "scenario": scenario,
            "mode": mode,
            "settings": settings,
            "logs": str(logs),
        }
        try:
            done = subprocess.run(
                [str(self._python), "-m", "benchmarks.serving.mlperf_sut"],
                input=json.dumps(job),
                capture_output=True,
                text=True,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                timeout=_PATIENCE,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ServerFailure(f"LoadGen on {server.name}: no end after {_PATIENCE:g} s") from error
        if done.returncode:
            raise ServerFailure(f"LoadGen on {server.name}: {' '.join(done.stderr.split())[-300:]}")
        return logs, json.loads(done.stdout.splitlines()[-1])


def read_summary(text: str) -> dict[str, Any]:
    """What LoadGen's summary says.

    Args:
        text: of its file ``mlperf_log_summary.txt``.

    Returns:
        ``valid``, and ``reasons`` why it is not; images ``per_s``; ``latency_ms`` by percentile.
    """
    lines = [line.strip(" *") for line in text.splitlines()]
    numbers = {match[1]: float(match[2]) for line in lines if (match := _NUMBER.match(line))}
    words = dict(line.split(" : ", 1) for line in lines if " : " in line)
    scenario = words["Scenario"].strip()
    return {
        "valid": words["Result is"].strip() == "VALID",
        "reasons": [match[1].lower() for line in lines if (match := _UNMET.match(line))],
        "per_s": round(numbers[PER_S[scenario]], 3),
        "latency_ms": {p: round(numbers[f"{p}.00 percentile latency (ns)"] / 1e6, 3) for p in _PERCENTILES},
    }


def accuracy_of(entries: Sequence[Mapping[str, Any]], subject: Subject) -> dict[str, Any]:
    """The verdict on what LoadGen logged in its accuracy mode.

    Args:
        entries: of its file ``mlperf_log_accuracy.json``.

    Returns:
        How many ``samples`` there are, how many are ``answered``, and what is ``wrong`` with their logits,
        taken together; empty if nothing.
    """
    rows: dict[int, Array] = {}
    for entry in entries:
        row = _logits(bytes.fromhex(entry["data"]), subject)
        if row is not None:
            rows[entry["qsl_idx"]] = row
    count = len(subject.pixels)
    if missing := count - len(rows):
        return {"samples": count, "answered": len(rows), "wrong": f"{missing} not answered"}
    wrong = why_wrong(subject, np.stack([rows[index] for index in range(count)]))
    return {"samples": count, "answered": count, "wrong": wrong}


def _logits(data: bytes, subject: Subject) -> Array | None:
    """The logits of an answer: numbers as they are, or a JSON object that has them; None is neither."""
    width = subject.reference[0].size
    if len(data) == 4 * width:
        return np.frombuffer(data, "<f4")
    try:
        return logits_of(data, {}, subject.output)
    except ValueError:
        return None
