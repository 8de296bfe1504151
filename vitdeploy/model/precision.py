"""Precision plans: which part of a deployed model runs in which dtype.

A plan names a default dtype and the islands: sites that stay in fp32. A site is a module of the
deployed model that computes something (``blocks.3.attn.qkv``, ``blocks.3.add2``, ``norm``). Normalisation
and mean pooling are islands of every reduced precision: their sums lose too much below fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar, get_args

import torch
from torch import nn

from vitdeploy.bundle.dtypes import PRECISION_DTYPES, ArtifactPrecision
from vitdeploy.config import Precision
from vitdeploy.errors import PrecisionError
from vitdeploy.model.deployed import Site
from vitdeploy.model.reference import public_name

DTYPES: dict[Precision, torch.dtype] = {
    precision: getattr(torch, PRECISION_DTYPES[precision]) for precision in get_args(Precision)
}

Part = TypeVar("Part", bound=nn.Module)


@dataclass(frozen=True)
class PrecisionPlan:
    """The dtype of every site.

    Attributes:
        default: where no island is.
        islands: sites in fp32 beside normalisation and pooling, which always are.
        island_dtype: what an island runs in; float64 in proofs of the rewrites themselves.
        output_dtype: what the model returns, whatever runs inside.
    """

    default: torch.dtype
    islands: frozenset[str] = frozenset()
    island_dtype: torch.dtype = torch.float32
    output_dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, precision: Precision) -> PrecisionPlan:
        return cls(DTYPES[precision])

    @classmethod
    def exact(cls) -> PrecisionPlan:
        """Everything in float64: what remains is the rewrites' own difference."""
        return cls(torch.float64, island_dtype=torch.float64, output_dtype=torch.float64)

    @property
    def name(self) -> ArtifactPrecision:
        """What artifacts of this plan are called."""
        return (
            "mixed" if self.islands else next(name for name, dtype in DTYPES.items() if dtype == self.default)
        )

    def with_islands(self, islands: frozenset[str]) -> PrecisionPlan:
        return replace(self, islands=islands)

    def dtype(self, name: str, site: Site) -> torch.dtype:
        return self.island_dtype if site.always_fp32 or name in self.islands else self.default


def sites(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Site]]:
    """Every site of a deployed model or of a part of it, with its public name, in order of execution."""
    for name, module in model.named_modules():
        if isinstance(module, Site):
            yield public_name(f"{prefix}.{name}" if prefix else name), module


def island_names(model: nn.Module, plan: PrecisionPlan) -> tuple[str, ...]:
    """The sites of a model that the plan keeps out of its default dtype."""
    if plan.default == plan.island_dtype:
        return ()
    return tuple(name for name, module in sites(model) if plan.dtype(name, module) != plan.default)


def assign_dtypes(part: Part, prefix: str, plan: PrecisionPlan) -> Part:
    """Round a part's float64 weights into the plan's dtypes, once, in place.

    Raises:
        PrecisionError: finite weights that overflow their dtype; each tensor is named.
    """
    overflowing: list[str] = []
    for name, module in sites(part, prefix):
        dtype = plan.dtype(name, module)
        for key, parameter in module.named_parameters(recurse=False):
            setattr(module, key, _rounded(parameter, dtype, f"{name}.{key}", overflowing))
        module.dtype = None if module.follows_input and name not in plan.islands else dtype
    if overflowing:
        raise PrecisionError(
            f"weights do not fit into {str(plan.default).removeprefix('torch.')}: {', '.join(overflowing)}",
            hint="export with --bf16 or --fp32, which have the range",
        )
    return part


def _rounded(value: nn.Parameter, dtype: torch.dtype, name: str, overflowing: list[str]) -> nn.Parameter:
    rounded = value.to(dtype)
    # Of the two that NaN and infinity show in: a look at each number takes longer than rounding them all.
    if value.numel() and not torch.stack(rounded.aminmax()).isfinite().all():
        largest = value.abs().max().item()
        overflowing.append(f"{name} (largest magnitude {largest:.6g})")
    return nn.Parameter(rounded, requires_grad=False)
