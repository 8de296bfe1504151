"""The runner of Swin Transformers: orders, windows, masks and routes, against a plain model in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.kernels.test_runner import error, with_route
from vitdeploy_kernels import reference
from vitdeploy_kernels.config import Route, table_for
from vitdeploy_kernels.plans import launches
from vitdeploy_kernels.runner import VitRunner
from vitdeploy_kernels.swin import SwinShape, SwinWeights, random_swin_weights

SHAPE = SwinShape(
    image_size=(16, 24),
    patch=2,
    width=32,
    depths=(2, 3),
    heads=(2, 4),
    windows=((4, 4), (2, 3)),
    shifted=(True, True),
    mlp_widths=(48, 96),
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def plain(shape: SwinShape, weights: SwinWeights, images: Tensor) -> Tensor:
    """All tokens in float64, block by block, from the folded weights."""
    embedding = weights.embedding
    x = reference.patch_embed(images, embedding.weight, embedding.tokens, shape.patch, 0, embedding.scale)
    x = F.layer_norm(x, x.shape[-1:], weights.gain.double(), weights.shift.double(), 1e-5)[:, weights.order]
    for stage, blocks in enumerate(weights.stages):
        of = shape.stage(stage)
        if stage:
            merge = weights.merges[stage - 1]
            four = x[:, merge.four].flatten(2)
            x = reference.layernorm_linear(four, merge.reduction.weight, merge.reduction.bias, 1e-5)
        for each in blocks:
            x, block = x if each.order is None else x[:, each.order], each.block
            assert block.score_bias is not None
            qkv = reference.layernorm_linear(x, block.qkv.weight, block.qkv.bias, of.eps)
            mixed = reference.attention(
                qkv.reshape(-1, of.tokens, 3 * of.width), of.heads, 1.0, block.score_bias[..., : of.tokens]
            )
            x = reference.linear_residual(mixed.view(x.shape), block.proj.weight, block.proj.bias, x)
            hidden = reference.layernorm_linear(x, block.fc1.weight, block.fc1.bias, of.eps, of.activation)
            x = reference.linear_residual(hidden, block.fc2.weight, block.fc2.bias, x)
    return x


@pytest.mark.parametrize("route", [None, "cublas", "fused"])
def test_every_route_computes_the_model(device: torch.device, route: Route | None) -> None:
    weights = random_swin_weights(SHAPE, torch.float16, device)
    table = table_for(device) if route is None else with_route(table_for(device), route)
    runner = VitRunner(SHAPE, weights, batches=[2, 3], table=table, readout=Tensor.float)
    images = torch.randn(SHAPE.image_shape(3), device=device)
    expected = plain(SHAPE, weights, images.half())
    for count in (3, 1):
        assert error(runner(images[:count]), expected[:count].to(device)) < 5e-3
    lines = "\n".join(runner.report)
    assert "first norm: LayerNorm, in the order of windows, in torch: no fused kernel keeps" in lines
    assert "order of windows: 0/3 blocks fused\n  order of 3 blocks: gather in torch: no fused" in lines
    assert "  merge of 1 blocks: gather in torch: no fused kernel moves tokens" in lines
    assert "readout: " not in lines
    if route != "cublas":
        assert "attention: 5/5 blocks fused" in lines
        assert ("layernorm_attention" in lines) == (route == "fused")
        assert "merging: 0/1 blocks fused (add_layernorm, layernorm_linear)" in lines
