"""The runner of Swin Transformers: orders, windows, masks and routes, against a plain model in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers.kernel_swin import tokens_of
from tests.kernels.test_runner import error, with_route
from vitdeploy_kernels.config import Route, table_for
from vitdeploy_kernels.runner import VitRunner
from vitdeploy_kernels.swin import SwinShape, random_swin_weights

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


@pytest.mark.parametrize("route", [None, "cublas", "fused"])
def test_every_route_computes_the_model(device: torch.device, route: Route | None) -> None:
    weights = random_swin_weights(SHAPE, torch.float16, device)
    table = table_for(device) if route is None else with_route(table_for(device), route)
    runner = VitRunner(SHAPE, weights, batches=[2, 3], table=table, readout=Tensor.float)
    images = torch.randn(SHAPE.image_shape(3), device=device)
    expected = tokens_of(SHAPE, weights, images.half())
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
