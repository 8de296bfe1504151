"""A Swin's weights for the fused kernels compute the same function, in float64; rounding is what remains."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import interpreter
from tests.helpers.kernel_swin import tokens_of
from tests.helpers.models import pixels
from tests.helpers.swins import SWINS, random_swin
from vitdeploy.config import SwinConfig
from vitdeploy.model import swin_fused
from vitdeploy.model.reference import outputs_float64

assert interpreter  # imported before Triton is

KERNELS = {name: config for name, config in SWINS.items() if not config.beyond_kernels("tokens")}


def test_what_has_kernels() -> None:
    assert {*KERNELS} >= {"v1", "not_square", "one_window", "positions", "three_stages", "oblong_windows"}
    assert not any("padded" in name or name.startswith("v2") for name in KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize("config", KERNELS.values(), ids=KERNELS)
@torch.no_grad()
def test_folded_weights_in_their_orders_give_the_same_outputs(config: SwinConfig) -> None:
    swin = random_swin(config)
    before = {name: parameter.clone() for name, parameter in swin.named_parameters()}
    images = pixels(config).double()
    expected = outputs_float64(swin, images, ("tokens", "features"))
    for output, answer in expected.items():
        model = swin_fused.fuse(swin, torch.float64, output=output)
        assert model.readout is not None
        actual = model.readout(tokens_of(model.shape, model.weights, images))
        # The readout's own output is float32.
        assert (actual - answer).norm() / answer.norm() < 1e-6
    assert all(torch.equal(p, before[name]) for name, p in swin.named_parameters()), "the original changed"
