"""Sessions that a test opens and closes, and a batcher around them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.helpers.clock import Clock
from tests.helpers.live_server import PATIENCE
from vitdeploy.server.batcher import Batcher, BatchingRules, RequestOutputs

Array = np.ndarray[Any, Any]


class Observed:
    """What the batcher told."""

    def __init__(self) -> None:
        self.queue: list[int] = []
        self.batches: list[tuple[int, int]] = []

    def queued(self, rows: int) -> None:
        self.queue.append(rows)

    def executed(self, rows: int, padded: int, seconds: float) -> None:
        self.batches.append((rows, padded))


@dataclass
class Session:
    """Doubles its rows. It runs only while ``open`` is set, and remembers what it was given."""

    seconds: float = 0.0
    error: Exception | None = None
    fails_on: float | None = None
    """A batch with this value in it fails."""
    seen: list[Array] = field(default_factory=list)
    open: threading.Event = field(default_factory=threading.Event)
    began: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.open.set()

    def __call__(self, inputs: Any) -> dict[str, Array]:
        array = inputs["x"]
        self.seen.append(array.copy())
        self.began.set()
        assert self.open.wait(PATIENCE)
        time.sleep(self.seconds)
        if self.error is not None or (self.fails_on is not None and (array == self.fails_on).any()):
            raise self.error or RuntimeError("out of\norder")
        return {"y": 2 * array, "z": array.sum(axis=1, keepdims=True)}

    @property
    def sizes(self) -> list[int]:
        return [len(array) for array in self.seen]


def rows(*values: float) -> dict[str, Array]:
    return {"x": np.array([[value, value + 0.5] for value in values], np.float32)}


def with_batcher(
    test: Callable[[Batcher, Observed], Awaitable[None]],
    *sessions: Session,
    rules: BatchingRules | None = None,
    clock: Clock | None = None,
) -> Observed:
    """Run a test against a batcher, on its own clock if there is one; it ends with nothing left behind."""
    observed = Observed()

    async def main() -> None:
        batcher = Batcher(sessions, rules or BatchingRules(gather=4, max_rows=8), observed)
        async with asyncio.timeout(PATIENCE):
            try:
                await test(batcher, observed)
            finally:
                for session in sessions:
                    session.open.set()
                await batcher.close()
        assert batcher.waiting == 0
        assert len(asyncio.all_tasks()) == 1

    with asyncio.Runner(loop_factory=None if clock is None else lambda: clock) as runner:
        runner.run(main())
    return observed


async def begun(session: Session) -> None:
    """Wait until the session runs a batch."""
    assert await asyncio.to_thread(session.began.wait, PATIENCE)


async def busy(batcher: Batcher, session: Session) -> asyncio.Task[RequestOutputs]:
    """Keep the session busy with a request of one row, -1, until it is opened."""
    session.open.clear()
    task = asyncio.create_task(batcher.submit(rows(-1)))
    await begun(session)
    return task


async def queued(batcher: Batcher, *requests: Sequence[float]) -> list[asyncio.Task[RequestOutputs]]:
    """Submit requests in this order while the session is busy."""
    tasks = []
    for values in requests:
        tasks.append(asyncio.create_task(batcher.submit(rows(*values))))
        await asyncio.sleep(0)
    return tasks
