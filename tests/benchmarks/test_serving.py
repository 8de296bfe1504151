"""The load test measures what it says: times count from when a request was due, ratios are of one round."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.serving import record, run
from benchmarks.serving.arrivals import ideal_latencies
from benchmarks.serving.driving import Driver, Served, read_trace
from benchmarks.serving.load import arrivals
from benchmarks.serving.raw import per_second
from benchmarks.serving.rounds import difference
from benchmarks.serving.subjects import Asked
from tests.helpers.paths import ROOT
from vitdeploy.errors import UsageError

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Server:
    """One request at a time; it stalls once, and can refuse."""

    def __init__(self, stall: float = 0.0, answer: bytes = ANSWER) -> None:
        self._stall, self._answer = stall, answer
        self._turn = threading.Lock()
        self.requests = 0
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._answer_all, args=(connection,), daemon=True).start()

    def _answer_all(self, connection: socket.socket) -> None:
        with connection:
            received = b""
            while data := connection.recv(1 << 16):
                received += data
                if not received.endswith(b"body"):
                    continue
                received = b""
                with self._turn:
                    self.requests += 1
                    if self.requests == 20:
                        time.sleep(self._stall)
                connection.sendall(self._answer)

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)  # wakes accept, which would keep it open
        self._listening.close()

    @property
    def served(self) -> Served:
        return Served("test", self.port, {"tensor": Asked("/", {}, [b"a body", b"another body"])}, {})


@pytest.mark.slow
def test_a_stall_is_seen_by_everyone_who_was_due_meanwhile(tmp_path: Path) -> None:
    """At 200 requests per second a stall of half a second concerns 100, not the one that met it."""
    server = Server(stall=0.5)
    trace = Driver(tmp_path).open(server.served, "tensor", [(200.0, 1.5)], "constant", 0)
    server.close()
    latencies = trace.latencies(200)
    assert len(latencies) == server.requests
    assert abs(len(latencies) - 299) <= 1
    assert trace.failed == 0
    assert 450 < latencies.max() < 900
    assert 60 < (latencies > 150).sum() < 140
    assert np.median(latencies[-100:]) < 50
    assert trace.figures()["requests"] == len(latencies)


@pytest.mark.slow
def test_closed_loop_keeps_each_client_at_one_request(tmp_path: Path) -> None:
    server = Server()
    trace = Driver(tmp_path).closed(server.served, "tensor", 4, 0.5)
    server.close()
    assert trace.failed == 0
    overlapping = max((trace.sent <= moment).sum() - (trace.done <= moment).sum() for moment in trace.sent)
    assert overlapping <= 4
    # Requests that were due in half a second; on a busy machine the last are answered later.
    assert 0.2 * len(trace.due) / 0.5 < trace.per_second() < 1.25 * len(trace.due) / 0.5
    assert 0 < trace.cpu < 1.5


@pytest.mark.slow
def test_refusals_and_lost_connections_are_no_answers(tmp_path: Path) -> None:
    refusing = Server(answer=b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n")
    trace = Driver(tmp_path).open(refusing.served, "tensor", [(100.0, 0.3)], "constant", 0)
    refusing.close()
    assert set(trace.status) == {429}
    assert trace.failed == len(trace.due)
    assert len(trace.latencies(429)) == len(trace.due)
    nobody = Served("nobody", refusing.port, {"tensor": Asked("/", {}, [b"body"])}, {})
    trace = Driver(tmp_path).open(nobody, "tensor", [(100.0, 0.3)], "constant", 0)
    assert set(trace.status) == {0}
    assert trace.figures()["latency_ms"] == {}


def test_arrivals() -> None:
    assert list(arrivals("constant", [(10, 0.35), (100, 0.025)], 0)) == pytest.approx(
        [0.1, 0.2, 0.3, 0.36, 0.37]
    )
    due = np.array(list(arrivals("poisson", [(1000, 20)], 1)))
    gaps = np.diff(due)
    assert len(due) == pytest.approx(20000, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert list(arrivals("poisson", [(1000, 20)], 1)) == due.tolist()


def test_throughput_of_answers_that_come_in_batches() -> None:
    """8 answers every 0.7 s, from any moment on."""
    for begin in (0.0, 0.3, 0.69):
        done = begin + 0.7 * np.repeat(np.arange(20), 8)
        trace = read_trace(
            {"due": done - 1, "sent": done - 1, "done": done, "status": [200] * len(done), "cpu": 0.1}
        )
        assert trace.per_second() == pytest.approx(8 / 0.7)
        # A stall counts in full, wherever it is.
        stalled = np.where(np.arange(len(done)) < 144, done, done + 7)
        trace = read_trace(
            {"due": done - 1, "sent": done - 1, "done": stalled, "status": [200] * len(done), "cpu": 0.1}
        )
        assert trace.per_second() == pytest.approx(8 * 18 / (0.7 * 18 + 7))


def test_raw_throughput_is_that_of_the_batches_that_were_formed() -> None:
    assert per_second({8: 3, 2: 1}, {8: 0.8, 2: 0.4}) == pytest.approx(26 / 2.8)
    assert per_second({4: 1}, {2: 0.2, 8: 0.8}) == pytest.approx(10)
    assert per_second({8: 9, 1: 1}, {8: 1.6}) == pytest.approx(5)  # too rare to be measured
    assert difference({1: 5, 8: 2}, {1: 5, 8: 4, 3: 1}) == {8: 2, 3: 1}


def test_a_perfect_server() -> None:
    """Alone, one behind the other, and together; a batch takes as long as its images, plus one."""
    due = np.array([0.0, 10.0, 10.5, 11.0, 11.0, 11.0])
    found = ideal_latencies(due, lambda size: 1.0 + size, 2)
    assert found.tolist() == [2000.0, 2000.0, 4500.0, 4000.0, 7000.0, 7000.0]


def visit(per_s: float) -> dict[str, Any]:
    latency = {"50": 10.0, "99": 15.0}
    return {"per_s": per_s, "failed": 0, "latency_ms": latency, "load_cpu": 0.1, "requests": 100}


def flagship() -> dict[str, Any]:
    """A record that bears out everything."""
    ratio = {"median": 0.97, "q1": 0.96, "q3": 0.98, "pairs": 2}
    lanes = {name: [visit(rate)] for name, rate in (("vitdeploy", 9.7), ("the load alone", 1000.0))}
    part = {
        "lanes": lanes,
        "per_s": {"vitdeploy": [9.7], "the load alone": [1000.0], "raw session": [10.0]},
        "served_over": {"raw session": ratio},
    }
    tail = {"p50_ms": 90.0, "p99_ms": 120.0, "p99_over_p50": 1.33, "failed": 0}
    ideal = {"ideal": {"p50_ms": 84.0, "p99_ms": 84.0, "p99_over_p50": 1.0}}
    return {
        "model": record.FLAGSHIP,
        "environment": {"cpu": {"name": "a processor"}},
        "settings": {"threads": 2, "clients": 16, "rounds": 1, "seconds": 12.0},
        "skipped": [{"lane": "litserve", "reason": "no network"}],
        "closed": {"tensor": part, "image": json.loads(json.dumps(part))},
        "at_80_percent": {"rate": 7.8, "constant": {**tail, **ideal}, "poisson": {**tail, **ideal}},
        "highest_rate": {"bound_p99_ms": 1000, "rate": 6.0, "of_capacity": 0.6},
        "overload": {
            "requests": 400,
            "refused_429": 300,
            "refused_ms": {"p50": 3.0, "p99": 12.0, "max": 20.0},
            "other": 0,
            "recovery_s": 1.0,
            "before": visit(5.0),
            "after": visit(5.0),
        },
    }


def test_a_record_that_bears_everything_out(tmp_path: Path) -> None:
    found = flagship()
    assert record.broken_claims(found) == []
    record.write(found, tmp_path / "serve.json")
    assert record.read(tmp_path / "serve.json") == found
    assert max(map(len, (tmp_path / "serve.json").read_text().splitlines())) < 220
    table = record.table(found)
    assert "| raw session | 10.0 | 0.970 (0.960 to 0.980) |" in table
    assert "skipped litserve: no network" in table


@pytest.mark.parametrize(
    "path, value, said",
    [
        (("closed", "tensor", "served_over", "raw session", "median"), 0.94, "0.940 x raw session"),
        (("closed", "tensor", "served_over"), {}, "raw session was not measured"),
        (("closed", "image", "lanes", "vitdeploy", 0, "failed"), 3, "3 image requests to vitdeploy failed"),
        (("at_80_percent", "constant", "p99_over_p50"), 2.1, "p99 is 2.1 x p50"),
        (("at_80_percent", "constant", "failed"), 1, "1 failed"),
        (("overload",), None, "no overload was measured"),
        (("overload", "refused_429"), 0, "no overload was measured"),
        (("overload", "refused_ms", "p99"), 51.0, "after 51.0 ms"),
        (("overload", "other"), 2, "2 requests of the overload"),
        (("overload", "recovery_s"), 6.0, "no recovery"),
        (("overload", "after", "latency_ms", "50"), 16.0, "no recovery"),
    ],
)
def test_a_record_that_does_not(path: tuple[str | int, ...], value: Any, said: str) -> None:
    found = json.loads(json.dumps(flagship()))
    place: Any = found
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert any(said in claim for claim in record.broken_claims(found)), record.broken_claims(found)


def test_digits_are_held_against_fastapi() -> None:
    found = {**flagship(), "model": "digits"}
    assert record.broken_claims(found) == ["digits: fastapi was not measured"]
    found["closed"]["tensor"]["served_over"]["fastapi"] = {"median": 1.4, "q1": 1.4, "q3": 1.4, "pairs": 5}
    assert record.broken_claims(found) == ["digits: 1.400 x fastapi instead of 1.5 x"]


def test_a_load_that_limits_itself_is_no_result() -> None:
    found = flagship()
    found["closed"]["tensor"]["lanes"]["vitdeploy"][0]["load_cpu"] = 0.97
    assert record.broken_claims(found) == []
    found["closed"]["tensor"]["per_s"]["the load alone"] = [10.0]
    assert record.broken_claims(found) == [f"{record.FLAGSHIP}: the load itself limits tensor requests"]


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = run.parse(["--models", "digits", "--peers", "", "--seconds", "1", "-o", str(tmp_path)])
    assert (wanted.models, wanted.peers) == (("digits",), ())
    assert wanted.plan("digits").seconds == 1
    assert wanted.file("digits") == tmp_path / "serve-digits.json"
    assert run.parse([]).plan(record.FLAGSHIP).overload
    for words in (["--models", "digitz"], ["--peers", "torchserve"], ["--rounds", "0"], ["--seconds", "-1"]):
        with pytest.raises(UsageError):
            run.parse(words)
    assert run.main(["--models", "digits", "-o", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_the_load_needs_the_standard_library_only() -> None:
    program = "import sys, benchmarks.serving.load; print({'numpy', 'aiohttp', 'vitdeploy'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
