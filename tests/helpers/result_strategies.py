"""Hypothesis: any measurement that the schema allows, hostile names and absent numbers included."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.helpers.sample_results import sample_results
from vitdeploy.benchmark.results import (
    Cell,
    CellAccuracy,
    MeasuredBundle,
    Parity,
    Results,
    SkippedCase,
    Startup,
)

HOSTILE = ("<script>alert(1)</script>", "a|b", "=1+1", "$x_1$", "@0@", "日本語", "a\nb", "", "&lt;", "</svg>")
texts = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=12))
times = st.one_of(st.floats(1e-3, 1e5), st.sampled_from((0.0, -1.0, 1e-300, 1e300)))
maybe_times = st.none() | times
batches = st.sampled_from((1, 2, 8, 100_000))

_parities = st.builds(
    Parity,
    passed=st.booleans(),
    failures=st.lists(texts, max_size=2).map(tuple),
    relative=st.none() | st.floats(0, 1e30),
    max_abs=maybe_times,
    tolerance=st.floats(1e-9, 1.0),
)
_accuracies = st.builds(
    CellAccuracy,
    images=st.integers(1, 10**6),
    top1=st.floats(0, 1),
    top5=st.none() | st.floats(0, 1),
    reference_top1=st.floats(0, 1),
    reference_top5=st.none(),
    top1_difference=st.floats(-1, 1),
    top1_interval=st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
)
_startups = st.builds(Startup, import_s=times, load_s=times, first_s=times, total_s=times)


def _cells(subjects: list[str]) -> st.SearchStrategy[Cell]:
    return st.builds(
        Cell,
        subject=st.sampled_from(subjects),
        backend=texts | st.just("torch"),
        provider=texts,
        artifact=texts,
        precision=st.sampled_from(("fp32", "fp16", "bf16", "mixed")),
        executes=texts,
        batch=batches,
        image_size=st.sampled_from(((8, 8), (224, 160))),
        threads=st.none() | st.integers(1, 64),
        concurrency=st.integers(1, 4),
        status=st.sampled_from(("ok", "failed")),
        reason=texts,
        p50_ms=maybe_times,
        p90_ms=maybe_times,
        p99_ms=maybe_times,
        mean_ms=maybe_times,
        spread=maybe_times,
        images_per_s=maybe_times,
        samples_ms=st.lists(times, max_size=6).map(tuple),
        device_p50_ms=maybe_times,
        disturbed=st.lists(texts, max_size=2).map(tuple),
        repeats=st.integers(0, 3),
        parity=st.none() | _parities,
        accuracy=st.none() | _accuracies,
        startup=st.none() | _startups,
        peak_memory_bytes=st.none() | st.integers(0, 2**50),
        size_bytes=st.none() | st.integers(0, 2**50),
    )


@st.composite
def measurements(draw: st.DrawFn, most_cells: int = 5) -> Results:
    names = draw(st.lists(texts, min_size=1, max_size=2, unique=True))
    subjects = tuple(
        MeasuredBundle(name=name, model=draw(texts), digest="sha256:0", image_size=(8, 8), parameters=1)
        for name in names
    )
    skipped = st.builds(SkippedCase, subject=texts, backend=texts, artifact=texts, reason=texts)
    return sample_results(
        command=draw(texts),
        subjects=subjects,
        cells=tuple(draw(st.lists(_cells(names), max_size=most_cells))),
        skipped=tuple(draw(st.lists(skipped, max_size=2))),
        notes=tuple(draw(st.lists(texts, max_size=2))),
        partial=draw(st.booleans()),
        rounds=draw(st.integers(0, 9)),
    )
