"""Exact rewrites that make activations easy to round: x' = (x - c) / s for every channel, where it is free.

What makes a linear layer's input gives it centred and scaled, and the layer's weights and bias take that
back: x W + b = x' (s W) + (b + c W). A LayerNorm does so by its gain and bias. So do the value columns of an
attention, since rows of a softmax sum to one: p (v - c) = p v - c, whatever was added to the scores.
With s = range^a the difficulty is shared between activations and weights (Xiao et al. 2023,
https://arxiv.org/abs/2211.10438, there without c, and divided by a power of the weights, which costs more
than it saves: GPTQ makes up for most of what their rounding loses, and nothing for that of activations). A
part whose structure is not known here stays what it is.

Nothing passes an activation function: what ``fc2`` reads is shifted or scaled by an operation of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitdeploy.model.deployed import (
    DeployedAttention,
    DeployedBlock,
    DeployedMlp,
    DeployedModel,
    Linear,
    Norm,
    Scale,
    Shift,
)
from vitdeploy.model.folds import edited, parameter
from vitdeploy.model.qwen_deployed import GroupedAttention
from vitdeploy.model.swin_deployed import (
    DeployedSwinBlock,
    MergedWindowAttention,
    NarrowWindowAttention,
    TokenOrder,
)
from vitdeploy.model.vit_deployed import AbsorbedBlock
from vitdeploy.quantisation.layers import quantisable
from vitdeploy.quantisation.ranges import Ranges

_LEAST = 1e-5
"""Ranges and weights below this share of the largest count as this share."""
_FURTHEST = 100.0
"""What a channel is multiplied or divided by at most, beside the others."""
POWER, _POWER_OF_VALUES = 0.6, 0.5
"""Of a range. With 1, every channel would fill the grid, and be cut off wherever an image goes beyond those
of the calibration: what a LayerNorm gives hardly does, and an attention's values do."""
_MADE_UP = 0.4
"""Share of a weight's noise that GPTQ leaves."""


@torch.no_grad()
def migrate(model: DeployedModel, ranges: Ranges) -> DeployedModel:
    """The same function, computed with inputs that are centred and scaled; ``model`` is not changed.

    Weights are computed in float64 and keep their dtype.
    """
    model = edited(model)
    names = {id(linear): name for name, linear in quantisable(model).items()}
    for block in model.blocks:
        if isinstance(block, DeployedBlock | DeployedSwinBlock) and not isinstance(block, AbsorbedBlock):
            _Migration(ranges, names).block(block)
    return model


@torch.no_grad()
def shift_input(mlp: DeployedMlp, c: float) -> None:
    """Have ``fc2`` read x - c: exact, since its bias takes c back; in place."""
    fc2 = mlp.fc2
    mlp.before = Shift(torch.tensor(-c, dtype=fc2.weight.dtype))
    _take_back(fc2, torch.full(fc2.weight.shape[:1], c, dtype=torch.float64))


@torch.no_grad()
def scale_input(mlp: DeployedMlp, factor: Tensor) -> None:
    """Have ``fc2`` read x * factor, (in): exact, since its weight takes it back; in place."""
    fc2 = mlp.fc2
    mlp.before = Scale(factor.to(fc2.weight.dtype))
    _give(fc2, "weight", fc2.weight.double() / factor.double()[:, None])


def rounding_noise(step: float, weight: Tensor, energy: Tensor, bound: int) -> float:
    """What x W loses, as a mean square, summed over its columns: rounding loses step^2 / 12 of a number.

    Args:
        step: of x.
        weight: (in, out) float64, rounded by column.
        energy: (in), the variance of x by channel.
        bound: the largest integer of a weight.
    """
    steps = weight.abs().amax(0) / bound
    return ((step**2 * weight.square().sum() + _MADE_UP * steps.square().sum() * energy.sum()) / 12).item()


def channel_scales(reach: Tensor, power: float) -> Tensor:
    """s of every channel, from the largest magnitude of what it reads without a centre, (in) float64."""
    s = _positive(reach) ** power
    return (s / s.log().mean().exp()).clamp(1 / _FURTHEST, _FURTHEST)


