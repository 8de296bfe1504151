"""What a classifier's logits mean: shares of one answer, an answer for each class, or values as they are.

As transformers' image classification pipeline takes them: several labels at once, and a model with one
output, have a sigmoid for each; a regression has none; everything else is a softmax.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitdeploy.config import Scores

Float = NDArray[np.float64]


def scores_of(logits: NDArray[Any], kind: Scores) -> Float:
    """The scores (..., classes) of logits, in float64."""
    wide = logits.astype(np.float64)
    if kind == "softmax":
        return softmax(wide)
    return sigmoid(wide) if kind == "sigmoid" else wide


def usual_scores(classes: int) -> Scores:
    """What logits mean where nothing says it: one output has none to share with."""
    return "sigmoid" if classes == 1 else "softmax"


def softmax(logits: NDArray[Any]) -> Float:
    """Softmax over the last axis, in float64."""
    wide = logits.astype(np.float64, copy=False)
    exponents = np.exp(wide - wide.max(axis=-1, keepdims=True))
    shares: Float = exponents / exponents.sum(axis=-1, keepdims=True)
    return shares


def sigmoid(logits: NDArray[Any]) -> Float:
    """Of each element, in float64; nothing overflows."""
    wide = logits.astype(np.float64, copy=False)
    small = np.exp(-np.abs(wide))
    shares: Float = np.where(wide < 0, small, 1.0) / (1.0 + small)
    return shares
