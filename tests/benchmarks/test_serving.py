"""The load test measures what it says: times count from when a request was due, ratios are of one round."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks.serving import run
from benchmarks.serving.arrivals import ideal_latencies
from benchmarks.serving.claims import FLAGSHIP
from benchmarks.serving.driving import Driver, Served, alone, read_trace
from benchmarks.serving.load import arrivals
from benchmarks.serving.processes import processor_seconds
from benchmarks.serving.raw import Sessions, plans, run_seconds
from benchmarks.serving.record import SCHEMA, read, write
from benchmarks.serving.rounds import difference
from benchmarks.serving.servers import loaded
from benchmarks.serving.settings import PARTS
from benchmarks.serving.subjects import Asked
from tests.helpers.paths import ROOT
from tests.helpers.processes import wait_for
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


def test_the_time_of_a_run_follows_from_those_of_other_sizes() -> None:
    seconds = {1: 0.2, 4: 0.6, 8: 1.4}
    assert [run_seconds(size, seconds) for size in (1, 2, 6, 8, 16)] == pytest.approx(
        [0.2, 1 / 3, 1, 1.4, 2.8]
    )
    assert run_seconds(2, {8: 1.6}) == pytest.approx(0.4)
    assert difference({1: 5, 8: 2}, {1: 5, 8: 4, 3: 1}) == {8: 2, 3: 1}


def test_the_processors_are_one_session_s_or_one_for_each() -> None:
    assert plans(2) == (Sessions(1, 2), Sessions(2, 1))
    assert plans(1) == (Sessions(1, 1),)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_a_session_s_processor_time_has_its_children_s() -> None:
    """A parent that sleeps, and a child that works, as the system counts it for the child itself."""
    work = "while time.process_time() < 0.4: pass"
    child = f"import time\n{work}\nprint(1, flush=True)\ntime.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    command = [sys.executable, "-c", parent]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        spent = processor_seconds(process.pid)
        os.killpg(process.pid, signal.SIGKILL)
    assert 0.35 < spent < 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_servers_stand_still_while_another_is_measured() -> None:
    """Three that work all the time; the one that is measured does on, and all do afterwards."""
    work = "print(1, flush=True)\nwhile True: pass"
    with contextlib.ExitStack() as stack:
        found = []
        for name in ("ours", "peer", "load"):
            process = stack.enter_context(
                subprocess.Popen([sys.executable, "-c", work], stdout=subprocess.PIPE, start_new_session=True)
            )
            stack.callback(process.kill)
            assert process.stdout is not None
            process.stdout.readline()
            found.append(Served(name, 1, {}, {}, session=process.pid))
        with alone(found[0], found):
            assert wait_for(lambda: states(found) == "RTT", 60)
        assert wait_for(lambda: "T" not in states(found), 60)
        with alone(None, found):
            assert wait_for(lambda: states(found) == "TTT", 60)


def states(servers: Sequence[Served]) -> str:
    """Of each server's process a letter of proc(5)."""
    paths = [Path(f"/proc/{server.session}/stat") for server in servers]
    return "".join(path.read_text().rpartition(")")[2].split()[0] for path in paths)


def test_a_perfect_server() -> None:
    """Alone, one behind the other, and together; a batch takes as long as its images, plus one."""
    due = np.array([0.0, 10.0, 10.5, 11.0, 11.0, 11.0])
    found = ideal_latencies(due, lambda size: 1.0 + size, 2)
    assert found.tolist() == [2000.0, 2000.0, 4500.0, 4000.0, 7000.0, 7000.0]
    both = ideal_latencies(due, lambda size: 1.0 + size, 1, 2)  # free at 2, 12 and 12.5, then 14 and 14.5
    assert both.tolist() == [2000.0, 2000.0, 2000.0, 3000.0, 3500.0, 5000.0]


def test_what_a_server_says_of_how_it_runs(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("  load model    0.2 s  version 1\nserving http://127.0.0.1:8000\n")
    assert loaded(log) == "load model 0.2 s version 1"
    log.write_text(f"  note: model: plan: 2 sessions of 1 thread, batch 1\n{log.read_text()}")
    assert loaded(log) == "plan: 2 sessions of 1 thread, batch 1"


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = run.parse(["--models", "digits", "--peers", "", "--seconds", "1", "-o", str(tmp_path)])
    assert (wanted.models, wanted.peers, wanted.parts) == (("digits",), (), PARTS)
    assert wanted.plan("digits").seconds == 1
    assert wanted.file("digits") == tmp_path / "serve-digits.json"
    whole = run.parse([])
    assert whole.plan(FLAGSHIP).overload
    assert whole.plan(FLAGSHIP).optimized
    assert not run.parse(["--peers", "fastapi"]).plan(FLAGSHIP).optimized
    assert whole.plan(FLAGSHIP).image_rounds < run.parse(["--rounds", "9"]).plan(FLAGSHIP).image_rounds == 9
    wrong = (["--models", "digitz"], ["--peers", "torchserve"], ["--parts", "shut"], ["--rounds", "0"])
    for words in (*wrong, ["--seconds", "-1"]):
        with pytest.raises(UsageError):
            run.parse(words)
    assert run.main(["--models", "digits", "-o", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_part_needs_what_it_is_a_share_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--models", "digits", "--parts", "open", "-o", str(tmp_path)]) == 2
    assert "measure closed, too" in capsys.readouterr().err
    part = {"lanes": {}, "batches": [], "raw": []}
    file = tmp_path / "serve-digits.json"
    write({"schema_version": SCHEMA, "closed": {"tensor": part}}, file)
    assert run.parse(["--parts", "open", "-o", str(tmp_path)]).kept("digits") == read(file)
    write({"schema_version": SCHEMA - 1, "closed": {"tensor": part}}, file)
    assert run.parse(["-o", str(tmp_path)]).kept("digits") == {}


def test_the_load_needs_the_standard_library_only() -> None:
    program = "import sys, benchmarks.serving.load; print({'numpy', 'aiohttp', 'vitdeploy'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