class _Migration:
    """Of one block, in place; parameters are replaced, never written to."""

    def __init__(self, ranges: Ranges, names: Mapping[int, str]) -> None:
        self.ranges, self.names = ranges, names

    def block(self, block: Any) -> None:
        attn, mlp, swin = block.attn, block.mlp, isinstance(block, DeployedSwinBlock)
        self.through_values(attn)
        if isinstance(mlp, DeployedMlp):
            if mlp.norm is not None:
                self.into_norm(mlp.norm, [mlp.fc2])
            elif mlp.gate is not None:
                self.through_product(mlp)
        if swin and block.merge is not None and not block.merge.post_norm:
            self.into_norm(block.merge.norm, [block.merge.reduction])
        if swin and block.post_norm:
            return  # linear layers read the sum of everything before
        self.into_norm(block.norm1, _readers(attn), centred=not _pads(getattr(attn, "cut", None)))
        if isinstance(mlp, DeployedMlp):
            self.into_norm(block.norm2, [layer for layer in (mlp.gate, mlp.fc1) if isinstance(layer, Linear)])

    def into_norm(self, norm: nn.Module, readers: Sequence[Linear], *, centred: bool = True) -> None:
        """By the gain and the bias of the LayerNorm that all of these read.

        Args:
            centred: False where rows of zeros come between: they are what they were divided by anything.
        """
        if not isinstance(norm, Norm) or not readers:
            return
        c, s = self.chosen(readers, centred=centred)
        _give(norm, "weight", norm.weight.double() / s)
        _give(norm, "bias", (norm.bias.double() - c) / s)
        for reader in readers:
            _read(reader, c, s)

    def through_values(self, attn: nn.Module) -> None:
        """By the columns of the values, of which each head hands on its own, in their order."""
        if isinstance(attn, DeployedAttention | MergedWindowAttention):
            values, columns = attn.qkv, slice(2 * attn.proj.weight.shape[0], None)
        elif isinstance(attn, NarrowWindowAttention | GroupedAttention):
            values, columns = attn.v, slice(None)
        else:
            return
        centred = not _pads(getattr(attn, "join", None))
        c, s = self.chosen([attn.proj], centred=centred, power=_POWER_OF_VALUES)
        weight, bias = values.weight.double().clone(), _bias(values).clone()
        weight[:, columns] /= s
        bias[columns] = (bias[columns] - c) / s
        _give(values, "weight", weight)
        if values.bias is not None or bool(c.any()):
            _give(values, "bias", bias)
        _read(attn.proj, c, s)

    def through_product(self, mlp: DeployedMlp) -> None:
        """By the columns of ``fc1`` that multiply an activated gate: scaled alone, a constant cannot pass."""
        c, s = self.chosen([mlp.fc2], centred=False)
        _give(mlp.fc1, "weight", mlp.fc1.weight.double() / s)
        if mlp.fc1.bias is not None:
            _give(mlp.fc1, "bias", mlp.fc1.bias.double() / s)
        _read(mlp.fc2, c, s)

    def chosen(
        self, readers: Sequence[Linear], *, centred: bool, power: float = POWER
    ) -> tuple[Tensor, Tensor]:
        """c and s of what these read, (in) float64 each."""
        name = self.names[id(readers[0])]
        low, high = (side[name].double() for side in (self.ranges.low, self.ranges.high))
        c = (low + high) / 2 if centred else torch.zeros_like(low)
        reach = torch.maximum(high - c, c - low)
        return c, channel_scales(reach, power)


def _readers(attn: nn.Module) -> list[Linear]:
    """The layers that read what an attention is given."""
    if isinstance(attn, DeployedAttention | MergedWindowAttention):
        return [attn.qkv]
    if isinstance(attn, NarrowWindowAttention | GroupedAttention):
        return [attn.q, attn.k, attn.v]
    return []


def _pads(order: TokenOrder | None) -> bool:
    return order is not None and order.pads


def _positive(values: Tensor) -> Tensor:
    return values.clamp_min(max(values.max().item(), torch.finfo(values.dtype).tiny) * _LEAST)


def _read(linear: Linear, c: Tensor, s: Tensor) -> None:
    """Take back in a layer what (x - c) / s did to its input."""
    if bool(c.any()):
        _take_back(linear, c)
    _give(linear, "weight", linear.weight.double() * s[:, None])


def _take_back(linear: Linear, c: Tensor) -> None:
    _give(linear, "bias", _bias(linear) + c @ linear.weight.double())


def _bias(linear: Linear) -> Tensor:
    """float64; zeros where there is none."""
    return (
        linear.weight.new_zeros(linear.weight.shape[1]).double()
        if linear.bias is None
        else linear.bias.double()
    )


def _give(site: nn.Module, name: str, value: Tensor) -> None:
    """A parameter in the dtype of the site's weight."""
    dtype: torch.dtype = site.weight.dtype  # type: ignore[assignment]
    setattr(site, name, parameter(value.to(dtype)))
