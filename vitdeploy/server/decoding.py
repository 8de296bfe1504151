"""Image files become pixels in a few threads, beside the event loop: one hop for as many as wait."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

_T = TypeVar("_T")
_TOGETHER = 1 << 17
"""Bytes of the files in one hop, so that small ones share its cost; of larger ones that is nothing."""


class Decoding(Generic[_T]):
    """Decodes the files of many requests, in the order in which they come. Lives on the event loop.

    Args:
        decode: what becomes of one file; blocks.
        workers: where that is done.
        threads: how many of them are used at a time.
    """

    def __init__(self, decode: Callable[[bytes], _T], workers: Executor, threads: int) -> None:
        self._decode, self._workers = decode, workers
        self._idle = threads
        self._waiting: deque[tuple[bytes, asyncio.Future[_T]]] = deque()
        self._begun = False

    def decoded(self, data: bytes) -> asyncio.Future[_T]:
        """What becomes of a file; to be awaited. Whoever cancels it before its turn saves the work."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()
        self._waiting.append((data, future))
        if self._idle and not self._begun:
            self._begun = True
            loop.call_soon(self._begin)  # when all that come together are there
        return future

    def _begin(self) -> None:
        """Keep every thread busy."""
        self._begun = False
        loop = asyncio.get_running_loop()
        while self._idle and (files := self._taken(-(-len(self._waiting) // self._idle))):
            self._idle -= 1
            done = loop.run_in_executor(self._workers, self._decode_all, [data for data, _ in files])
            done.add_done_callback(lambda done, files=files: self._finish(done, files))  # type: ignore[misc]

    def _taken(self, most: int) -> list[tuple[bytes, asyncio.Future[_T]]]:
        """So many files at most that wait."""
        taken, size = list[tuple[bytes, asyncio.Future[_T]]](), 0
        while self._waiting and len(taken) < most and size < _TOGETHER:
            data, future = self._waiting.popleft()
            if not future.done():
                taken.append((data, future))
                size += len(data)
        return taken

    def _decode_all(self, files: Sequence[bytes]) -> list[tuple[_T | None, Exception | None]]:
        """In a thread: of each file what became of it, or why nothing did."""
        found = list[tuple[_T | None, Exception | None]]()
        for data in files:
            try:
                found.append((self._decode(data), None))
            except Exception as error:
                found.append((None, error))
        return found

    def _finish(
        self,
        done: asyncio.Future[list[tuple[_T | None, Exception | None]]],
        files: Sequence[tuple[bytes, asyncio.Future[_T]]],
    ) -> None:
        self._idle += 1
        self._begin()
        for (_, future), (result, error) in zip(files, done.result(), strict=True):
            if future.done():
                continue
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]
