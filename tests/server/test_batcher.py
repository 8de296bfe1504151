"""The batcher alone: who runs with whom, what is refused when, and that nobody gets another's rows."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.clock import Clock, settled
from tests.helpers.sessions import Observed, Session, begun, busy, queued, rows, with_batcher
from vitdeploy.errors import BundleError
from vitdeploy.server import batcher as under_test
from vitdeploy.server.batcher import Batcher, BatchingRules
from vitdeploy.server.messages import RequestError


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """By which the batcher goes, too."""
    made = Clock()
    monkeypatch.setattr(under_test, "time", SimpleNamespace(perf_counter=made.time))
    return made


def test_what_waits_runs_together_in_the_order_of_its_arrival() -> None:
    session = Session()

    async def test(batcher: Batcher, observed: Observed) -> None:
        first = await busy(batcher, session)
        tasks = await queued(batcher, (1,), (2, 3), (4,), (5, 6), (7,))
        assert batcher.waiting == 7
        session.open.set()
        answers = await asyncio.gather(first, *tasks)
        for values, answer in zip(((-1,), (1,), (2, 3), (4,), (5, 6), (7,)), answers, strict=True):
            assert np.array_equal(answer.outputs["y"], 2 * rows(*values)["x"])
            assert np.array_equal(answer.outputs["z"], rows(*values)["x"].sum(axis=1, keepdims=True))
        assert [answer.batch for answer in answers] == [1, 4, 4, 4, 3, 3]
        assert all(answer.waited >= 0 and answer.computed > 0 for answer in answers)

    observed = with_batcher(test, session)
    assert [array[:, 0].tolist() for array in session.seen] == [[-1], [1, 2, 3, 4], [5, 6, 7]]
    assert observed.batches == [(1, 1), (4, 4), (3, 3)]
    assert max(observed.queue) == 7
    assert observed.queue[-1] == 0


def test_a_request_is_never_split_and_never_overtaken() -> None:
    session = Session()

    async def test(batcher: Batcher, observed: Observed) -> None:
        first = await busy(batcher, session)
        tasks = await queued(batcher, (1, 2, 3), (4, 5), (6,), tuple(range(10, 18)), (7,))
        session.open.set()
        await asyncio.gather(first, *tasks)

    with_batcher(test, session)
    assert session.sizes == [1, 3, 3, 8, 1]  # 8 rows are more than are gathered, so they run alone


def test_a_free_session_waits_for_company_only_so_long(clock: Clock) -> None:
    session = Session()

    async def test(batcher: Batcher, observed: Observed) -> None:
        alone = asyncio.create_task(batcher.submit(rows(1)))
        await clock.advance(0.0)
        await clock.advance(0.499)
        assert batcher.waiting == 1
        await clock.advance(0.001)
        assert (await alone).waited == pytest.approx(0.5)
        await asyncio.gather(*(batcher.submit(rows(value)) for value in range(4)))  # no time has passed
        early = asyncio.create_task(batcher.submit(rows(1)))
        await clock.advance(0.0)
        await clock.advance(0.3)
        late = asyncio.create_task(batcher.submit(rows(2)))
        await clock.advance(0.0)
        assert batcher.waiting == 2
        await clock.advance(0.2)
        assert (await early).batch == (await late).batch == 2

    with_batcher(test, session, rules=BatchingRules(gather=4, max_rows=4, delay=0.5), clock=clock)
    assert session.sizes == [1, 4, 2]


def test_nobody_waits_where_no_delay_is_asked_for() -> None:
    session = Session()

    async def test(batcher: Batcher, observed: Observed) -> None:
        for value in range(5):
            assert (await batcher.submit(rows(value))).batch == 1

    with_batcher(test, session)


def test_what_comes_without_a_pause_runs_together() -> None:
    """A free session lets the event loop hand over what is there, until that is a batch."""
    session = Session()

    async def test(batcher: Batcher, observed: Observed) -> None:
        await asyncio.gather(*await queued(batcher, *((number,) for number in range(6))))

    with_batcher(test, session)
    assert session.sizes == [4, 2]


@pytest.mark.parametrize("count, size", [(1, 2), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (9, 9)])
def test_batches_are_filled_up_to_the_buckets(count: int, size: int) -> None:
    session = Session()

    async def test(batcher: Batcher, observed: Observed) -> None:
        answer = await batcher.submit(rows(*range(count)))
        assert np.array_equal(answer.outputs["y"], 2 * rows(*range(count))["x"])
        assert answer.batch == count

    observed = with_batcher(test, session, rules=BatchingRules(gather=9, max_rows=9, buckets=(2, 4, 8)))
    assert session.sizes == [size]
    assert observed.batches == [(count, size)]
    assert (session.seen[0][count:] == session.seen[0][count - 1]).all()


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(clock: Clock) -> None:
    session = Session()

    async def test(batcher: Batcher, observed: Observed) -> None:
        known = await busy(batcher, session)
        await clock.advance(0.05)
        session.open.set()
        await known  # so that it knows its pace: 20 rows a second
        session.began.clear()
        first = await busy(batcher, session)
        tasks = await queued(batcher, (1, 2, 3), (4, 5))
        with pytest.raises(RequestError, match="Exceeds maximum queue size") as caught:
            await batcher.submit(rows(6, 7))
        assert caught.value.kind == "overloaded"
        assert caught.value.retry_after == pytest.approx(5 / 20)
        tasks += await queued(batcher, (6,))  # one row fits
        session.open.set()
        await asyncio.gather(first, *tasks)
        await batcher.submit(rows(6, 7))  # and now there is room again

    with_batcher(test, session, rules=BatchingRules(gather=4, max_rows=8, max_queue=6), clock=clock)


def test_too_many_rows_are_refused() -> None:
    async def test(batcher: Batcher, observed: Observed) -> None:
        with pytest.raises(RequestError, match="a batch of 9, but at most 8 are served") as caught:
            await batcher.submit(rows(*range(9)))
        assert caught.value.kind == "invalid"

    assert with_batcher(test, Session()).batches == []


def test_a_request_that_waits_too_long_is_given_up(clock: Clock) -> None:
    session = Session()

    async def test(batcher: Batcher, observed: Observed) -> None:
        first = await busy(batcher, session)
        own = asyncio.create_task(batcher.submit(rows(1), timeout=0.05))
        server = asyncio.create_task(batcher.submit(rows(2), timeout=60.0))
        await clock.advance(0.0)
        for task, seconds in ((own, 0.05), (server, 0.3)):
            await clock.advance(seconds - clock.time() - 0.001)
            assert not task.done()
            await clock.advance(0.001)
            with pytest.raises(RequestError, match=f"no session was free within {seconds:g} s") as caught:
                await task
            assert caught.value.kind == "timeout"
        assert batcher.waiting == 0
        session.open.set()
        await first

    with_batcher(test, session, rules=BatchingRules(gather=4, max_rows=8, timeout=0.3), clock=clock)
    assert session.sizes == [1]


def test_a_request_that_runs_is_not_given_up(clock: Clock) -> None:
    session = Session()
    session.open.clear()

    async def test(batcher: Batcher, observed: Observed) -> None:
        task = asyncio.create_task(batcher.submit(rows(1), timeout=0.1))
        await begun(session)
        await clock.advance(1.0)
        assert not task.done()
        session.open.set()
        assert np.array_equal((await task).outputs["y"], 2 * rows(1)["x"])

    with_batcher(test, session, clock=clock)


def test_a_cancelled_request_frees_its_place() -> None:
    session = Session()

    async def test(batcher: Batcher, observed: Observed) -> None:
        first = await busy(batcher, session)
        gone, stays = await queued(batcher, (1, 2, 3), (4,))
        with pytest.raises(RequestError):
            await batcher.submit(rows(5, 6))
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert batcher.waiting == 1
        late = await queued(batcher, (5, 6, 7))
        session.open.set()
        answers = await asyncio.gather(first, stays, *late)
        assert np.array_equal(answers[1].outputs["y"], 2 * rows(4)["x"])

    with_batcher(test, session, rules=BatchingRules(gather=4, max_rows=4, max_queue=4))
    assert session.sizes == [1, 4]


@pytest.mark.slow
def test_a_request_that_is_cancelled_while_it_runs_changes_nothing_for_the_others() -> None:
    session = Session()

    async def test(batcher: Batcher, observed: Observed) -> None:
        first = await busy(batcher, session)
        tasks = await queued(batcher, (1,), (2,), (3,))
        session.began.clear()
        session.open.set()
        session.seconds = 0.1
        await begun(session)
        tasks[1].cancel()
        answers = await asyncio.gather(first, tasks[0], tasks[2])
        assert [answer.outputs["y"][0, 0] for answer in answers] == [-2, 2, 6]

    with_batcher(test, session)
    assert session.sizes == [1, 3]


@pytest.mark.parametrize(
    "error, words",
    [
        (BundleError("no such operator", hint="x"), "no such operator"),
        (ValueError("a\n b"), "ValueError: a b"),
    ],
    ids=["ours", "foreign"],
)
def test_a_run_that_fails_says_so(error: Exception, words: str) -> None:
    session = Session(error=error)

    async def test(batcher: Batcher, observed: Observed) -> None:
        with pytest.raises(RequestError, match=f"^the run failed: {words}$") as caught:
            await batcher.submit(rows(1))
        assert caught.value.kind == "internal"

    assert with_batcher(test, session).batches == []


def test_a_run_that_fails_takes_only_its_own_batch_with_it() -> None:
    session = Session(fails_on=6)

    async def test(batcher: Batcher, observed: Observed) -> None:
        first = await busy(batcher, session)
        tasks = await queued(batcher, (1, 2), (3, 4), (5, 6), (7, 8), (9, 10))
        session.open.set()
        found = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert [isinstance(answer, RequestError) for answer in found] == [
            False,
            False,
            False,
            True,
            True,
            False,
        ]

    with_batcher(test, session)


def test_closing_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    session = Session()

    async def test(batcher: Batcher, observed: Observed) -> None:
        first = await busy(batcher, session)
        tasks = await queued(batcher, (1,), (2, 3), (4, 5))
        closing = asyncio.create_task(batcher.close())
        await settled()
        with pytest.raises(RequestError, match="being unloaded") as caught:
            await batcher.submit(rows(6))
        assert caught.value.kind == "unavailable"
        assert caught.value.retry_after is not None
        session.open.set()
        answers = await asyncio.gather(first, *tasks)
        assert [len(answer.outputs["y"]) for answer in answers] == [1, 1, 2, 2]
        await closing

    with_batcher(test, session)
    assert session.sizes == [1, 3, 2]


def test_what_waits_can_be_abandoned() -> None:
    session = Session()

    async def test(batcher: Batcher, observed: Observed) -> None:
        first = await busy(batcher, session)
        tasks = await queued(batcher, (1,), (2, 3))
        batcher.abandon()
        for task in tasks:
            with pytest.raises(RequestError, match="shutting down") as caught:
                await task
            assert caught.value.kind == "unavailable"
        session.open.set()
        assert np.array_equal((await first).outputs["y"], 2 * rows(-1)["x"])

    with_batcher(test, session)


def test_closing_does_not_wait_for_company() -> None:
    async def test(batcher: Batcher, observed: Observed) -> None:
        task = asyncio.create_task(batcher.submit(rows(1)))
        await settled()
        assert batcher.waiting == 1
        await batcher.close()
        assert np.array_equal((await task).outputs["y"], 2 * rows(1)["x"])

    with_batcher(test, Session(), rules=BatchingRules(gather=4, max_rows=8, delay=3600.0))


def test_answers_do_not_keep_the_batch_alive() -> None:
    """Each has memory of its own; a view of one row would hold everybody's."""
    session = Session()

    async def test(batcher: Batcher, observed: Observed) -> None:
        first = await busy(batcher, session)
        tasks = await queued(batcher, (1,), (2,), (3,))
        session.open.set()
        await first
        for answer in await asyncio.gather(*tasks):
            assert answer.outputs["y"].base is None
            answer.outputs["y"][:] = 0  # writable, and nobody else's

    with_batcher(test, session)


