"""The least and the largest value of every channel that a quantisable layer reads, over calibration images.

Nothing is clipped: one channel of one block carries a massive activation (Sun et al. 2024,
https://arxiv.org/abs/2402.17762), and a percentile that cuts it off costs more than all rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vitdeploy.errors import UsageError
from vitdeploy.model.deployed import DeployedModel, Linear
from vitdeploy.progress import Progress
from vitdeploy.quantisation.layers import BATCH, quantisable, watching


@dataclass(frozen=True)
class Ranges:
    """By site, in the order in which they run: (in) float32 each."""

    low: Mapping[str, Tensor]
    high: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """To be kept in a file."""
        lows = {f"{name}.low": tensor for name, tensor in self.low.items()}
        return lows | {f"{name}.high": tensor for name, tensor in self.high.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Ranges:
        """What :meth:`tensors` gave; anything else in it is passed over."""
        low, high = (
            {name.removesuffix(end): tensor for name, tensor in tensors.items() if name.endswith(end)}
            for end in (".low", ".high")
        )
        return cls(low, high)

    def check(self, linears: Mapping[str, Linear]) -> None:
        """Refuse the ranges of another model.

        Raises:
            UsageError: a site is not there, or has another width.
        """
        for name, linear in linears.items():
            for side in (self.low, self.high):
                if name not in side or side[name].shape != linear.weight.shape[:1]:
                    raise UsageError(
                        f"the ranges of the calibration are of another model: {name} is missing or differs",
                        hint="calibrate with the images again: --calibration DIR",
                    )


@torch.no_grad()
def measure(model: DeployedModel, pixel_values: Tensor, progress: Progress) -> Ranges:
    """Run the float model over the images, (K, ...) as it reads them, a few at a time.

    Raises:
        UsageError: all images are alike, an activation is infinite or no number, or all are zero.
    """
    if len(pixel_values) > 1 and bool((pixel_values == pixel_values[:1]).all()):
        raise UsageError(
            f"all {len(pixel_values)} calibration images are alike", hint="calibrate with images that differ"
        )
    linears = quantisable(model)
    low: dict[str, Tensor] = {}
    high: dict[str, Tensor] = {}

    def look(name: str, x: Tensor) -> None:
        least, largest = x.flatten(0, -2).aminmax(dim=0)
        if not bool(torch.isfinite(least).all() and torch.isfinite(largest).all()):
            raise UsageError(
                f"calibration: what {name} reads is infinite or not a number",
                hint="check that the float model computes these images: vitdeploy verify",
            )
        low[name] = torch.minimum(low.get(name, least), least)
        high[name] = torch.maximum(high.get(name, largest), largest)

    with progress.stage("calibration ranges") as stage, watching(linears, look):
        for done, images in enumerate(pixel_values.split(BATCH)):
            stage.detail = f"image {done * BATCH + 1} of {len(pixel_values)}"
            progress.updated(stage)
            model(images)
        stage.detail = f"{len(pixel_values)} images, {len(linears)} layers"
    if linears and not any(bool(x.any()) for side in (low, high) for x in side.values()):
        raise UsageError(
            "calibration: every activation is zero, so there is no range", hint="calibrate with other images"
        )
    return Ranges(low, high)
