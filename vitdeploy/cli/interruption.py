"""Ctrl-C, and requests to end: an exception in the main thread, but not in the middle of an import.

The C++ parts of PyTorch and Triton abort the process when an exception reaches them while they are being
imported, and then nothing cleans up what was being written.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_AGAIN = 0.02
"""Seconds until an interruption that found an import under way tries once more."""
_PATIENCE = 10.0
"""Seconds that an import may go on for."""
_IMPORTER = "<frozen importlib"


class Interrupted(KeyboardInterrupt):
    """Whatever is being written is cleaned up on the way out."""


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Raise ``Interrupted`` on the signals that end a process, where nobody ignores them already.

    Yields the signals that arrived.
    """
    caught: list[int] = []
    waiting: list[threading.Timer] = []
    arrived = 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal arrived
        arrived = arrived or time.monotonic()
        if _importing(frame) and time.monotonic() - arrived < _PATIENCE:
            # To the thread, so that it also wakes up from whatever it waits for.
            timer = threading.Timer(_AGAIN, signal.pthread_kill, (threading.get_ident(), number))
            timer.daemon = True
            waiting[:] = [timer]
            timer.start()
            return
        caught.append(number)
        raise Interrupted

    before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, stop)
    try:
        yield caught
    finally:
        for timer in waiting:
            timer.cancel()
        for known, handler in before.items():
            signal.signal(known, handler)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith(_IMPORTER):
            return True
        frame = frame.f_back
    return False
