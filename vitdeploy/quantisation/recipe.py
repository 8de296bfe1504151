"""From a deployed model and images to a quantised one, in the order that was measured to matter.

1. Ranges of what every layer reads (:mod:`ranges`), nothing clipped.
2. Of int8: inputs are centred and scaled where that is exact (:mod:`migration`).
3. Block by block, on what the model gives whose earlier layers are quantised already: the input's scale, a
   shift or a scale of every channel before ``fc2``, whichever costs less, weights by GPTQ (:mod:`gptq`), and
   the bias that makes up for what rounding did to the mean of the output. It is computed with the rounded
   weights, so that a shift is taken back by the weights that the shifted input meets.
4. Layers that cost the most of the answer for what they save are left out until it is as near as the target
   (:mod:`leaving_out`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitdeploy.bundle.dtypes import Quantised
from vitdeploy.config import Precision
from vitdeploy.model.deployed import DeployedMlp, DeployedModel, Linear
from vitdeploy.model.folds import edited
from vitdeploy.progress import Progress
from vitdeploy.quantisation.deviation import Deviation
from vitdeploy.quantisation.gptq import ROWS, Grid, Hessian, rounded_weight
from vitdeploy.quantisation.layers import BATCH, macs_of, of_block, quantisable, tensors_of, watching
from vitdeploy.quantisation.leaving_out import Place, leave_out
from vitdeploy.quantisation.migration import (
    POWER,
    channel_scales,
    migrate,
    rounding_noise,
    scale_input,
    shift_input,
)
from vitdeploy.quantisation.ranges import Ranges, measure
from vitdeploy.quantisation.sites import QuantisedModel, QuantisedSite, rounded

TARGETS: Mapping[Quantised, Deviation] = {"int8": Deviation(0.04, 6e-4), "fp8": Deviation(0.07, 1.2e-3)}
"""Of the outputs of the calibration images, above which layers are left out.

The divergence is about a sixteenth of what the worst held-out image may have: single images lie far above the
mean.
"""
_KEPT = 8192
"""Rows of a layer's input that are kept: the means of a bias are taken of them."""


@torch.no_grad()
def quantise(
    model: DeployedModel,
    pixel_values: Tensor,
    *,
    kind: Quantised,
    weight_bits: int = 7,
    rest: Precision = "fp32",
    target: Deviation | None = None,
    ranges: Ranges | None = None,
    progress: Progress | None = None,
) -> QuantisedModel:
    """Quantise the linear layers of a float32 model; it is left as it is.

    Args:
        pixel_values: the images to calibrate with, (K, ...), as the model reads them.
        weight_bits: of int8: 7 bits keep processors without VNNI from saturating.
        rest: the precision of what is not quantised, in which scales will be stored.
        target: in place of :data:`TARGETS`.
        ranges: of the same model and images, where they were measured before.

    Raises:
        UsageError: the images are alike, an activation is infinite or no number, ranges are of another model.
    """
    progress = progress or Progress()
    target = TARGETS[kind] if target is None else target
    linears, macs = quantisable(model), macs_of(model, pixel_values[:1])
    if ranges is None:
        ranges = measure(model, pixel_values, progress)
    ranges.check(linears)
    work = migrate(model, ranges) if kind == "int8" else edited(model)
    with progress.stage("quantised weights") as stage:
        recipe = _Sequence(work, Grid(kind, weight_bits, rest), pixel_values)
        for number in range(len(work.blocks)):
            stage.detail = f"block {number + 1} of {len(work.blocks)}"
            progress.updated(stage)
            recipe.block(number)
        stage.detail = f"{len(recipe.places)} layers"
    with progress.stage("layers left out") as stage:
        left_out, found = leave_out(model, work, recipe.places, macs, pixel_values, target)
        stage.detail = f"{len(left_out)} of {len(linears)}, {found}"
    sites = {name: place.site for name, place in recipe.places.items() if name not in left_out}
    share = sum(macs[name] for name in sites) / max(sum(macs.values()), 1)
    floats = {name: recipe.places[name].fitted for name in sites}
    return QuantisedModel(work, sites, left_out, share, found, target, ranges, floats=floats)


@torch.no_grad()
def simulate(quantised: QuantisedModel, pixel_values: Tensor) -> tuple[Tensor, ...]:
    """The outputs where every GEMM of a site reads what is rounded."""
    linears, sites = quantisable(quantised.model), quantised.sites
    with watching({name: linears[name] for name in sites}, lambda name, x: sites[name].rounded(x)):
        return tensors_of(quantised.model(pixel_values))


class _Reached(Exception):
    """A block came to the layer whose input was asked for."""


@dataclass
class _Inputs:
    """Of one layer: some rows (rows, in), and of all of them the least and the largest of each channel."""

    rows: Tensor
    low: Tensor
    high: Tensor


