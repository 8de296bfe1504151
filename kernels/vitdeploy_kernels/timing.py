"""Times short GPU work: CUDA graphs, events, interleaved rounds, inputs that are not in the cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch

Run: TypeAlias = Callable[[], None]
Timer: TypeAlias = Callable[[Mapping[str, Sequence[Run]]], dict[str, list[float]]]
"""Times contestants, each the same work on several sets of inputs: microseconds per run, by round."""

ROUNDS = 15
LEAST = 300.0
"""Microseconds that one timed stretch takes at least: events are exact to about half of one."""


def input_sets(size: int, cache: int, most: int = 32) -> int:
    """How many sets of inputs of ``size`` bytes keep a cache from serving them."""
    return min(max(-(-2 * cache // max(size, 1)), 2), most)


def graph_timer(contestants: Mapping[str, Sequence[Run]]) -> dict[str, list[float]]:
    """The :data:`Timer` of a GPU.

    Each contestant's runs are captured in one CUDA graph, so that the host's time to launch does not count;
    graphs are replayed in turns, forwards and backwards, so that all see the same clocks and temperature.
    """
    graphs = {name: _capture(runs) for name, runs in contestants.items()}
    names = list(graphs)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(ROUNDS):
        events = []
        for name in names if turn % 2 else reversed(names):
            graph, count, replays = graphs[name]
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(replays):
                graph.replay()
            stop.record()
            events.append((name, start, stop, count * replays))
        torch.cuda.synchronize()
        for name, start, stop, count in events:
            samples[name].append(1000 * start.elapsed_time(stop) / count)
    return samples


def _capture(runs: Sequence[Run]) -> tuple[torch.cuda.CUDAGraph, int, int]:
    """A graph of all runs, their number, and how many replays make a stretch that can be timed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for run in runs:
            run()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    graph.replay()
    stop.record()
    torch.cuda.synchronize()
    once = max(1000 * start.elapsed_time(stop), 1.0)
    return graph, len(runs), max(round(LEAST / once), 1)


def median(samples: Sequence[float]) -> float:
    """In the samples' unit."""
    return float(statistics.median(samples))


def spread(samples: Sequence[float]) -> float:
    """Half the distance between the quartiles, as a share of the median."""
    low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else (samples[0],) * 3
    return (high - low) / 2 / median(samples)
