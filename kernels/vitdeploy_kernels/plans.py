"""The plan of any model that the kernels run, by its shape."""

from __future__ import annotations

from typing import TypeAlias

import torch

from vitdeploy_kernels.config import Table
from vitdeploy_kernels.fp8_planner import Fp8Planner
from vitdeploy_kernels.launch import Launch
from vitdeploy_kernels.planner import Plan, Planner, Readout, Workspace
from vitdeploy_kernels.swin import SwinShape, SwinWeights, random_swin_weights
from vitdeploy_kernels.swin_planner import SwinPlanner
from vitdeploy_kernels.vit import VitShape, VitWeights, random_weights

Shape: TypeAlias = VitShape | SwinShape
Weights: TypeAlias = VitWeights | SwinWeights


def build_plan(
    shape: Shape,
    weights: Weights,
    batch: int,
    table: Table,
    workspace: Workspace,
    readout: Readout | None = None,
) -> Plan:
    """The plan of one batch size; the arguments are those of :class:`Planner`."""
    if isinstance(shape, SwinShape):
        assert isinstance(weights, SwinWeights)
        return SwinPlanner(shape, weights, batch, table, workspace, readout).build()
    assert isinstance(weights, VitWeights)
    planner = Fp8Planner if any(block.fp8 for block in weights.blocks) else Planner
    return planner(shape, weights, batch, table, workspace, readout).build()


def launches(shape: Shape, dtype: torch.dtype, batch: int, table: Table) -> list[tuple[str, Launch]]:
    """The fused launches of a forward pass, with their sites, over meta tensors: for compilation only."""
    weights: Weights = (
        random_swin_weights(shape, dtype, "meta")
        if isinstance(shape, SwinShape)
        else random_weights(shape, dtype, "meta")
    )
    plan = build_plan(shape, weights, batch, table, Workspace(torch.device("meta")))
    return [(step.site, step.launch) for step in plan.steps if step.launch is not None]