class _Sequence:
    """The layers of a model quantised one after the other, in place.

    Attributes:
        places: the layers so far.
    """

    def __init__(self, model: DeployedModel, grid: Grid, pixel_values: Tensor) -> None:
        self.model, self.grid = model, grid
        self.places: dict[str, Place] = {}
        self.states = [model.embedding(images) for images in pixel_values.split(BATCH)]
        self.random = torch.Generator().manual_seed(0)

    def block(self, number: int) -> None:
        """Quantise the layers of the next block, and let the images pass it."""
        block, linears = self.model.blocks[number], of_block(self.model, number)
        mlps = {id(part.fc2): part for part in block.modules() if isinstance(part, DeployedMlp)}
        for group in self.groups(block, linears):
            inputs = self.inputs(block, linears, group[0])
            mlp = mlps.get(id(linears[group[0]]))
            self.group({name: linears[name] for name in group}, inputs, mlp)
        with watching(linears, self.rounded):
            self.states = [block(x) for x in self.states]

    def rounded(self, name: str, x: Tensor) -> Tensor | None:
        """What a layer reads, so far."""
        place = self.places.get(name)
        return None if place is None else place.site.rounded(x)

    def groups(self, block: nn.Module, linears: Mapping[str, Linear]) -> list[list[str]]:
        """Layers that read the same tensor, in the order in which they run."""
        read: list[tuple[Tensor, list[str]]] = []

        def look(name: str, x: Tensor) -> None:
            if read and read[-1][0] is x:
                read[-1][1].append(name)
            else:
                read.append((x, [name]))

        if linears:
            with watching(linears, look):
                block(self.states[0])
        return [names for _, names in read]

    def inputs(self, block: nn.Module, linears: Mapping[str, Linear], wanted: str) -> _Inputs:
        """What the layer reads in the partly quantised model."""
        parts: list[Tensor] = []
        ends: list[tuple[Tensor, Tensor]] = []

        def look(name: str, x: Tensor) -> Tensor | None:
            if name != wanted:
                return self.rounded(name, x)
            rows = x.flatten(0, -2)
            least, largest = rows.aminmax(dim=0)
            ends.append((least, largest))
            share = min(1.0, _KEPT / (len(rows) * len(self.states)))
            chosen = torch.randperm(len(rows), generator=self.random)[: math.ceil(share * len(rows))]
            parts.append(rows[chosen])
            raise _Reached

        with watching(linears, look):
            for state in self.states:
                try:
                    block(state)
                except _Reached:
                    continue
        lows, highs = (torch.stack(side) for side in zip(*ends, strict=True))
        return _Inputs(torch.cat(parts), lows.amin(0), highs.amax(0))

    def group(self, linears: Mapping[str, Linear], inputs: _Inputs, mlp: DeployedMlp | None) -> None:
        """Quantise layers that read the same."""
        floats = {name: (linear.weight, linear.bias) for name, linear in linears.items()}
        if mlp is not None and mlp.norm is None and self.grid.kind == "int8":
            x, scale = self.fit(mlp, inputs)
        else:
            x = inputs.rows
            scale = self.grid.input_scale(torch.maximum(inputs.high, -inputs.low).max().item())
        read = rounded(x, scale, self.grid.kind)
        hessian = Hessian.of(read[torch.randperm(len(read), generator=self.random)[:ROWS]])
        for name, linear in linears.items():
            steps = self.grid.weight_scale(linear.weight)
            weight = rounded_weight(linear.weight, steps, self.grid, hessian)
            site = QuantisedSite(name, self.grid.kind, weight, steps, scale, None)
            bias = corrected_bias(linear, site, x)
            site = QuantisedSite(name, self.grid.kind, weight, steps, scale, bias)
            self.places[name] = Place(linear, *floats[name], site, mlp, mlp.before if mlp else None)
            self.places[name].use(quantised=True)

    def fit(self, mlp: DeployedMlp, inputs: _Inputs) -> tuple[Tensor, float]:
        """Shift what ``fc2`` reads, or scale its channels: what it reads then, and the scale of that.

        A shift has all 256 steps for the largest channel, where a scale has 128 for each. What multiplies a
        gate was scaled before.
        """
        low, high = inputs.low.min().item(), inputs.high.max().item()
        step = self.grid.input_scale((high - low) / 2)
        if mlp.gate is None:
            weight, energy = mlp.fc2.weight.double(), inputs.rows.double().var(0)
            reach = torch.maximum(inputs.high, -inputs.low).double()
            factor = self.grid.stored(1 / channel_scales(reach, POWER))
            scale = self.grid.input_scale((reach * factor).max().item())
            scaled = weight / factor.double()[:, None], energy * factor.double().square()
            if rounding_noise(scale, *scaled, self.grid.bound) < rounding_noise(
                step, weight, energy, self.grid.bound
            ):
                scale_input(mlp, factor)
                return inputs.rows * factor, scale
        # A whole number of steps, so that zero stays exact: nearly all that a GELU gives lies there. The
        # largest may lie half a step beyond the grid, which is what rounding takes from any number.
        c = step * round((high + low) / 2 / step)
        shift_input(mlp, c)
        return inputs.rows - c, step


def corrected_bias(linear: Linear, site: QuantisedSite, inputs: Tensor) -> Tensor:
    """The bias with which the mean of the rounded layer's output is that of the float layer.

    Args:
        inputs: (rows, in), shifted as the layer reads them.
    """
    mean = inputs.double().mean(0) @ linear.weight.double()
    mean -= site.rounded(inputs).double().mean(0) @ site.dequantised.double()
    return (mean if linear.bias is None else linear.bias.double() + mean).float()
