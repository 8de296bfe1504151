"""How far a quantised model's answers are from the float model's, image by image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitdeploy.config import Output


@dataclass(frozen=True)
class Deviation:
    """How far answers are from the float model's, or may be.

    Attributes:
        error: mean over images of the error relative to the norm; of the output where it is largest.
        divergence: mean over images of KL(float || quantised) of the classes, in nats; 0 without logits.
    """

    error: float
    divergence: float = 0.0

    def __str__(self) -> str:
        return f"error {self.error:.4f}" + (f", divergence {self.divergence:.1e}" if self.divergence else "")

    def excess(self, target: Deviation) -> float:
        """How many times as far as the target; a divergence grows with the square of an error."""
        return max(self.error / target.error, math.sqrt(self.divergence / target.divergence))


def deviation(names: Sequence[Output], outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> Deviation:
    """How far outputs of those names are from the reference's, each (images, ...)."""
    divergences = [
        float(_divergences(found, expected).mean())
        for name, found, expected in zip(names, outputs, reference, strict=True)
        if name == "logits"
    ]
    return Deviation(relative_error(outputs, reference), max(divergences, default=0.0))


def _divergences(logits: Tensor, reference: Tensor) -> Tensor:
    """Of each image, (images,) float64; rounding may leave a little less than 0."""
    found, expected = (tensor.double().log_softmax(-1) for tensor in (logits, reference))
    return (expected.exp() * (expected - found)).sum(-1).clamp_min(0)


def relative_error(outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Mean over images of the error relative to the norm; of the output where it is largest."""
    return max(
        float(
            (
                (found - expected).flatten(1).norm(dim=1)
                / expected.flatten(1).norm(dim=1).clamp_min(torch.finfo(expected.dtype).tiny)
            ).mean()
        )
        for found, expected in zip(outputs, reference, strict=True)
    )
