"""A deployed model whose GEMMs are to be computed in 8 bits: what each of them reads, and how it is rounded.

A GEMM of int8 is symmetric: ``round(x / input_scale)`` in -128 to 127 (a zero point of 0, which every runtime
takes), weights rounded by column. One of fp8 is E4M3, with one scale for the whole weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitdeploy.bundle.dtypes import Quantised
from vitdeploy.model.deployed import DeployedModel
from vitdeploy.quantisation.deviation import Deviation
from vitdeploy.quantisation.ranges import Ranges

FP8_LARGEST = 448.0
"""Of E4M3."""
INT8_LARGEST = 127


def rounded(x: Tensor, scale: float, kind: Quantised) -> Tensor:
    """What an 8-bit GEMM reads in place of ``x``, in the dtype of ``x``, as QuantizeLinear rounds it."""
    scaled = x / scale
    if kind == "int8":
        return scaled.round_().clamp_(-INT8_LARGEST - 1, INT8_LARGEST).mul_(scale)
    return scaled.clamp_(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn).to(x.dtype).mul_(scale)


@dataclass(frozen=True)
class QuantisedSite:
    """One GEMM.

    Attributes:
        name: of the site, as in the precision plan.
        weight: (in, out) int8, or float8_e4m3fn.
        weight_scale: (out) float32 of int8, () of fp8.
        input_scale: of what it reads.
        bias: (out) float32, or None.
    """

    name: str
    kind: Quantised
    weight: Tensor
    weight_scale: Tensor
    input_scale: float
    bias: Tensor | None

    @property
    def dequantised(self) -> Tensor:
        """The weight that is computed with, (in, out) float32."""
        return self.weight.float() * self.weight_scale

    def rounded(self, x: Tensor) -> Tensor:
        """What the GEMM reads in place of ``x``, in the dtype of ``x``."""
        return rounded(x, self.input_scale, self.kind)


@dataclass(frozen=True)
class AttentionScales:
    """Of what the two products inside of an attention read in fp8; probabilities have 1 / 448."""

    query: float
    key: float
    value: float


@dataclass(frozen=True)
class QuantisedModel:
    """The float model around the sites.

    Attributes:
        model: with migrated weights; at the sites it has the dequantised ones and their bias.
        sites: by name.
        left_out: sites that could be quantised, and stay float.
        macs: share of the GEMMs' multiplications that is in 8 bits, 0 to 1.
        found: how far the calibration images' outputs are from the float model's.
        target: how far they were to be at most.
        ranges: of the float model, to be handed in again.
        attention: attentions whose products are fp8, by the name of their module.
        floats: what the weights of the sites are the rounding of, (in, out) float32 by name.
    """

    model: DeployedModel
    sites: Mapping[str, QuantisedSite]
    left_out: tuple[str, ...]
    macs: float
    found: Deviation
    target: Deviation
    ranges: Ranges
    attention: Mapping[str, AttentionScales] = field(default_factory=dict)
    floats: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def falls_short(self) -> bool:
        """Whether the target was missed although as much was left out as may be."""
        return not self.found.excess(self.target) <= 1
