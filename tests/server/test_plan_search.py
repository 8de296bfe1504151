"""The search for a plan, with sessions that cost what a table says, by a clock that only they move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitdeploy.errors import BundleError
from vitdeploy.machine.processors import Share
from vitdeploy.server.plan_search import Cell, Search, Sizes, batch_sizes

ONE, TWO = Share(1, None), Share(2, 1)
SIZES = Sizes((1, 2, 4, 8))


@dataclass(eq=False)
class Session:
    """Knows its share only."""

    share: Share
    closed: bool = False

    def close(self) -> None:
        self.closed = True


@dataclass
class Machine:
    """Runs sessions in no time."""

    cost: Callable[[Share, int], float]
    """Seconds of a run, while all sessions of the share run."""
    opening: float = 0.1
    sizes: Sizes = SIZES
    refused: tuple[Share, ...] = ()
    breaks_at: int = 1 << 30
    """Batch at which a run fails."""
    now: float = 0.0
    longest: float = 0.0
    """Seconds of the longest single thing that was done."""
    opened: list[Session] = field(default_factory=list)
    measured: list[tuple[Share, int]] = field(default_factory=list)

    def spend(self, seconds: float) -> None:
        self.now += seconds
        self.longest = max(self.longest, seconds)

    def open(self, share: Share) -> list[Session]:
        self.spend(self.opening)
        if share in self.refused:
            raise BundleError(f"no {share.sessions}")
        found = [Session(share) for _ in range(share.sessions)]
        self.opened += found
        return found

    def probe(self, sessions: Sequence[Any], batch: int, count: int) -> list[tuple[float, ...]]:
        assert not any(session.closed for session in sessions)
        if batch >= self.breaks_at:
            raise BundleError("out of memory")
        seconds = self.cost(sessions[0].share, batch)
        self.spend(count * seconds)
        self.measured.append((sessions[0].share, batch))
        return [(seconds,) * count for _ in sessions]

    def search(
        self, shares: Sequence[Share] = (ONE, TWO), seconds: float = 10.0, max_latency: float | None = None
    ) -> Cell:
        """The best plan; it is one that was measured, and only its sessions are open."""
        search = Search(
            self.open, lambda _: self.sizes, self.probe, seconds, max_latency, clock=lambda: self.now
        )
        cell, sessions = search.run(shares)
        assert (cell.share, cell.batch) in self.measured
        assert [s for s in self.opened if not s.closed] == list(sessions)
        assert {session.share for session in sessions if isinstance(session, Session)} == {cell.share}
        return cell


def table(per_image: dict[tuple[Share, int], float]) -> Callable[[Share, int], float]:
    """From images per second."""
    return lambda share, batch: share.sessions * batch / per_image[share, batch]


VIT_B = {  # ONNX Runtime in fp32 on two processors
    (ONE, 1): 11.0, (ONE, 2): 10.9, (ONE, 4): 10.8, (ONE, 8): 10.7,
    (TWO, 1): 11.8, (TWO, 2): 11.6, (TWO, 4): 11.4, (TWO, 8): 10.8,
}  # fmt: skip
OPENVINO = {
    (ONE, 1): 19.2, (ONE, 2): 23.0, (ONE, 4): 25.0, (ONE, 8): 25.9,
    (TWO, 1): 18.0, (TWO, 2): 22.0, (TWO, 4): 26.6, (TWO, 8): 26.0,
}  # fmt: skip


def test_a_slow_model_gets_its_plan_within_the_time() -> None:
    machine = Machine(table(VIT_B), opening=1.0)
    best = machine.search()
    assert (best.share, best.batch) == (TWO, 1)
    assert best.rate == pytest.approx(11.8)
    assert machine.now <= 10 + machine.longest
    other = Machine(table(OPENVINO), opening=1.0).search()
    assert (other.share, other.batch) == (TWO, 4)


def test_a_tiny_model_is_done_sooner() -> None:
    machine = Machine(lambda share, batch: 1e-4 * (0.5 + 0.5 * batch) * share.sessions)
    assert machine.search().batch == 8
    assert machine.now < 3


def test_of_level_plans_the_one_of_lower_latency() -> None:
    """One session takes half as long as two, for as many images per second; within 2 % they are level."""
    assert Machine(lambda share, batch: 0.01 * batch * share.sessions).search().share == ONE
    slower = {ONE: 1.015, TWO: 1.0}
    found = Machine(lambda share, batch: 0.01 * batch * share.sessions * slower[share]).search()
    assert (found.share, found.batch) == (ONE, 1)
    slower[ONE] = 1.03
    found = Machine(lambda share, batch: 0.01 * batch * share.sessions * slower[share]).search()
    assert (found.share, found.batch) == (TWO, 1)


def test_larger_batches_are_looked_at_while_they_gain() -> None:
    sizes = Sizes((1, 2), (4, 8, 16))
    assert sizes == batch_sizes(1, 2, 16)
    gaining = Machine(lambda share, batch: 1 + 0.1 * batch, sizes=sizes)
    assert gaining.search([ONE], 1e6).batch == 16
    level = Machine(lambda share, batch: 0.1 * max(batch, 2), sizes=sizes)
    assert level.search([ONE], 1e6).batch == 2
    assert max(batch for _, batch in level.measured) == 4


def test_the_latency_bound() -> None:
    bounded = Machine(table(OPENVINO))
    found = bounded.search(max_latency=0.17)
    assert (found.share, found.batch) == (ONE, 4), "25 images/s at 0.16 s; batch 4 of two takes 0.3 s"
    machine = Machine(table(OPENVINO))
    nearest = machine.search(max_latency=0.001)
    assert (nearest.share, nearest.batch) == (ONE, 1), "nothing keeps it: the least there is"
    assert nearest.p99 == pytest.approx(1 / 19.2)


def test_what_does_not_run_is_left_out() -> None:
    assert Machine(table(VIT_B), refused=(TWO,)).search().share == ONE
    assert Machine(table(OPENVINO), breaks_at=4).search().batch == 2
    nothing = Machine(table(VIT_B), refused=(ONE, TWO))
    with pytest.raises(BundleError, match="no 2"):
        nothing.search()
    broken = Machine(table(VIT_B), breaks_at=1)
    with pytest.raises(BundleError, match="out of memory"):
        broken.search()
    assert all(session.closed for session in broken.opened)


@given(
    costs=st.dictionaries(st.tuples(st.integers(0, 4), st.integers(0, 5)), st.floats(1e-5, 30), min_size=30),
    count=st.integers(1, 5),
    seconds=st.floats(0.01, 60),
    opening=st.floats(0, 5),
    limit=st.none() | st.floats(1e-5, 30),
)
def test_it_ends_in_time_with_what_was_measured(
    costs: dict[tuple[int, int], float], count: int, seconds: float, opening: float, limit: float | None
) -> None:
    """Beyond its seconds it finishes what it began, and looks at least at one plan: what is opened is looked
    at once, which is three runs of the smallest batch at most."""
    shares = [Share(n + 1, None) for n in range(count)]
    machine = Machine(
        lambda share, batch: costs.get((share.sessions - 1, batch.bit_length() - 1), 1.0),
        opening,
        Sizes((1, 2, 4), (8, 16, 32)),
    )
    machine.search(shares, seconds, limit)
    assert machine.now <= seconds + opening + 3 * machine.longest


@given(st.integers(1, 64), st.integers(0, 64), st.integers(0, 200))
def test_batch_sizes(least: int, more: int, most: int) -> None:
    usual = least + more
    sizes = batch_sizes(least, usual, usual + most)
    assert list(sizes.usual) == sorted(set(sizes.usual))
    assert (sizes.usual[0], sizes.usual[-1]) == (least, usual)
    assert list(sizes.larger) == sorted({*sizes.larger} - {*sizes.usual})
    assert (sizes.larger or sizes.usual)[-1] == usual + most
