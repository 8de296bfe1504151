"""Migration computes the same function, whatever the structure; and where it is not exact it is not done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.quantised_models import MODELS, deployed, images_of
from vitdeploy.model.deployed import DeployedModel
from vitdeploy.model.precision import PrecisionPlan
from vitdeploy.progress import Progress
from vitdeploy.quantisation import migration
from vitdeploy.quantisation.layers import quantisable, tensors_of, watching
from vitdeploy.quantisation.migration import migrate, rounding_noise, scale_input, shift_input
from vitdeploy.quantisation.ranges import measure

EXACT = 1e-10


def difference(model: DeployedModel, other: DeployedModel, images: Tensor) -> float:
    pairs = zip(tensors_of(model(images)), tensors_of(other(images)), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def spread(model: DeployedModel, images: Tensor) -> dict[str, tuple[float, float]]:
    """Of what each layer reads: the largest distance from zero, and of a channel's middle from zero."""
    found: dict[str, tuple[float, float]] = {}

    def look(name: str, x: Tensor) -> None:
        low, high = x.flatten(0, -2).aminmax(dim=0)
        found[name] = (x.abs().max().item(), ((low + high) / 2).abs().max().item())

    with watching(quantisable(model), look):
        model(images)
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "swin wide" else []) for name in MODELS]
)
@torch.no_grad()
def test_migrated_models_are_the_same_function(name: str) -> None:
    model, images = deployed(name, PrecisionPlan.exact()), images_of(name).double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ranges = measure(model, images, Progress())
    migrated = migrate(model, ranges)
    assert difference(migrated, model, images) < EXACT
    assert difference(migrated, model, images_of(name, seed=8).double()) < EXACT, "of other images"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    moved = [
        key
        for key, value in migrated.state_dict().items()
        if key in before and not torch.equal(value, before[key])
    ]
    assert any(key.endswith("proj.weight") for key in moved) or not quantisable(model)


@pytest.mark.parametrize("name", ["vit", "eva02", "beit", "swin v1", "swin v2", "qwen3", "qwen2_5"])
@torch.no_grad()
def test_migrated_inputs_lie_around_zero(name: str) -> None:
    model, images = deployed(name, PrecisionPlan.exact()), images_of(name).double()
    after = spread(migrate(model, measure(model, images, Progress())), images)
    for site, (largest, middle) in after.items():
        if site.endswith("attn.proj"):
            assert middle < 1e-5 * largest, site
    if name in ("vit", "eva02", "beit", "swin v1", "qwen3"):
        readers = [site for site in after if site.endswith(("qkv", ".q", "fc1", "gate", "reduction"))]
        assert readers
        assert all(after[site][1] < 1e-5 * after[site][0] for site in readers)


@torch.no_grad()
def test_an_inner_norm_takes_what_fc2_reads() -> None:
    model, images = deployed("eva02", PrecisionPlan.exact()), images_of("eva02").double()
    after = spread(migrate(model, measure(model, images, Progress())), images)
    assert all(middle < 1e-5 * largest for site, (largest, middle) in after.items() if site.endswith("fc2"))


@torch.no_grad()
def test_rows_of_zeros_between_norm_and_projection_keep_it_uncentred() -> None:
    model, images = deployed("swin padded", PrecisionPlan.exact()), images_of("swin padded").double()
    ranges = measure(model, images, Progress())
    migrated: Any = migrate(model, ranges)
    original: Any = model
    padding = [
        i for i, block in enumerate(original.blocks) if block.attn.cut is not None and block.attn.cut.pads
    ]
    assert padding
    for i in padding:
        ratio = migrated.blocks[i].norm1.bias / migrated.blocks[i].norm1.weight
        assert torch.allclose(ratio, original.blocks[i].norm1.bias / original.blocks[i].norm1.weight)


@torch.no_grad()
def test_what_is_not_known_stays_as_it_is() -> None:
    class Other(torch.nn.Module):
        """An attention of a kind of its own."""

        def __init__(self, attn: Any) -> None:
            super().__init__()
            self.qkv, self.proj = attn.qkv, attn.proj

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(self.qkv(x)[..., : x.shape[-1]] ** 2)  # type: ignore[no-any-return]

    model: Any = deployed("vit", PrecisionPlan.exact())
    model.blocks[0].attn = Other(model.blocks[0].attn)
    images = images_of("vit").double()
    migrated: Any = migrate(model, measure(model, images, Progress()))
    assert difference(migrated, model, images) < EXACT
    assert migrated.blocks[0].attn.qkv.weight is model.blocks[0].attn.qkv.weight
    assert migrated.blocks[0].norm1.weight is model.blocks[0].norm1.weight


@pytest.mark.parametrize("name", ["vit", "dinov2", "swin v2"])
@torch.no_grad()
def test_a_scale_before_fc2_is_taken_back(name: str) -> None:
    model, images = deployed(name, PrecisionPlan.exact()), images_of(name).double()
    expected = tensors_of(model(images))
    for block in model.blocks:
        part: Any = block
        scale_input(part.mlp, torch.linspace(0.5, 8, len(part.mlp.fc2.weight)))
    found = tensors_of(model(images))
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)) < EXACT
    part.mlp.before = None
    assert not torch.allclose(tensors_of(model(images))[0], expected[0])


def test_the_noise_of_rounding_is_what_is_predicted() -> None:
    """On inputs and weights that fill their grids evenly."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((4000, 32), generator=generator).double() - 0.5
    weight = torch.rand((32, 64), generator=generator).double() - 0.5
    step, bound = 1 / 254, 63
    scale = weight.abs().amax(0) / bound
    exact = x @ weight
    for rounded, made_up in (
        ((x / step).round() * step @ weight, 0.0),
        (x @ ((weight / scale).round() * scale), migration._MADE_UP),
    ):
        found = float((rounded - exact).square().mean(0).sum())
        part = rounding_noise(step if not made_up else 0.0, weight, x.var(0) * bool(made_up), bound)
        assert found == pytest.approx(part / (made_up or 1), rel=0.1)


@pytest.mark.parametrize("name", ["vit", "dinov2", "eva02", "swin v2", "qwen2"])
@torch.no_grad()
def test_a_shift_before_fc2_is_taken_back(name: str) -> None:
    model, images = deployed(name, PrecisionPlan.exact()), images_of(name).double()
    expected = tensors_of(model(images))
    for block in model.blocks:
        part: Any = block
        shift_input(part.mlp, 0.75)
    found = tensors_of(model(images))
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)) < EXACT
    part.mlp.fc2.bias = None
    assert not torch.allclose(tensors_of(model(images))[0], expected[0])
