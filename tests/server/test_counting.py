"""Numbers for Prometheus, held against prometheus_client's own."""

from __future__ import annotations

from functools import partial
from typing import Any

import prometheus_client
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import metrics_core

from vitdeploy.server.counting import Family, Histogram, Value

BOUNDS = (0.001, 0.25, 1, 30.0)
LABELS = ("model", "version")
values = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from(BOUNDS) | st.floats(0.0, 100.0)), max_size=30
)


def lines(registry: prometheus_client.CollectorRegistry) -> list[str]:
    """What is scraped, without the moments at which prometheus_client's own were made."""
    text = prometheus_client.generate_latest(registry).decode().splitlines()
    return sorted(line for line in text if "_created" not in line)


@given(values)
def test_what_is_scraped_is_what_prometheus_client_counts(given: list[tuple[str, float]]) -> None:
    ours, theirs = prometheus_client.CollectorRegistry(), prometheus_client.CollectorRegistry()
    client: Any = prometheus_client
    counter = client.Counter("c", "Counted.", LABELS, registry=theirs)
    gauge = client.Gauge("g", "Set.", LABELS, registry=theirs)
    histogram = client.Histogram("h", "Seen.", LABELS, registry=theirs, buckets=BOUNDS)
    kinds = metrics_core
    counted = Family(Value, partial(kinds.CounterMetricFamily, "c", "Counted.", labels=LABELS))
    level = Family(Value, partial(kinds.GaugeMetricFamily, "g", "Set.", labels=LABELS))
    seen = Family(
        partial(Histogram, BOUNDS), partial(kinds.HistogramMetricFamily, "h", "Seen.", labels=LABELS)
    )
    for family in (counted, level, seen):
        ours.register(family)  # type: ignore[arg-type]
    for model, value in given:
        counter.labels(model, "1").inc(value)
        gauge.labels(model, "1").set(value)
        histogram.labels(model, "1").observe(value)
        counted.labels(model, "1").inc(value)
        level.labels(model, "1").set(value)
        seen.labels(model, "1").observe(value)
    assert lines(ours) == lines(theirs)
