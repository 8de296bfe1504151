"""The batcher and deadlines, in simulated time: who goes first, and who is refused when.

Sessions take a known time for a batch, so when each request would begin can be told: by ``begins``, which
goes by the sessions' true times and knows nothing of what the batcher believes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.clock import Clock, settled
from tests.helpers.sessions import Observed
from vitdeploy.server import batcher as under_test
from vitdeploy.server.batcher import Batcher, BatchingRules, RequestOutputs
from vitdeploy.server.messages import RequestError
from vitdeploy.server.pace import Pace

GATHER, MOST = 4, 6


@dataclass(frozen=True)
class Asked:
    """A request, and when it comes."""

    number: int
    at: int
    rows: int
    limit: float

    @property
    def deadline(self) -> float:
        return self.at + self.limit

    @property
    def order(self) -> tuple[float, int]:
        return self.deadline, self.number


@dataclass
class Sessions:
    """In place of the threads in which sessions run: a batch is done when the clock says so."""

    clock: Clock
    count: int
    fixed: int
    """Seconds of any batch."""
    each: int
    """Seconds more for each row."""
    ends: list[float] = field(default_factory=list)
    """Of the runs in progress."""
    began: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)
    """Of every run, when, and the requests in it."""

    def seconds(self, rows: int) -> int:
        return self.fixed + self.each * rows

    def submit(self, together: Any, run: Any, inputs: Sequence[dict[str, Any]], padded: int) -> Future[Any]:
        """As a ThreadPoolExecutor's."""
        now, answer = self.clock.time(), Future[Any]()
        self.began.append((now, tuple(int(one["x"][0, 0]) for one in inputs)))
        end = now + self.seconds(padded)
        self.ends.append(end)

        def finish() -> None:
            self.ends.remove(end)
            answer.set_result(together(run, inputs, padded))

        self.clock.call_later(end - now, finish)
        return answer

    def shutdown(self) -> None:
        """As a ThreadPoolExecutor's."""

    def play(self, rules: BatchingRules, story: Callable[[Batcher], Coroutine[Any, Any, None]]) -> None:
        """Run a story with a batcher of these sessions, whose outputs are the inputs twice."""

        async def main() -> None:
            batcher = Batcher([lambda inputs: {"y": 2 * inputs["x"]}] * self.count, rules, Observed())
            await story(batcher)
            await batcher.close()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(under_test, "time", SimpleNamespace(perf_counter=self.clock.time))
            patch.setattr(under_test, "ThreadPoolExecutor", lambda *_, **__: self)
            with asyncio.Runner(loop_factory=lambda: self.clock) as runner:
                runner.run(main())


def begins(now: float, sessions: Sessions, waiting: Sequence[Asked]) -> dict[int, float]:
    """When each of these would begin if nothing else came, and nothing that is late ran."""
    free = [*sessions.ends, *[now] * (sessions.count - len(sessions.ends))]
    left, found = sorted(waiting, key=lambda one: one.order), dict[int, float]()
    while left:
        begin, rows = min(free), 0
        while left and (not rows or rows + left[0].rows <= GATHER or left[0].deadline < begin):
            one = left.pop(0)
            found[one.number] = begin
            rows += one.rows if one.deadline >= begin else 0
        free[free.index(begin)] += sessions.seconds(rows)
    return found


@dataclass
class Story:
    """What happened to requests."""

    sessions: Sessions
    asked: list[Asked]
    ended: dict[int, tuple[float, RequestOutputs | RequestError]] = field(default_factory=dict)

    def waiting(self) -> list[Asked]:
        """Come, and neither begun nor given up."""
        begun = {number for _, together in self.sessions.began for number in together}
        return [a for a in self.come if a.number not in begun | self.ended.keys()]

    @property
    def come(self) -> list[Asked]:
        return self.asked[: self._come]

    _come: int = 0

    async def happen(self, batcher: Batcher, check: Callable[[list[Asked], set[int]], None]) -> None:
        """Let everything happen; ``check`` is told who waited before each step, and who ended in it."""
        clock, tasks = self.sessions.clock, list[asyncio.Task[None]]()
        while self._come < len(self.asked) or self.sessions.ends or self.waiting():
            nexts = self.asked[self._come : self._come + 1]
            moments = [*self.sessions.ends, *(a.deadline for a in self.waiting()), *(a.at for a in nexts)]
            before, known = self.waiting(), set(self.ended)
            await clock.advance(max(0.0, min(moments) - clock.time()))
            check(before, self.ended.keys() - known)
            while self._come < len(self.asked) and self.asked[self._come].at <= clock.time():
                known = set(self.ended)
                self._come += 1
                before = self.waiting()
                tasks.append(asyncio.create_task(self._ask(batcher, self.asked[self._come - 1])))
                await settled()
                check(before, self.ended.keys() - known)
        await asyncio.gather(*tasks)

    async def _ask(self, batcher: Batcher, request: Asked) -> None:
        answer: RequestOutputs | RequestError
        try:
            inputs = {"x": np.full((request.rows, 1), request.number, np.float32)}
            answer = await batcher.submit(inputs, request.limit)
        except RequestError as error:
            answer = error
        self.ended[request.number] = self.sessions.clock.time(), answer


