"""Starting, draining, dying, coming back: no accepted request is lost on the way."""

from __future__ import annotations

import http.client
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from tests.helpers.bundles import WEIGHT, answer, write_bundle
from tests.helpers.commands import in_a_process
from tests.helpers.live_server import (
    PATIENCE,
    Asking,
    Live,
    Reply,
    binary_request,
    free_port,
    held,
    json_request,
    logits_of,
    serving,
)
from tests.helpers.processes import wait_for

INFER, PREDICT = "/v2/models/linear/infer", "/v1/models/linear:predict"
PIXELS = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)
REQUEST = binary_request(PIXELS)
GATHERING = ("--max-batch", 8, "--max-delay-ms")
"""Requests wait for company for so long: a way to have some in the queue at a certain moment."""


def infer(client: Any) -> Any:
    return client.ask("POST", INFER, REQUEST.body, **REQUEST.headers)


def require_right(live: Live) -> None:
    require_right_reply(infer(live))


def require_right_reply(reply: Reply) -> None:
    assert np.allclose(logits_of(reply), answer(PIXELS), rtol=1e-4, atol=1e-4)


def require_draining(live: Live) -> None:
    """Wait until the server has heard that it is to end."""
    assert wait_for(lambda: live.ask("GET", "/v2/health/ready").status == 503, PATIENCE)


