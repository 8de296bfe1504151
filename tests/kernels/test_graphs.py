"""Captures and turns: in which order a device is told what, by one thread and by several."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.fakes.torch_streams import FakeCuda
from vitdeploy_kernels.graphs import Turns, capture

GPU = torch.device("cuda", 1)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def test_a_capture_leaves_other_threads_alone_and_has_a_workspace_of_its_own(cuda: FakeCuda) -> None:
    cuda.use("mine")
    capture(lambda: cuda.log.append("run"), GPU)
    assert cuda.log == [
        "on cuda:1",
        "side 1 waits for mine",
        "run",
        "synchronize cuda:1",
        "clear workspaces",
        "capture on side 1, thread_local",
        "run",
        "clear workspaces",
    ]


def test_captures_of_several_threads_take_turns(cuda: FakeCuda) -> None:
    def run() -> None:
        time.sleep(0.002)

    with ThreadPoolExecutor(4) as pool:
        graphs = list(pool.map(lambda _: capture(run, GPU), range(8)))
    assert len(graphs) == 8
    assert sum(line.startswith("capture") for line in cuda.log) == 8


def test_a_capture_that_fails_lets_the_next_one_in(cuda: FakeCuda) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        capture(fail, GPU)
    capture(lambda: None, GPU)


def test_a_stream_waits_for_what_another_has_queued(cuda: FakeCuda) -> None:
    turns = Turns(GPU)
    for name in ("first", "second"):
        cuda.use(name)
        with turns.turn():
            cuda.log.append(f"work of {name}")
    assert cuda.log == [
        *("on cuda:1", "first waits for event 1", "work of first", "event 1 on first"),
        *("on cuda:1", "second waits for event 1", "work of second", "event 1 on second"),
    ]


def test_a_turn_that_fails_ends(cuda: FakeCuda) -> None:
    turns = Turns(GPU)
    with pytest.raises(ValueError, match="bad"), turns.turn():
        raise ValueError("bad")
    assert cuda.log[-1] == "event 1 on default"
    with turns.turn():
        pass


@pytest.mark.parametrize("device", [GPU, torch.device("cpu")])
def test_turns_of_several_threads_do_not_overlap(cuda: FakeCuda, device: torch.device) -> None:
    turns, inside, worst = Turns(device), threading.Semaphore(0), []

    def call(_: int) -> None:
        with turns.turn():
            inside.release()
            time.sleep(0.001)
            worst.append(inside._value)
            inside.acquire()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(12)))
    assert worst == [1] * 12


def test_buffers_of_two_runners_have_turns_of_their_own(cuda: FakeCuda) -> None:
    one, other = Turns(GPU), Turns(GPU)
    with one.turn(), other.turn():
        pass
    assert [line for line in cuda.log if "waits" in line] == [
        "default waits for event 1",
        "default waits for event 2",
    ]