RULES = BatchingRules(gather=GATHER, max_rows=MOST, timeout=1000.0, max_queue=10_000)


def played(asked: list[Asked], *, fixed: int, each: int = 0) -> Story:
    """A story with one session."""
    story = Story(Sessions(Clock(), 1, fixed, each), asked)
    story.sessions.play(RULES, lambda batcher: story.happen(batcher, lambda *_: None))
    return story


def told(story: Story) -> dict[int, tuple[float, str]]:
    """When each request ended, and how."""
    return {
        number: (at, answer.kind if isinstance(answer, RequestError) else "ok")
        for number, (at, answer) in sorted(story.ended.items())
    }


def placed(drawn: list[tuple[int, int, float]]) -> list[Asked]:
    """Requests of (seconds after the one before, rows, limit); first one of each size that runs, alone."""
    drawn = [*((100, rows, 900.0) for rows in range(1, MOST + 1)), (100, *drawn[0][1:]), *drawn[1:]]
    moments = np.cumsum([gap for gap, _, _ in drawn])
    return [
        Asked(number, int(at), rows, limit)
        for number, (at, (_, rows, limit)) in enumerate(zip(moments, drawn, strict=True))
    ]


def requests(*limits: float) -> st.SearchStrategy[list[Asked]]:
    each = st.tuples(st.sampled_from((0, 0, 1, 2, 5)), st.integers(1, MOST), st.sampled_from(limits))
    return st.lists(each, min_size=1, max_size=25).map(placed)


times = {"count": st.integers(1, 3), "fixed": st.integers(1, 8), "each": st.integers(0, 3)}
many = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)


@pytest.mark.slow
@many
@given(asked=requests(2.5, 10.5, 25.5, 60.5), **times)
def test_deadlines_are_kept_and_nobody_is_refused_who_could_have_run(
    asked: list[Asked], count: int, fixed: int, each: int
) -> None:
    sessions = Sessions(Clock(), count, fixed, each)
    story, checked = Story(sessions, asked), 0

    def check(before: list[Asked], ended: set[int]) -> None:
        nonlocal checked
        now, waiting = sessions.clock.time(), story.waiting()
        assert not waiting or len(sessions.ends) == count  # no session is free while somebody waits
        began = sessions.began[checked:]
        checked = len(sessions.began)
        for at, numbers in began:
            together = [asked[number] for number in numbers]
            assert all(one.deadline >= at for one in together)
            assert together == sorted(together, key=lambda one: one.order)
            assert all(one.order > together[-1].order for one in waiting)  # the most urgent went first
            assert sum(one.rows for one in together) <= GATHER or len(together) == 1
        for number in ended:
            at, answer = story.ended[number]
            if isinstance(answer, RequestOutputs):
                assert answer.outputs["y"].tolist() == [[2 * number]] * asked[number].rows
                continue
            assert at <= asked[number].deadline
            assert (answer.kind, at) in (("timeout", at), ("overloaded", asked[number].at))
            if at < asked[number].deadline:
                assert checked > len(sessions.ends)  # before a run has ended nothing is known
                begun = {number for _, numbers in began for number in numbers}
                begin = begins(now, sessions, [a for a in before if a.number not in begun])[number]
                assert begin > asked[number].deadline  # it really could not
                if answer.kind == "overloaded":
                    assert answer.retry_after is not None
                    assert 0 < answer.retry_after <= begin - asked[number].deadline

    sessions.play(RULES, lambda batcher: story.happen(batcher, check))
    ran = [number for _, together in sessions.began for number in together]
    answered = [number for number, (_, kind) in told(story).items() if kind == "ok"]
    assert sorted(story.ended) == list(range(len(asked)))  # nobody is lost
    assert sorted(ran) == answered  # and nobody runs twice


