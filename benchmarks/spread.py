"""How often something is run, and how figures that vary are reported."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Rounds = Callable[[int], int]
"""How many of so many rounds are run: all of them, or one with --quick."""


def quartiles(ratios: list[float]) -> dict[str, float]:
    """Median and spread of ratios that were measured pair by pair."""
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return {"median": round(middle, 4), "q1": round(low, 4), "q3": round(high, 4), "pairs": len(ratios)}
