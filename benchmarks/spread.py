"""How figures that vary are reported."""

from __future__ import annotations

import numpy as np


def quartiles(ratios: list[float]) -> dict[str, float]:
    """Median and spread of ratios that were measured pair by pair."""
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return {"median": round(middle, 4), "q1": round(low, 4), "q3": round(high, 4), "pairs": len(ratios)}