@pytest.mark.slow
@many
@given(asked=requests(500.0), **times)
def test_without_deadlines_of_their_own_all_run_in_the_order_of_their_arrival(
    asked: list[Asked], count: int, fixed: int, each: int
) -> None:
    sessions = Sessions(Clock(), count, fixed, each)
    story = Story(sessions, asked)
    sessions.play(RULES, lambda batcher: story.happen(batcher, lambda *_: None))
    assert [n for _, together in sessions.began for n in together] == list(range(len(asked)))


def test_a_request_that_cannot_begin_in_time_is_refused_at_once() -> None:
    """A batch of four takes 5 s; the third of three would wait for two."""
    story = played([Asked(0, 0, 4, 100.0), *(Asked(n, 10, 4, 7.0) for n in (1, 2, 3))], fixed=1, each=1)
    assert told(story) == {0: (5, "ok"), 1: (15, "ok"), 2: (20, "ok"), 3: (10, "overloaded")}
    refusal = story.ended[3][1]
    assert isinstance(refusal, RequestError)
    assert refusal.message == "no session will be free within 7 s"
    assert refusal.retry_after == 3.0  # its deadline was at 17; it would have begun at 20


def test_before_anything_is_known_a_request_waits_for_its_deadline() -> None:
    story = played([Asked(0, 0, 4, 100.0), Asked(1, 1, 1, 2.0)], fixed=50)
    assert told(story) == {0: (50, "ok"), 1: (3, "timeout")}


def test_a_request_that_others_overtake_is_given_up_when_that_is_certain() -> None:
    """It would have begun at 15; a more urgent one takes its place, and 20 is after its deadline."""
    asked = [Asked(0, 0, 4, 100.0), Asked(1, 10, 4, 100.0), Asked(2, 11, 4, 8.0), Asked(3, 12, 4, 4.0)]
    story = played(asked, fixed=1, each=1)
    assert told(story) == {0: (5, "ok"), 1: (15, "ok"), 2: (12, "timeout"), 3: (20, "ok")}
    late = story.ended[2][1]
    assert isinstance(late, RequestError)
    assert late.message == "no session will be free within 8 s"


def test_an_urgent_request_overtakes_and_a_long_one_keeps_its_turn() -> None:
    """Six rows are more than are gathered, so they run alone, and nothing less urgent goes before them."""
    asked = [Asked(0, 0, 1, 100.0), *(Asked(number, 1, 1, 90.0) for number in (1, 2, 3))]
    asked += [Asked(4, 2, 6, 50.0), Asked(5, 3, 1, 60.0), Asked(6, 3, 1, 20.0)]
    story = played(asked, fixed=5)
    assert [together for _, together in story.sessions.began] == [(0,), (6,), (4,), (5, 1, 2, 3)]


def test_a_session_that_waits_for_company_does_not_wait_beyond_a_deadline() -> None:
    sessions = Sessions(Clock(), 1, fixed=1, each=0)

    async def story(batcher: Batcher) -> None:
        task = asyncio.create_task(batcher.submit({"x": np.zeros((1, 1), np.float32)}, 2.0))
        await settled()
        await sessions.clock.advance(1.99)
        assert batcher.waiting == 1
        await sessions.clock.advance(0.009)
        assert batcher.waiting == 0
        await sessions.clock.advance(1.0)
        assert (await task).waited < 2.0

    sessions.play(BatchingRules(gather=GATHER, max_rows=MOST, delay=60.0), story)


@given(
    runs=st.lists(st.tuples(st.integers(1, 32), st.floats(1.0, 3.0)), max_size=30),
    fixed=st.floats(0.0, 1.0),
    each=st.floats(1e-3, 1.0),
    asked=st.integers(1, 64),
)
def test_a_pace_promises_no_longer_run_than_there_will_be(
    runs: list[tuple[int, float]], fixed: float, each: float, asked: int
) -> None:
    """Whatever took longer before: after one undisturbed run of each size, it tells at most the true time."""
    pace = Pace()
    assert pace.least(asked) == 0
    for rows, disturbed in runs:
        pace.learn(rows, rows, disturbed * (fixed + each * rows))
    for rows in {rows for rows, _ in runs}:
        pace.learn(rows, rows, fixed + each * rows)
    assert pace.least(asked) <= (fixed + each * asked) * (1 + 1e-9)
    assert pace.least(asked) <= pace.longest


def test_a_pace_tells_a_slow_session_from_one_that_is_disturbed() -> None:
    """Batches are as large as it would make them undisturbed; what a queue takes goes by late runs."""
    rules, pace = BatchingRules(gather=4, max_rows=32, short=0.01), Pace()
    for _ in range(5):
        pace.learn(8, 8, 0.004)
    for _ in range(50):
        pace.learn(8, 8, 0.2)
    assert rules.together(pace.best_rate) >= 19
    assert pace.rate < 60
