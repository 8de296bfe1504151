"""What of ``torch.cuda`` queues, captures and waits, without a GPU: it writes down what it is told."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
import torch


class FakeCuda:
    """Takes the place of streams, events and graphs; ``log`` has what was called, in order.

    As on a GPU, each thread has current streams of its own, and capturing twice at once is an error.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.capturing = 0
        self._streams = 0
        self._events = 0
        self._local = threading.local()
        for name in ("device", "stream", "graph", "synchronize", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        for name, made in (("Stream", self._stream), ("Event", self._event), ("CUDAGraph", self._graph)):
            monkeypatch.setattr(torch.cuda, name, made)
        clear = lambda: self.log.append("clear workspaces")  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)

    def use(self, name: str) -> FakeStream:
        """Make a stream of this name the current one of this thread."""
        self._local.stream = FakeStream(self, name)
        return self._local.stream

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.log.append(f"on {device}")
        yield

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self._local.stream = self.current_stream(None), stream
        yield
        self._local.stream = before

    @contextlib.contextmanager
    def graph(self, graph: FakeGraph, *, stream: FakeStream, capture_error_mode: str) -> Iterator[None]:
        assert not self.capturing, "a capture within a capture"
        self.capturing += 1
        self.log.append(f"capture on {stream.name}, {capture_error_mode}")
        yield
        self.capturing -= 1

    def synchronize(self, device: torch.device) -> None:
        self.log.append(f"synchronize {device}")

    def current_stream(self, device: torch.device | None) -> FakeStream:
        return getattr(self._local, "stream", None) or FakeStream(self, "default")

    def _stream(self, device: torch.device) -> FakeStream:
        self._streams += 1
        return FakeStream(self, f"side {self._streams}")

    def _event(self) -> FakeEvent:
        self._events += 1
        return FakeEvent(self, f"event {self._events}")

    def _graph(self) -> FakeGraph:
        return FakeGraph()


class FakeGraph:
    """Holds nothing: what is captured is run by the test."""


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self._cuda, self.name = cuda, name

    def wait_stream(self, other: FakeStream) -> None:
        self._cuda.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: FakeEvent) -> None:
        self._cuda.log.append(f"{self.name} waits for {event.name}")


class FakeEvent:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self._cuda, self.name = cuda, name

    def synchronize(self) -> None:
        self._cuda.log.append(f"wait for {self.name}")

    def record(self, stream: FakeStream) -> None:
        self._cuda.log.append(f"{self.name} on {stream.name}")
