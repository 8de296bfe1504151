"""Times calls in turns: device time by events on a GPU, the host's clock elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]


def stretch(call: Call, count: int) -> float:
    """Milliseconds per call of ``count`` calls in a row."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for _ in range(count):
            call()
        return 1e3 * (time.perf_counter() - start) / count
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(count):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / count


def in_turns(calls: Mapping[str, Call], *, rounds: int, least_ms: float) -> dict[str, list[float]]:
    """Milliseconds per call and round: A B C, C B A, ..., so that all see the same clocks and temperature.

    Args:
        calls: warm contestants by name.
        rounds: samples of each.
        least_ms: that a stretch takes about; short calls are repeated.
    """
    counts = {}
    for name, call in calls.items():
        call()
        counts[name] = max(round(least_ms / max(stretch(call, 1), 1e-3)), 1)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            samples[name].append(stretch(calls[name], counts[name]))
    return samples


class Deadline:
    """Seconds that are left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()
