"""CUDA events of PyTorch without a GPU, on a clock that a test sets."""

from __future__ import annotations

import pytest
import torch


class CudaClock:
    """Takes the place of ``torch.cuda.Event`` and ``torch.cuda.current_stream`` for ``cuda:0``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        """Seconds."""
        self.records = 0
        monkeypatch.setattr(torch.cuda, "Event", self._event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")

    def _event(self, *, enable_timing: bool) -> FakeEvent:
        assert enable_timing
        return FakeEvent(self)


class FakeEvent:
    """Notes the time at once; it is read only after it was waited for."""

    def __init__(self, clock: CudaClock) -> None:
        self._clock = clock
        self._time: float | None = None
        self._waited = False

    def record(self, stream: str) -> None:
        assert stream == "stream of cuda:0"
        self._time = self._clock.now
        self._clock.records += 1

    def synchronize(self) -> None:
        self._waited = True

    def elapsed_time(self, end: FakeEvent) -> float:
        """Milliseconds."""
        assert end._waited
        assert self._time is not None
        assert end._time is not None
        return 1000 * (end._time - self._time)