@pytest.mark.parametrize("sessions", [1, 2, 3])
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_everybody_gets_their_own_rows(sessions: int, data: st.DataObject) -> None:
    """Any sizes, arrivals, cancellations and rules."""
    requests = data.draw(
        st.lists(
            st.tuples(
                st.integers(1, 8), st.sampled_from((0, 0, 1, 3)), st.sampled_from((False,) * 5 + (True,))
            ),
            min_size=1,
            max_size=30,
        ),
        label="rows, turns of the loop before the next, cancelled",
    )
    rules = BatchingRules(
        gather=data.draw(st.integers(1, 8)),
        max_rows=8,
        delay=data.draw(st.sampled_from((0.0, 0.001))),
        max_queue=10_000,
        buckets=data.draw(st.sampled_from(((), (8,), (2, 4, 8), (3,)))),
    )
    made = [Session(seconds=0.0005 * index) for index in range(sessions)]

    async def test(batcher: Batcher, observed: Observed) -> None:
        tasks, first = [], 0
        for count, turns, cancelled in requests:
            values = range(first, first + count)
            first += count
            task = asyncio.create_task(batcher.submit(rows(*values)))
            tasks.append((task, values, cancelled))
            for _ in range(turns):
                await asyncio.sleep(0)
            if cancelled:
                task.cancel()
        for task, values, cancelled in tasks:
            if cancelled:
                await asyncio.wait([task])
                continue
            assert np.array_equal((await task).outputs["y"], 2 * rows(*values)["x"])

    observed = with_batcher(test, *made, rules=rules)
    assert all(count <= max(rules.gather, 8) for count, _ in observed.batches)
    assert all(padded == rules.padded(count) for count, padded in observed.batches)
    asked = sum(count for count, _, _ in requests)
    kept = sum(count for count, _, cancelled in requests if not cancelled)
    assert kept <= sum(count for count, _ in observed.batches) <= asked


@pytest.mark.parametrize("rate, most", [(0.0, 4), (3.0, 4), (4.0, 4), (6.5, 6), (8.0, 8), (1e9, 8)])
def test_while_runs_are_short_more_run_together(rate: float, most: int) -> None:
    assert BatchingRules(gather=4, max_rows=8, short=1.0).together(rate) == most
    assert BatchingRules(gather=4, max_rows=8).together(rate) == 4


def test_a_quick_session_takes_more_than_the_usual_batch() -> None:
    session = Session()

    async def test(batcher: Batcher, observed: Observed) -> None:
        await batcher.submit(rows(0))  # now its pace is known
        session.began.clear()
        first = await busy(batcher, session)
        tasks = await queued(batcher, *((number,) for number in range(12)))
        session.open.set()
        await asyncio.gather(first, *tasks)

    with_batcher(test, session, rules=BatchingRules(gather=4, max_rows=16, short=3600.0))
    assert session.sizes == [1, 1, 12]
