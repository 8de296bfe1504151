"""The ResNet before the patches of hybrids: its arithmetic, and its rewrites one by one."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers.models import CONFIGS, pixels, random_vit
from vitdeploy.bundle.golden import GOLDEN_NAMES
from vitdeploy.config import Preprocess, Stem, ViTConfig, model_fields, model_type
from vitdeploy.errors import ConfigError
from vitdeploy.model.precision import PrecisionPlan, island_names
from vitdeploy.model.rewrites import applied_rewrites, deploy, forward_flops
from vitdeploy.model.stem import ResNetStem, StandardisedConv, same_padding
from vitdeploy.model.stem_deployed import Centre, Conv, DeployedStem, centre_pixels, standardise_weights

EXACT = 1e-12
HYBRIDS = {name: config for name, config in CONFIGS.items() if config.stem is not None}
each = pytest.mark.parametrize("config", HYBRIDS.values(), ids=HYBRIDS)
SPEC = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def stem_of(config: ViTConfig) -> ResNetStem:
    stem = random_vit(config).embedding.double().stem
    assert isinstance(stem, ResNetStem)
    return stem


def worst(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).item())


def random_conv(stem: Stem, kernel: int, stride: int) -> StandardisedConv:
    conv = StandardisedConv(stem, 4, 6, kernel, stride)
    torch.nn.init.normal_(conv.weight, 0.3, 0.2, generator=torch.Generator().manual_seed(0))
    return conv.double()


def test_filters_have_mean_0_and_deviation_1() -> None:
    filters = random_conv(Stem(), 3, 1).standardised().flatten(1)
    torch.testing.assert_close(filters.mean(1), torch.zeros(6).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(filters.std(1, correction=0), torch.ones(6).double(), rtol=0, atol=1e-6)


def test_epsilon_is_added_to_the_variance_or_to_the_deviation() -> None:
    conv = random_conv(Stem(weight_eps=0.5), 3, 1)
    # What BatchNorm does to a batch is what timm does to filters.
    normed = F.batch_norm(conv.weight.reshape(1, 6, -1), None, None, training=True, eps=0.5)
    torch.testing.assert_close(conv.standardised(), normed.reshape(conv.weight.shape), rtol=0, atol=1e-14)
    late = random_conv(Stem(weight_eps=0.5, weight_eps_on="deviation"), 3, 1).standardised().flatten(1)
    deviation = conv.weight.flatten(1).std(1, correction=0)
    torch.testing.assert_close(late.std(1, correction=0), deviation / (deviation + 0.5), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kernel, stride", [(7, 2), (3, 2), (3, 1), (1, 2), (1, 1)])
def test_padding_is_tensorflows_same(kernel: int, stride: int) -> None:
    for cells in (stride * 3, stride * 8):
        # https://www.tensorflow.org/api_docs/python/tf/nn#notes_on_padding_2
        total = max((-(-cells // stride) - 1) * stride + kernel - cells, 0)
        assert same_padding(kernel, stride) == (total // 2, total - total // 2)
    x = torch.randn(1, 4, 8, 12, dtype=torch.float64)
    conv = random_conv(Stem(), kernel, stride)
    assert conv(x).shape == (1, 6, 8 // stride, 12 // stride)


@pytest.mark.parametrize("kernel, stride", [(7, 2), (3, 2), (3, 1), (1, 2), (1, 1)])
@torch.no_grad()
def test_standardising_once_is_exact(kernel: int, stride: int) -> None:
    conv = random_conv(Stem(), kernel, stride)
    x = torch.randn(2, 4, 8, 12, dtype=torch.float64)
    once = standardise_weights(conv)
    assert isinstance(once, Conv)
    assert worst(once(x), conv(x)) < EXACT


@each
@torch.no_grad()
def test_the_deployed_stem_is_exact(config: ViTConfig) -> None:
    stem, x = stem_of(config), pixels(config).double()
    assert worst(DeployedStem(stem)(x), stem(x)) < EXACT


@each
@torch.no_grad()
def test_pixels_are_centred_before_the_border_is_padded(config: ViTConfig) -> None:
    stem = stem_of(config)
    deployed = DeployedStem(stem)
    raw = torch.randint(0, 256, (2, *config.image_size, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (SPEC.mean, SPEC.std))
    expected = stem(((raw.double() / 255 - mean) / std).permute(0, 3, 1, 2))
    centred = centre_pixels(deployed, SPEC)
    assert worst(centred(raw), expected) < EXACT
    assert deployed.centre is None, "the original changed"
    # Were the mean moved into a bias, the border would be wrong: planted.
    assert centred.centre is not None
    centred.centre = Centre(torch.zeros(3, dtype=torch.float64))
    assert worst(centred(raw), expected) > 1e-2


def test_what_is_counted_is_what_the_weights_are() -> None:
    config = HYBRIDS["hybrid"]
    weights = sum(p.numel() for name, p in stem_of(config).named_parameters() if p.dim() == 4)
    saved = {r.name: r.flops_saved for r in applied_rewrites(config, ("logits",), "uint8")}
    assert saved["standardise_weights"] == 5 * weights
    assert saved["fold_normalisation"] == 2 * 3 * 32 * 48
    assert 0 < saved["standardise_weights"] < forward_flops(config)
    assert "standardise_weights" not in {
        r.name for r in applied_rewrites(CONFIGS["vit"], ("logits",), "float")
    }


def test_norms_and_centred_pixels_are_islands() -> None:
    config, plan = HYBRIDS["hybrid"], PrecisionPlan.of("fp16")
    deployed = deploy(random_vit(config), plan, input_kind="uint8", preprocess=SPEC)
    of_stem = {name for name in island_names(deployed, plan) if name.startswith("stem.")}
    blocks = [f"stem.stages.{stage}.{block}" for stage, block in ((0, 0), (0, 1), (1, 0))]
    assert of_stem == {
        *("stem.centre", "stem.norm"),
        *(f"{block}.norm{n}" for block in blocks for n in (1, 2, 3)),
        *(f"{block}.downsample_norm" for block in blocks if not block.endswith(".1")),
    }


def test_a_configuration_with_a_stem_says_what_is_true_of_it() -> None:
    config = HYBRIDS["hybrid"]
    assert (config.step, config.grid, config.patches, config.tokens) == (8, (4, 6), 24, 25)
    assert config.at_size((64, 32)).grid == (8, 4)
    assert "patch 8 behind a ResNet of 2+1 blocks" in config.summary
    assert config.beyond_kernels("logits") == ("a ResNet of 2+1 blocks before the patches",)
    with pytest.raises(ConfigError, match=r"30x48 is not divisible by .* times the patch size, 8") as caught:
        config.at_size((30, 48))
    assert caught.value.hint == "nearest that is: 32x48"
    root = HYBRIDS["hybrid_root"]
    assert (root.step, root.patch_channels) == (8, 8)
    assert "a ResNet's root" in root.summary


@each
def test_a_stem_travels_as_json(config: ViTConfig) -> None:
    import pydantic

    kind, fields = model_type(json.loads(json.dumps(model_fields(config))))
    assert pydantic.TypeAdapter(kind).validate_python(fields) == config
    assert "stem" not in model_fields(CONFIGS["vit"])


@pytest.mark.parametrize(
    "change, says",
    [
        ({"stages": (1,) * 9}, "at most 8 stages"),
        ({"stages": (2, 0)}, "of 1 to 999 blocks"),
        ({"stages": (2, 1000)}, "of 1 to 999 blocks"),
        ({"width": 12, "groups": 8}, "12 channels of a ResNet are not divisible by 8 groups"),
        ({"width": 0, "groups": 1}, "0 channels"),
    ],
)
def test_impossible_stems_say_why(change: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Stem(**change)  # type: ignore[arg-type]


@pytest.mark.slow
def test_memory_that_is_counted_is_what_pytorch_takes() -> None:
    from torch.profiler import ProfilerActivity, profile

    from vitdeploy.checkpoint.footprint import needed_bytes
    from vitdeploy.model.reference import forward_float64

    config = dataclasses.replace(HYBRIDS["hybrid"], image_size=(96, 96))
    model, x = random_vit(config), torch.zeros(len(GOLDEN_NAMES), 3, 96, 96)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        forward_float64(model, x)
    held = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert needed_bytes(config) <= peak <= 6 * needed_bytes(config)
