"""Counters, gauges and histograms for Prometheus, so cheap that each request can be counted several times.

prometheus_client's own are safe between threads, with a lock for each number; these live on the event loop.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Generic, TypeVar


class Value:
    """A number that grows, or one that is set."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, by: float = 1.0) -> None:
        self.value += by

    def set(self, value: float) -> None:
        self.value = value


class Histogram:
    """How many values there were up to each bound, and their sum.

    Args:
        bounds: ascending; a value that is equal to one is within it.
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, int]]:
        """As Prometheus has them: each bound, and how many values are within it."""
        names = [*map(str, map(float, self.bounds)), "+Inf"]
        return list(zip(names, accumulate(self.counts), strict=True))


_One = TypeVar("_One", Value, Histogram)


class Family(Generic[_One]):
    """What is counted under one name, for each combination of its labels' values.

    Args:
        make: one of them.
        metric: makes what prometheus_client calls a metric family, without samples.
    """

    def __init__(self, make: Callable[[], _One], metric: Callable[[], Any]) -> None:
        self._make: Callable[[], _One] = make
        self._metric = metric
        self._all: dict[tuple[str, ...], _One] = {}

    def labels(self, *values: str) -> _One:
        """The one of these labels: always the same."""
        if values not in self._all:
            self._all[values] = self._make()
        return self._all[values]

    def collect(self) -> Iterator[Any]:
        """As prometheus_client reads its collectors."""
        metric = self._metric()
        for values, one in self._all.items():
            if isinstance(one, Histogram):
                metric.add_metric(values, one.buckets(), one.sum)
            else:
                metric.add_metric(values, one.value)
        yield metric
