"""How long a session's runs take, learned from those that were made: what a queue is in seconds."""

from __future__ import annotations

_MEMORY = 0.9
"""How slowly the rate of late is forgotten."""
_LONG_MEMORY = 0.999
"""How slowly the best rate is forgotten."""
_DOUBT = 0.25
"""How far a run that took longer than any before is believed: another program may have had the processor."""


class Pace:
    """Of runs that take longer the more rows they have, and less for each row.

    What is told of a size is what a run of it takes at least: a shorter run than before is believed at once,
    a longer one slowly; of sizes that were never run it is only what follows from the others.
    """

    def __init__(self) -> None:
        self.rate = 0.0
        """Rows per second, of late; 0 where nothing has run."""
        self.best_rate = 0.0
        """The same where nothing else took the processor."""
        self.longest = 0.0
        """Seconds of the longest run."""
        self._seconds: dict[int, float] = {}

    def learn(self, rows: int, size: int, seconds: float) -> None:
        """A run of ``rows`` at the batch ``size`` took so long."""
        seconds = max(seconds, 1e-9)
        rate = rows / seconds
        self.rate = rate if not self.rate else _MEMORY * self.rate + (1 - _MEMORY) * rate
        self.best_rate = max(rate, _LONG_MEMORY * self.best_rate + (1 - _LONG_MEMORY) * rate)
        known = self._seconds
        before = known.get(size)
        if before is None:
            believed = min((least * max(1.0, size / s) for s, least in known.items()), default=seconds)
        else:
            believed = before + _DOUBT * max(0.0, seconds - before)
        known = {s: min(least, seconds * max(1.0, s / size)) for s, least in known.items()}
        self._seconds = {**known, size: min(seconds, believed)}
        self.longest = max(self._seconds.values())

    def least(self, size: int) -> float:
        """Seconds that a run of this batch size takes at least; 0 where nothing has run."""
        return max((least * min(1.0, size / s) for s, least in self._seconds.items()), default=0.0)
