"""Times calls in turns, by events on the GPU; what a rehearsal has in its place measures nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vitdeploy_kernels.timing import Run, median, spread

Call = Callable[[], object]


def stretch(call: Call, count: int) -> float:
    """Milliseconds per call of ``count`` calls in a row, between two events on the GPU."""
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


def stand_in_turns(calls: Mapping[str, Call], *, rounds: int, least_ms: float) -> dict[str, list[float]]:
    """In place of :func:`in_turns`: every call once, and milliseconds that nobody measured."""
    for call in calls.values():
        call()
    return {name: [1.0 + place] * rounds for place, name in enumerate(calls)}


def stand_in_timer(contestants: Mapping[str, Sequence[Run]]) -> dict[str, list[float]]:
    """In place of ``timing.graph_timer``: every run once, and microseconds that nobody measured."""
    for runs in contestants.values():
        runs[0]()
    return {name: [1.0 + place] * 2 for place, name in enumerate(contestants)}


def summary(samples: Sequence[float], unit: str) -> dict[str, Any]:
    """Median, spread and the samples themselves, for a record."""
    return {
        f"median_{unit}": round(median(samples), 4),
        "spread": round(spread(samples), 4),
        f"samples_{unit}": [round(sample, 4) for sample in samples],
    }


def graphed(model: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], Tensor]:
    """A model as a CUDA graph that is called as a runner is: copies the images in, replays, copies out.

    On the CPU the model itself.
    """
    if images.device.type != "cuda":
        return lambda: model(images)
    # Here, because an earlier tree, whose kernels are timed one by one, may have none.
    from vitdeploy_kernels.graphs import capture

    held = images.clone()
    outputs: list[Tensor] = []
    graph = capture(lambda: outputs.append(model(held)), images.device)
    output = outputs[-1]

    def call() -> Tensor:
        held.copy_(images)
        graph.replay()
        return output.clone()

    return call


class Deadline:
    """Seconds that are left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()