@dataclass
class Load:
    """Clients that ask without a break until they are refused; what became of each request is kept."""

    live: Live
    clients: int
    kind: str = "http"
    outcomes: list[tuple[float, str]] = field(default_factory=list)
    """When each was sent, and how it ended."""
    stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Load:
        work = self._http if self.kind == "http" else self._grpc
        self._threads = [threading.Thread(target=work) for _ in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()

    def _http(self) -> None:
        client = http.client.HTTPConnection("127.0.0.1", self.live.port, timeout=PATIENCE)
        headers = {name.replace("_", "-"): value for name, value in REQUEST.headers.items()}
        while not self.stop.is_set():
            try:
                if client.sock is None:
                    client.connect()
            except ConnectionRefusedError:
                self.outcomes.append((time.perf_counter(), "refused"))
                return
            sent = time.perf_counter()
            try:
                client.request("POST", INFER, REQUEST.body, headers)
                sent = time.perf_counter()
                reply = client.getresponse()
                reply.read()
                self.outcomes.append((sent, str(reply.status)))
            except (OSError, http.client.HTTPException) as error:
                self.outcomes.append((sent, f"lost ({type(error).__name__})"))
                return

    def _grpc(self) -> None:
        library = tritonclient.grpc
        tensor = library.InferInput("pixel_values", [1, 3, 8, 8], "FP32").set_data_from_numpy(PIXELS)
        with library.InferenceServerClient(self.live.grpc) as client:
            while not self.stop.is_set():
                sent = time.perf_counter()
                try:
                    client.infer("linear", [tensor])
                    self.outcomes.append((sent, "200"))
                except InferenceServerException as error:
                    told = "shutting down" in (error.message() or "")
                    self.outcomes.append((sent, "503" if told else f"lost ({error})"))
                    return


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["http", "grpc"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_loses_no_accepted_request(linear: Path, kind: str, number: int) -> None:
    """Whatever was sent before the signal is answered: with its result, or that the server is leaving."""
    for delay in (0, 60):
        with serving(linear, *GATHERING, delay) as server, Load(server, 12, kind) as load:
            assert wait_for(lambda: len(load.outcomes) > 20, PATIENCE)
            told = time.perf_counter()
            server.signal(number)
            assert server.wait() == 0
            said = server.said()
        assert f"stopped by signal {int(number)}, every accepted request answered" in said
        assert "Traceback" not in said, said
        before = Counter(outcome for sent, outcome in load.outcomes if sent < told)
        after = Counter(outcome for sent, outcome in load.outcomes if sent >= told)
        assert set(before) <= {"200", "503"}, (before, after)
        assert before["200"] > 10
        assert before.total() + after.total() == len(load.outcomes)


@pytest.mark.slow
def test_draining(linear: Path) -> None:
    """What is in hand is finished; the rest hears 503 and when to come back, over http and grpc."""
    with held(linear, "--drain", "5m") as (server, gate), server.client() as other, server.client() as health:
        assert health.ask("GET", "/v2/health/ready").status == 200
        assert other.ask("GET", "/v2").status == 200
        asking = Asking(server, REQUEST)
        gate.require_reached()
        server.signal()
        require_draining(server)
        ready = health.ask("GET", "/v2/health/ready")
        assert (ready.status, ready.document) == (503, {"ready": False})
        reply = infer(other)
        assert (reply.status, reply.error) == (503, "the server is shutting down")
        assert int(reply.headers["retry-after"]) >= 1
        assert infer(server).status == 503  # a new connection is told as well
        assert server.ask("POST", PREDICT, b"x").status == 503
        assert server.ask("GET", "/v2/health/live").status == 200
        with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
            assert client.is_server_live()
            assert not client.is_server_ready()
            tensor = tritonclient.grpc.InferInput("pixel_values", [1, 3, 8, 8], "FP32")
            with pytest.raises(InferenceServerException, match="shutting down") as caught:
                client.infer("linear", [tensor.set_data_from_numpy(PIXELS)])
            assert caught.value.status() == "StatusCode.UNAVAILABLE"
        gate.open()
        require_right_reply(*asking.replies())
        assert server.wait() == 0
        assert "every accepted request answered" in server.said()


@pytest.mark.slow
def test_draining_ends_in_time(linear: Path) -> None:
    """A request that would wait for minutes does not hold the server for longer than it was told."""
    flags = (*GATHERING, 60_000, "--drain", "1s", "--timeout", "10m")
    with serving(linear, *flags) as server:
        asking = Asking(server, REQUEST)
        server.require_queued(1)
        server.signal()
        (reply,) = asking.replies()
        assert (reply.status, reply.error) == (503, "the server is shutting down")
        assert server.wait() == 0
        assert "Traceback" not in server.said()
        assert "not all was answered within 1s" in server.said()


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(linear: Path) -> None:
    """Although a request is in hand that is never answered."""
    with (
        held(linear, "--drain", "5m") as (server, gate),
        socket.create_connection(("127.0.0.1", server.port)) as waiting,
    ):
        length = REQUEST.headers["Inference_Header_Content_Length"]
        head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(REQUEST.body)}\r\n"
        waiting.sendall(f"{head}Inference-Header-Content-Length: {length}\r\n\r\n".encode() + REQUEST.body)
        gate.require_reached()
        server.signal()
        require_draining(server)
        assert server.process.poll() is None
        server.signal(signal.SIGINT)
        assert server.wait() == 128 + signal.SIGINT


@pytest.mark.slow
def test_killed_and_started_again_on_the_same_port(linear: Path) -> None:
    port = free_port()
    with serving(linear, port=port) as server, server.client() as client:
        assert infer(client).status == 200
        server.signal(signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
    with serving(linear, port=port) as server:
        require_right(server)


@pytest.mark.slow
def test_two_servers_on_one_port(live: Live, linear: Path) -> None:
    taken = in_a_process("serve", linear, "--plan-seconds", 0, "--port", live.port)
    assert taken.code == 2
    assert f"cannot listen on 127.0.0.1 port {live.port}: Address already in use" in taken.err
    assert "--port 0 takes any free one" in taken.err
    port = live.grpc.rpartition(":")[2]
    taken = in_a_process("serve", linear, "--plan-seconds", 0, "--port", 0, "--grpc-port", port)
    assert taken.code == 2
    assert f"cannot listen on 127.0.0.1 port {port} for gRPC" in taken.err
    for result in (
        taken,
        in_a_process("serve", linear, "--plan-seconds", 0, "--port", 0, "--host", "256.0.0.1"),
    ):
        assert result.code == 2
        assert "Traceback" not in result.err
    require_right(live)


@pytest.mark.slow
def test_a_bundle_that_answers_wrongly_is_not_served(tmp_path: Path, linear: Path) -> None:
    """Not one of several, either; and nothing was served meanwhile."""
    wrong = write_bundle(tmp_path / "wrong.bundle", weight=(WEIGHT * 1.001).astype(np.float32)).root
    result = in_a_process("serve", linear, wrong, "--port", 0, "--plan-seconds", 0)
    assert result.code == 5
    assert "onnx-fp32 on onnxruntime is not served: its outputs are wrong at batch 1" in result.err
    assert f"vitdeploy verify {wrong}" in result.err
    assert "serving http" not in result.err


@pytest.mark.slow
def test_a_full_queue(linear: Path) -> None:
    """429 with the time to come back at, however it is asked; and then all is well again."""
    with held(linear, "--max-queue", 4, "--timeout", "10m") as (server, gate):
        running = Asking(server, REQUEST)
        gate.require_reached()
        waiting = Asking(server, REQUEST, 4)
        server.require_queued(4)
        with server.client() as client:
            for _ in range(15):
                reply = infer(client)
                assert (reply.status, reply.error) == (429, "Exceeds maximum queue size")
                assert 1 <= int(reply.headers["retry-after"]) <= 30
            assert client.ask("POST", PREDICT, b"x").status == 429
        with tritonclient.grpc.InferenceServerClient(server.grpc) as told:
            tensor = tritonclient.grpc.InferInput("pixel_values", [1, 3, 8, 8], "FP32")
            with pytest.raises(InferenceServerException, match="Exceeds maximum queue size") as caught:
                told.infer("linear", [tensor.set_data_from_numpy(PIXELS)])
            assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
        gate.open()
        for reply in (*running.replies(), *waiting.replies()):
            require_right_reply(reply)
        require_right(server)


@pytest.mark.slow
def test_deadlines(linear: Path) -> None:
    """The server's, and a client's own, which may only be shorter; both while no session is free."""
    with held(linear, "--timeout", "0.5s") as (server, gate):
        running = Asking(server, REQUEST)
        gate.require_reached()
        for timeout, limit in ((None, "0.5"), (100_000, "0.1"), (60_000_000, "0.5")):
            parameters = {} if timeout is None else {"parameters": {"timeout": timeout}}
            reply = server.ask("POST", INFER, json_request(PIXELS, **parameters).body)
            assert (reply.status, reply.error) == (504, f"no session was free within {limit} s")
        library = tritonclient.grpc
        with library.InferenceServerClient(server.grpc) as client:
            tensor = library.InferInput("pixel_values", [1, 3, 8, 8], "FP32").set_data_from_numpy(PIXELS)
            for how in ({"timeout": 100_000}, {"client_timeout": 0.1}):
                with pytest.raises(InferenceServerException) as caught:
                    client.infer("linear", [tensor], **how)
                assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
        gate.open()
        require_right_reply(*running.replies())


@pytest.mark.slow
def test_an_engine_for_another_gpu(digits: Path, tmp_path: Path) -> None:
    """Built for real, for a GPU that this machine does not have."""
    folder = Path(shutil.copytree(digits, tmp_path / "digits.bundle"))
    built = in_a_process("engine", folder, "--format", "tensorrt-rtx", "--arch", "sm_89")
    assert built.code == 0, built.err
    result = in_a_process("serve", folder, "--port", 0, "--backend", "tensorrt-rtx")
    assert result.code == 3, result.err
    assert "Traceback" not in result.err
    assert "serving http" not in result.err
