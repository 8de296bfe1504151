"""Who wins: the fastest that is right, the more exact of equals, int8 where it brings enough; and why."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.sample_results import SUBJECT, cell, failed_parity, sample_results
from vitdeploy.benchmark.results import Cell, CellAccuracy
from vitdeploy.bundle.dtypes import QUANTISED
from vitdeploy.errors import ParityError
from vitdeploy.optimiser.decision import (
    FAR,
    FINALISTS,
    QUANTISED_GAIN,
    Decision,
    cost,
    decide,
    gain,
    sieve,
)

NAME = SUBJECT.name
EVEN = {"round_samples": 1}


def contestant(precision: str = "fp32", p50: float = 10.0, **changes: Any) -> Cell:
    """A cell without noise."""
    given = {"artifact": f"onnx-{precision}", "precision": precision, "samples_ms": (p50,) * 8, **EVEN}
    return cell(p50_ms=p50, **{**given, **changes})


def decided(*cells: Cell, goal: Any = "latency", max_drop: float | None = None) -> Decision:
    return decide(sample_results(cells=cells), NAME, goal, max_drop)


def why(found: Decision, one: Cell) -> tuple[str, str]:
    (entry,) = [t for t in found.tried if (t.artifact, t.backend) == (one.artifact, one.backend)]
    return entry.verdict, entry.why


def test_int8_has_to_bring_enough() -> None:
    bf16 = contestant("bf16", 10.0, backend="openvino", threads=2)
    little, enough = (contestant("int8", p50, backend="openvino") for p50 in (9.26, 8.6))
    refused = decided(contestant(p50=20.0), bf16, little)
    assert refused.winner == bf16
    assert why(refused, little) == (
        "refused",
        "1.08x of openvino onnx-bf16, 2 threads: less than the 1.15x that int8 must bring",
    )
    taken = decided(contestant(p50=20.0), bf16, enough)
    assert taken.winner == enough
    assert why(taken, enough) == ("chosen", "2.33x of onnxruntime onnx-fp32")
    assert why(taken, bf16) == ("slower", "0.86x of openvino onnx-int8")


def test_a_quantised_one_on_each_runtime_is_judged_alone() -> None:
    quick, slow = contestant("int8", 5.0), contestant("int8", 9.5, backend="openvino")
    found = decided(contestant(), quick, slow)
    assert found.winner == quick
    assert why(found, slow) == (
        "refused",
        "1.05x of onnxruntime onnx-fp32: less than the 1.15x that int8 must bring",
    )


def test_what_is_wrong_or_failed_never_wins() -> None:
    wrong = contestant("bf16", 0.1, parity=failed_parity())
    unproven = contestant("fp16", 0.1, parity=None)
    failed = cell(status="failed", reason="out of memory", backend="torch")
    right = contestant(p50=50.0)
    found = decided(wrong, unproven, failed, right)
    assert found.winner == right
    assert why(found, wrong) == ("wrong", "relative error 8.3e-01 above 1.0e-02")
    assert why(found, unproven) == ("wrong", "it was not held against the reference")
    assert why(found, failed) == ("failed", "out of memory")
    with pytest.raises(ParityError, match=r"nothing to choose: onnxruntime onnx-bf16: relative error"):
        decided(wrong)


def test_equals_go_to_the_more_exact() -> None:
    exact, narrow = contestant(p50=10.1), contestant("bf16", 10.0)
    found = decided(narrow, exact)
    assert found.winner == exact
    assert why(found, narrow) == ("level", "1.01x of onnxruntime onnx-fp32: not told apart, and less exact")


def test_throughput_counts_all_sessions() -> None:
    one, two = (
        contestant(p50=80.0, batch=8),
        contestant(p50=120.0, batch=8, concurrency=2, backend="openvino"),
    )
    found = decided(one, two, goal="throughput")
    assert found.winner == two
    assert found.tried[0].label == "openvino onnx-fp32, 2 sessions"
    assert cost(two) == 120.0 / 16


def accuracy(difference: float) -> CellAccuracy:
    return CellAccuracy(
        images=400,
        top1=0.8 + difference,
        top5=None,
        reference_top1=0.8,
        reference_top5=None,
        top1_difference=difference,
        top1_interval=(difference - 0.02, difference + 0.02),
    )


def test_what_loses_too_much_accuracy_is_refused() -> None:
    fp32 = contestant(p50=20.0, accuracy=accuracy(0.0))
    int8 = contestant("int8", 5.0, accuracy=accuracy(-0.01))
    blind = contestant("bf16", 4.0)
    assert decided(fp32, int8, max_drop=1.0).winner == int8
    found = decided(fp32, int8, blind, max_drop=0.5)
    assert found.winner == fp32
    verdict, said = why(found, int8)
    assert (verdict, "1.00 points below the reference" in said) == ("refused", True)
    assert why(found, blind) == ("refused", "its accuracy could not be measured beside the reference's")
    with pytest.raises(ParityError, match=r"more than the 0.5 allowed"):
        decided(int8, max_drop=0.5)


def test_without_a_limit_int8_must_not_be_worse_beyond_doubt() -> None:
    fp32 = contestant(p50=20.0, accuracy=accuracy(-0.05))
    worse = contestant("int8", 5.0, accuracy=accuracy(-0.05))
    found = decided(fp32, worse)
    assert found.winner == fp32, "a float is as it is"
    verdict, said = why(found, worse)
    assert (verdict, "wholly beyond the 1 that 8 bits may cost" in said) == ("refused", True)
    doubtful = contestant("int8", 5.0, accuracy=accuracy(-0.02))
    assert decided(fp32, doubtful).winner == doubtful


CELLS = st.lists(
    st.tuples(
        st.sampled_from(("fp32", "fp16", "bf16", "int8", "fp8")),
        st.floats(1.0, 4.0),
        st.sampled_from(("right", "right", "wrong", "failed")),
    ),
    min_size=1,
    max_size=6,
)


def drawn(kinds: list[tuple[str, float, str]]) -> list[Cell]:
    made = []
    for place, (precision, p50, state) in enumerate(kinds):
        backend = f"runtime-{place}"
        if state == "failed":
            made.append(cell(status="failed", reason="gone", backend=backend, precision=precision))
        else:
            more = {"parity": failed_parity()} if state == "wrong" else {}
            made.append(contestant(precision, p50, backend=backend, **more))
    return made


@settings(max_examples=60)
@given(CELLS, st.randoms(use_true_random=False))
def test_the_winner_is_right_and_nothing_right_is_clearly_better(
    kinds: list[tuple[str, float, str]], order: Any
) -> None:
    cells = drawn(kinds)
    right = [one for one in cells if one.valid]
    if not right:
        with pytest.raises(ParityError):
            decided(*cells)
        return
    found = decided(*cells)
    winner, floats = found.winner, [one for one in right if one.precision not in QUANTISED]
    assert winner.valid
    assert [t.verdict == "chosen" for t in found.tried] == [True] + [False] * (len(cells) - 1)
    assert sorted(t.backend for t in found.tried) == sorted(one.backend for one in cells)
    assert all(t.why for t in found.tried)
    best = min(map(cost, floats), default=None)
    if winner.precision in QUANTISED:
        assert all(gain(winner, one) >= QUANTISED_GAIN or cost(one) > 1.02 * (best or 0) for one in floats)
        assert all(cost(winner) <= cost(one) for one in right if one.precision in QUANTISED)
    else:
        assert best is not None
        assert cost(winner) <= 1.02 * best + 1e-9
        assert all(gain(one, winner) < QUANTISED_GAIN for one in right if one.precision in QUANTISED)
    order.shuffle(cells)
    assert cost(decided(*cells).winner) == cost(winner)


@settings(max_examples=60)
@given(st.lists(CELLS, min_size=1, max_size=8))
def test_the_sieve_keeps_the_best_of_each_group_that_may_win(
    groups: list[list[tuple[str, float, str]]],
) -> None:
    # A group is one artifact on one runtime: one precision.
    made = [drawn([(group[0][0], p50, state) for _, p50, state in group]) for group in groups]
    cells = [one for group in made for one in group]
    found = sieve(made)
    kept = [cells[place] for place in found.finalists]
    assert len(kept) + len(found.tried) == len(cells)
    assert all(one.valid for one in kept)
    assert all(sum(one is member for one in kept for member in group) <= 1 for group in made)
    best = [min(right, key=cost) for group in made if (right := [one for one in group if one.valid])]
    if best:
        assert min(map(cost, kept)) == min(map(cost, best))
    for precision in ("fp32", "int8", "fp8"):
        of_it = [cost(one) for one in best if one.precision == precision]
        assert not of_it or min(of_it) in [cost(one) for one in kept]
    others = [one for one in kept if one.precision not in QUANTISED]
    assert len(others) <= FINALISTS + 1
    floats = [cost(one) for one in best if one.precision not in QUANTISED]
    assert all(cost(one) <= FAR * min(floats) for one in others if one.precision != "fp32")
    assert not floats or min(floats) == min(map(cost, others)), "what int8 has to beat"
