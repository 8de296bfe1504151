"""A quantised model answers nearly as the float one does; planted faults are seen as large errors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.quantised_models import MODELS, deployed, images_of
from vitdeploy.bundle.dtypes import Quantised
from vitdeploy.config import Precision
from vitdeploy.errors import UsageError
from vitdeploy.model.deployed import DeployedModel, Linear, Scale, Shift
from vitdeploy.model.folds import parameter
from vitdeploy.model.vit_deployed import AbsorbedBlock
from vitdeploy.progress import Progress, Stage
from vitdeploy.quantisation import leaving_out, recipe
from vitdeploy.quantisation.deviation import Deviation, deviation, relative_error
from vitdeploy.quantisation.layers import macs_of, quantisable, tensors_of, watching
from vitdeploy.quantisation.leaving_out import MOST_FLOAT
from vitdeploy.quantisation.recipe import TARGETS, quantise, simulate
from vitdeploy.quantisation.sites import QuantisedModel, QuantisedSite

FAMILIES = [
    "vit",
    "dinov2",
    "eva02",
    "beit",
    "siglip",
    "clip",
    "swin v1",
    "swin padded",
    "swin v2",
    "qwen2_5",
]


def error(model: DeployedModel, quantised: QuantisedModel, images: Tensor) -> float:
    return relative_error(simulate(quantised, images), tensors_of(model(images)))


def layer(model: DeployedModel, name: str) -> Linear:
    return quantisable(model)[name]


@pytest.fixture(scope="module")
def vit() -> DeployedModel:
    """Every block is read whole."""
    return deployed("vit", outputs=("tokens",))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return images_of("vit", 16)


@pytest.fixture(scope="module")
def int8(vit: DeployedModel, images: Tensor) -> QuantisedModel:
    return quantise(vit, images, kind="int8")


@pytest.fixture(scope="module")
def shifted(vit: DeployedModel, images: Tensor) -> QuantisedModel:
    """With shifts before all second layers, as if scales of channels never cost less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "rounding_noise", lambda *_: 0.0)
        return quantise(vit, images, kind="int8")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("name", [*FAMILIES, "hybrid", "dinov3", "swin v2_padded", "qwen2", "qwen3"])
