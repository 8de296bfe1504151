"""The search for islands on models with planted massive values, against what was planted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers.models import CONFIGS, pixels, random_vit
from vitdeploy.exporter.fallback import Proposal, Verdict, emulate, smallest_islands
from vitdeploy.model.deployed import DeployedModel
from vitdeploy.model.precision import PrecisionPlan
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.rewrites import deploy
from vitdeploy.model.vit import ViT

CONFIG = CONFIGS["vit"]
FP16 = PrecisionPlan.of("fp16")


def accepts(vit: ViT, x: Tensor) -> Verdict:
    reference = forward_float64(vit, x)

    def close(outputs: tuple[Tensor, ...]) -> bool:
        (output,) = outputs
        error = (output.double() - reference).norm() / reference.norm()
        return bool(torch.isfinite(output).all()) and float(error) < 5e-3

    return close


def planted(block: int, value: float) -> ViT:
    """A model whose residual stream carries a huge value in one channel from this block's MLP on."""
    vit = random_vit(CONFIG)
    vit.blocks[block].mlp.fc2.bias[7] = value
    for later in vit.blocks[block + 1 :]:
        later.norm1.weight[7] = later.norm2.weight[7] = 0.0
    return vit


def search(vit: ViT, plan: PrecisionPlan = FP16) -> tuple[Proposal | None, DeployedModel, Tensor]:
    x = pixels(CONFIG)
    deployed = deploy(vit, PrecisionPlan.of("fp32"))
    return smallest_islands(deployed, plan, x, accepts(vit, x)), deployed, x


def test_a_healthy_model_needs_no_island() -> None:
    proposal, _, _ = search(random_vit(CONFIG))
    assert proposal is not None
    assert proposal.islands == frozenset()


@pytest.mark.parametrize("block", [0, 1])
def test_a_massive_residual_is_found_where_it_begins(block: int) -> None:
    # The bias alone fits into fp16; two blocks of it in the residual stream do not.
    vit = planted(block, 60_000.0)
    vit.blocks[block].attn.proj.bias[7] = 60_000.0
    proposal, deployed, x = search(vit)
    assert proposal is not None
    assert proposal.first == f"blocks.{block}.add2"
    assert proposal.islands <= {f"blocks.{i}.add{k}" for i in range(block, CONFIG.depth) for k in (1, 2)}
    good = accepts(vit, x)
    assert good(emulate(deployed, FP16.with_islands(proposal.islands), x))
    for island in proposal.islands:  # none is there for nothing
        assert not good(emulate(deployed, FP16.with_islands(proposal.islands - {island}), x)), island


def test_an_overflowing_gemm_is_named_with_its_value() -> None:
    vit = planted(1, 50_000.0)
    vit.blocks[1].mlp.fc1.bias[3], vit.blocks[1].mlp.fc2.weight[7, 3] = 500.0, 100.0
    proposal, _, _ = search(vit)
    assert proposal is not None
    assert proposal.first == "blocks.1.mlp.fc2"
    assert "blocks.1.mlp.fc2" in proposal.islands
    assert "beyond the dtype's 65504" in proposal.reason


def test_a_model_that_breaks_everywhere_gets_no_proposal() -> None:
    proposal, _, _ = search(random_vit(CONFIG, spread=30.0))
    assert proposal is None


def test_emulation_leaves_the_model_as_it_was() -> None:
    vit, x = random_vit(CONFIG), pixels(CONFIG)
    deployed = deploy(vit, PrecisionPlan.of("fp32"))
    before = {name: p.clone() for name, p in deployed.named_parameters()}
    with torch.inference_mode():
        expected = deployed(x)
        (rounded,) = emulate(deployed, FP16, x)
        assert torch.equal(deployed(x), expected)
    assert not torch.equal(rounded, expected)
    assert all(torch.equal(p, before[name]) for name, p in deployed.named_parameters())


def test_emulation_is_as_far_off_as_fp16_itself() -> None:
    vit, x = random_vit(CONFIG), pixels(CONFIG)
    reference = forward_float64(vit, x)
    with torch.inference_mode():
        (emulated,) = emulate(deploy(vit, PrecisionPlan.of("fp32")), FP16, x)
        real = deploy(vit, FP16)(x)
    ours, theirs = ((y.double() - reference).norm() for y in (emulated, real))
    assert 0.3 < ours / theirs < 3
