"""An event loop whose clock stands still until a test moves it, however slow the machine is."""

from __future__ import annotations

import asyncio

_TURNS = 50
"""More than anything under test needs to get as far as it can."""


class Clock(asyncio.SelectorEventLoop):
    """The loop; ``asyncio.timeout`` and ``call_later`` go by its clock."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0

    def time(self) -> float:
        return self._now

    async def advance(self, seconds: float) -> None:
        """Let this time pass, and what is due then happen."""
        self._now += seconds
        await settled()


async def settled() -> None:
    """Give everything that can go on without time passing the chance to."""
    for _ in range(_TURNS):
        await asyncio.sleep(0)