@torch.no_grad()
def test_every_family_is_quantised(name: str, kind: Quantised) -> None:
    model = deployed(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quantised = quantise(model, images_of(name, 16), kind=kind)
    held_out = error(model, quantised, images_of(name, 8, seed=9))
    assert held_out < 2.5 * TARGETS[kind].error
    assert quantised.found.error == pytest.approx(error(model, quantised, images_of(name, 16)), rel=0.2)
    assert {*quantised.sites} | {*quantised.left_out} == {*quantisable(model)}
    assert not {*quantised.sites} & {*quantised.left_out}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for site in quantised.sites.values():
        linear = layer(quantised.model, site.name)
        assert torch.equal(linear.weight, site.dequantised)
        assert linear.bias is not None
        assert site.bias is not None
        assert torch.equal(linear.bias, site.bias)
        assert site.kind == kind
        assert site.weight_scale.shape == (linear.weight.shape[1:] if kind == "int8" else ())


@pytest.mark.parametrize("bits", [7, 8])
@torch.no_grad()
def test_int8_is_better_than_max_and_nearest(vit: DeployedModel, images: Tensor, bits: int) -> None:
    """Where channels differ in what they carry, as they do in trained models."""
    vit = uneven(vit)
    ours = quantise(vit, images, kind="int8", weight_bits=bits, target=Deviation(9.0, 1.0))
    bound = 2 ** (bits - 1) - 1
    plain, sites = copy.deepcopy(vit), {}
    for name, linear in quantisable(plain).items():
        scale = linear.weight.abs().amax(0) / bound
        weight = (linear.weight / scale).round().to(torch.int8)
        largest = max(ours.ranges.high[name].max().item(), -ours.ranges.low[name].min().item())
        sites[name] = QuantisedSite(name, "int8", weight, scale, largest / 127, linear.bias)
        linear.weight = parameter(sites[name].dequantised)
    naive = replace(ours, model=plain, sites=sites)
    held_out = images_of("vit", 8, seed=9)
    assert error(vit, ours, held_out) < 0.5 * error(vit, naive, held_out)


def uneven(vit: DeployedModel) -> DeployedModel:
    """With one channel that is thirty times as large as others, and one far from zero."""
    model: Any = copy.deepcopy(vit)
    for block in model.blocks:
        for norm, reader in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            norm.weight, norm.bias, reader.weight = (
                parameter(tensor.clone()) for tensor in (norm.weight, norm.bias, reader.weight)
            )
            norm.weight[3], norm.bias[5] = 30.0, 20.0
            reader.weight[[3, 5]] /= 30
    return model  # type: ignore[no-any-return]


@torch.no_grad()
def test_a_site_of_its_own_is_rounded_as_a_runtime_does(int8: QuantisedModel) -> None:
    """In integers, by numpy: QuantizeLinear, an integer product, scales and bias."""
    site = int8.sites["blocks.1.mlp.fc2"]
    x = 0.3 * torch.randn(5, len(site.weight), generator=torch.Generator().manual_seed(0)) - 0.1
    integers = (x.numpy() / site.input_scale).round().clip(-128, 127).astype("int64")
    products = integers @ site.weight.numpy().astype("int64")
    assert site.bias is not None
    expected = products * (site.weight_scale.double().numpy() * site.input_scale) + site.bias.double().numpy()
    found = layer(int8.model, site.name)(site.rounded(x))
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_shifts_are_whole_numbers_of_steps(shifted: QuantisedModel) -> None:
    model: Any = shifted.model
    for i in range(len(model.blocks)):
        steps = model.blocks[i].mlp.before.value.item() / shifted.sites[f"blocks.{i}.mlp.fc2"].input_scale
        assert steps == pytest.approx(round(steps), abs=1e-3)
        assert 20 < abs(steps) < 127, "what a GELU gives is nearly all above zero"


@pytest.mark.parametrize("rest", ["fp32", "fp16"])
@torch.no_grad()
def test_channels_are_scaled_before_fc2_where_they_differ(images: Tensor, rest: Precision) -> None:
    """What one number cannot centre: a channel of a hundred times the others' range."""
    model: Any = copy.deepcopy(deployed("vit", outputs=("tokens",)))
    mlp = model.blocks[1].mlp
    mlp.fc1.weight, mlp.fc2.weight = (parameter(part.weight.clone()) for part in (mlp.fc1, mlp.fc2))
    mlp.fc1.weight[:, 0] *= 100
    mlp.fc2.weight[0] /= 100
    found: Any = quantise(model, images, kind="int8", rest=rest, target=Deviation(9.0, 1.0))
    before, site = found.model.blocks[1].mlp.before, found.sites["blocks.1.mlp.fc2"]
    assert isinstance(before, Scale)
    assert before.value.median() > 10 * before.value[0]
    exact = mlp.fc2.weight / before.value[:, None]
    torch.testing.assert_close(found.floats[site.name], exact)
    assert float((site.dequantised - exact).norm() / exact.norm()) < 0.05
    if rest == "fp16":
        assert torch.equal(before.value, before.value.half().float())
    held_out = images_of("vit", 8, seed=9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "rounding_noise", lambda *_: 0.0)
        shifted = quantise(model, images, kind="int8", rest=rest, target=Deviation(9.0, 1.0))
    assert error(model, found, held_out) < 0.8 * error(model, shifted, held_out)


@torch.no_grad()
def test_fp8_is_neither_migrated_nor_shifted(vit: DeployedModel, images: Tensor) -> None:
    quantised: Any = quantise(vit, images, kind="fp8")
    model: Any = vit
    assert all(block.mlp.before is None for block in quantised.model.blocks)
    assert torch.equal(quantised.model.blocks[0].norm1.weight, model.blocks[0].norm1.weight)
    assert all(site.weight.dtype == torch.float8_e4m3fn for site in quantised.sites.values())


@torch.no_grad()
def test_last_blocks_that_are_absorbed_and_embeddings_stay_float() -> None:
    model = deployed("vit")
    assert isinstance(model.blocks[-1], AbsorbedBlock)
    quantised = quantise(model, images_of("vit", 8), kind="int8")
    assert {name.split(".")[1] for name in quantised.sites} == {"0", "1"}
    macs = macs_of(model, images_of("vit", 1))
    assert "patch_embed" in macs
    assert any(name.startswith("blocks.2.") for name in macs)
    assert quantised.macs == pytest.approx(sum(macs[name] for name in quantised.sites) / sum(macs.values()))
    assert 0.5 < quantised.macs < 1


# --- layers left out ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_layers_are_left_out_until_the_target_is_met(
    vit: DeployedModel, images: Tensor, int8: QuantisedModel
) -> None:
    assert not int8.left_out
    assert int8.found.error < TARGETS["int8"].error
    target = 0.9 * int8.found.error
    quantised = quantise(vit, images, kind="int8", target=Deviation(target, 1.0))
    assert quantised.left_out
    assert quantised.found.error <= target
    assert not quantised.falls_short
    assert quantised.macs >= 1 - MOST_FLOAT
    assert quantised.found.error == pytest.approx(error(vit, quantised, images), rel=0.2)


