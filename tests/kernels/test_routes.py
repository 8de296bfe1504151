"""What a plan does where a table says that cuBLASLt multiplies faster."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernel_tools.resources import routed
from vitdeploy_kernels import reference
from vitdeploy_kernels.config import Table, shipped_table
from vitdeploy_kernels.gemm import ACTIVATIONS
from vitdeploy_kernels.planner import Plan, Planner, Workspace, multiply
from vitdeploy_kernels.vit import VitShape, random_weights

META = torch.device("meta")
SHAPE = VitShape(image_size=(32, 32), width=64, heads=2, depth=2, mlp_width=256, queries=None, classes=0)
FUSED = shipped_table((9, 0))
CUBLAS = routed(FUSED, "cublas")


def plan(table: Table) -> Plan:
    weights = random_weights(SHAPE, torch.float16, META)
    return Planner(SHAPE, weights, 4, table, Workspace(META)).build()


def mixed(fused: str) -> Table:
    return replace(CUBLAS, kernels={**CUBLAS.kernels, fused: FUSED.kernels[fused]})


def test_a_product_adds_to_the_stream_and_one_pass_adds_its_bias_and_normalises() -> None:
    steps = [(step.site, step.operation) for step in plan(CUBLAS).steps]
    assert steps[:2] == [("embedding", "patch_embed"), ("blocks.0.attn.qkv.norm", "add_layernorm")]
    for number in range(SHAPE.depth):
        start = 2 + 7 * number
        assert steps[start : start + 7] == [
            (f"blocks.{number}.{site}", operation)
            for site, operation in (
                ("attn.qkv", "cublas"),
                ("attn", "attention"),
                ("attn.proj", "cublas"),
                ("attn.proj.add", "add_layernorm"),
                ("mlp.fc1", "cublas"),
                ("mlp.fc2", "cublas"),
                ("mlp.fc2.add", "add_layernorm"),
            )
        ]
    assert len(steps) == 2 + 7 * SHAPE.depth


@pytest.mark.parametrize("fused, writes", [("layernorm_linear", False), ("add_layernorm", True)])
def test_normalised_rows_are_written_for_cublas_alone(fused: str, writes: bool) -> None:
    steps = [step for step in plan(mixed(fused)).steps if step.site.endswith(".add")]
    assert len(steps) == 2 * SHAPE.depth
    for step in steps:
        assert step.launch is not None
        assert ("normed_ptr" in step.launch.arguments) == writes
        assert step.launch.arguments["x_ptr"] is step.launch.arguments["total_ptr"], "in place"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_product_with_its_activation(activation: str) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(9, 30), torch.randn(30, 20), torch.randn(20)
    out = torch.empty(9, 20)
    multiply(x, weight, bias, out, activation)
    expected = reference.activate(x.double() @ weight.double() + bias.double(), activation)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