@torch.no_grad()
def test_layers_are_left_out_until_classes_are_as_probable(images: Tensor) -> None:
    model = deployed("vit", outputs=("logits",))
    nearly = quantise(model, images, kind="int8", target=Deviation(9.0, 9.0))
    assert not nearly.left_out
    target = Deviation(9.0, 0.8 * nearly.found.divergence)
    quantised = quantise(model, images, kind="int8", target=target)
    assert quantised.left_out
    assert not quantised.falls_short
    found = deviation(("logits",), simulate(quantised, images), tensors_of(model(images)))
    assert found.divergence == pytest.approx(quantised.found.divergence, rel=0.2)
    assert found.divergence < nearly.found.divergence


@torch.no_grad()
def test_a_target_that_cannot_be_met_is_said(vit: DeployedModel, images: Tensor) -> None:
    quantised = quantise(vit, images, kind="int8", target=Deviation(1e-6, 1.0))
    assert quantised.falls_short
    assert 1 - MOST_FLOAT <= quantised.macs < 1 - MOST_FLOAT / 2


@torch.no_grad()
def test_the_worst_layer_goes_first(vit: DeployedModel, images: Tensor) -> None:
    """One column of one layer reads what is ten thousand times as large: no scale serves it."""
    model: Any = copy.deepcopy(vit)
    mlp = model.blocks[1].mlp
    mlp.fc1.weight, mlp.fc2.weight = (parameter(part.weight.clone()) for part in (mlp.fc1, mlp.fc2))
    mlp.fc1.weight[:, 0] *= 1e4
    mlp.fc2.weight[0] /= 1e4
    quantised = quantise(model, images, kind="int8", target=Deviation(0.03, 1.0))
    assert quantised.left_out == ("blocks.1.mlp.fc2",)


@pytest.mark.parametrize("name", ["vit", "eva02", "swin v1", "qwen3"])
@torch.no_grad()
def test_what_is_left_out_keeps_neither_shift_nor_rounding(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With everything left out, what remains is the migrated model in float32."""
    monkeypatch.setattr(leaving_out, "MOST_FLOAT", 2.0)
    model, images = deployed(name), images_of(name, 8)
    quantised = quantise(model, images, kind="int8", target=Deviation(1e-12, 1.0))
    assert {*quantised.left_out} == {*quantisable(model)}
    assert not quantised.sites
    assert quantised.macs == 0
    assert not any(isinstance(module, Shift | Scale) for module in quantised.model.modules())
    assert error(model, quantised, images) == quantised.found.error < 1e-5


# --- planted faults ----------------------------------------------------------------------------------------


def with_site(quantised: QuantisedModel, name: str, **changes: Any) -> QuantisedModel:
    """With something else about one site, in the model as well."""
    model = copy.deepcopy(quantised.model)
    site = replace(quantised.sites[name], **changes)
    linear = layer(model, name)
    linear.weight = parameter(site.dequantised)
    linear.bias = None if site.bias is None else parameter(site.bias)
    return replace(quantised, model=model, sites={**quantised.sites, name: site})


def shift_kept(quantised: QuantisedModel, vit: DeployedModel) -> QuantisedModel:
    """On a site that is left unquantised."""
    name = "blocks.0.mlp.fc2"
    model: Any = copy.deepcopy(quantised.model)
    original = layer(vit, name)
    model.blocks[0].mlp.fc2 = Linear(original.weight, original.bias)
    assert isinstance(model.blocks[0].mlp.before, Shift)
    sites = {site: found for site, found in quantised.sites.items() if site != name}
    return replace(quantised, model=model, sites=sites)


def float_weights_in_the_bias(quantised: QuantisedModel, vit: DeployedModel) -> QuantisedModel:
    """Of a shift of many steps, as a coarse weight feels it."""
    model: Any = quantised.model
    name = "blocks.0.mlp.fc2"
    site, original = quantised.sites[name], layer(vit, name)
    assert original.bias is not None
    c = -model.blocks[0].mlp.before.value
    scale = site.weight_scale * 16
    weight = (site.dequantised / scale).round().to(torch.int8)
    coarse = with_site(quantised, name, weight=weight, weight_scale=scale)
    dequantised = coarse.sites[name].dequantised
    right = with_site(coarse, name, bias=original.bias + c * dequantised.sum(0))
    wrong = with_site(coarse, name, bias=original.bias + c * original.weight.sum(0))
    held_out = images_of("vit", 8, seed=9)
    assert error(vit, wrong, held_out) > 1.5 * error(vit, right, held_out)
    return wrong


def swapped_scales(quantised: QuantisedModel, vit: DeployedModel) -> QuantisedModel:
    """Of the sites with the least and the largest."""
    first, *_, second = sorted(quantised.sites.values(), key=lambda site: site.input_scale)
    swapped = with_site(quantised, first.name, input_scale=second.input_scale)
    return with_site(swapped, second.name, input_scale=first.input_scale)


def clipped_ranges(quantised: QuantisedModel, vit: DeployedModel) -> QuantisedModel:
    for name, site in quantised.sites.items():
        quantised = with_site(quantised, name, input_scale=site.input_scale / 3)
    return quantised


FAULTS: list[Callable[[QuantisedModel, DeployedModel], QuantisedModel]] = [
    shift_kept,
    float_weights_in_the_bias,
    swapped_scales,
    clipped_ranges,
]


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
@torch.no_grad()
def test_planted_faults_are_seen(
    vit: DeployedModel, shifted: QuantisedModel, plant: Callable[..., QuantisedModel]
) -> None:
    held_out = images_of("vit", 8, seed=9)
    assert error(vit, plant(shifted, vit), held_out) > 2 * error(vit, shifted, held_out)


# --- what is handed in and told ----------------------------------------------------------------------------


@torch.no_grad()
def test_ranges_can_be_handed_in(vit: DeployedModel, images: Tensor, int8: QuantisedModel) -> None:
    stages: list[str] = []

    class Told(Progress):
        def started(self, stage: Stage) -> None:
            stages.append(stage.name)

    again = quantise(vit, images, kind="int8", ranges=int8.ranges, progress=Told())
    assert stages == ["quantised weights", "layers left out"]
    assert same(again.sites, int8.sites)
    with pytest.raises(UsageError, match="of another model"):
        quantise(deployed("dinov2"), images_of("dinov2"), kind="int8", ranges=int8.ranges)


def same(sites: Mapping[str, QuantisedSite], others: Mapping[str, QuantisedSite]) -> bool:
    return sites.keys() == others.keys() and all(
        torch.equal(site.weight, others[name].weight) and site.input_scale == others[name].input_scale
        for name, site in sites.items()
    )


@torch.no_grad()
def test_an_fp16_rest_has_scales_of_fp16(vit: DeployedModel, images: Tensor) -> None:
    quantised = quantise(vit, images, kind="int8", rest="fp16")
    for site in quantised.sites.values():
        scales = torch.cat([site.weight_scale, torch.tensor([site.input_scale])])
        assert torch.equal(scales.half().float(), scales)
    assert error(vit, quantised, images_of("vit", 8, seed=9)) < 0.06


@torch.no_grad()
def test_layers_that_read_the_same_have_one_scale() -> None:
    quantised = quantise(
        deployed("qwen2_5"), images_of("qwen2_5", 8), kind="int8", target=Deviation(9.0, 1.0)
    )
    for names in (("attn.q", "attn.k", "attn.v"), ("mlp.gate", "mlp.fc1")):
        assert len({quantised.sites[f"blocks.0.{name}"].input_scale for name in names}) == 1


def test_hooks_are_taken_away(vit: DeployedModel) -> None:
    def fails(name: str, x: Tensor) -> None:
        raise KeyError(name)

    with pytest.raises(KeyError), watching(quantisable(vit), fails):
        vit(images_of("vit", 1))
    vit(images_of("vit", 1))


def test_models_are_those_of_every_kind() -> None:
    assert {config.kind for config in MODELS.values()} == {"vit", "swin", "qwen_vl"}
