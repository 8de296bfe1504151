"""Swin: the rewrites compute the same function as the reference, and what would be wrong in it shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.models import pixels, random_state
from tests.helpers.swin_faults import FAULTS, of_the_wrong_block
from tests.helpers.swins import SMALL, SWINS, random_swin
from vitdeploy.config import CONFIGS, Preprocess, SwinConfig, model_fields, model_type
from vitdeploy.errors import ConfigError, PrecisionError
from vitdeploy.model import swin_rewrites
from vitdeploy.model.precision import PrecisionPlan, island_names, sites
from vitdeploy.model.reference import forward_float64, outputs_float64
from vitdeploy.model.registry import build_reference
from vitdeploy.model.swin import Swin
from vitdeploy.model.swin_rewrites import deploy

EXACT = 1e-12
EVERY = pytest.mark.parametrize("config", SWINS.values(), ids=SWINS)


def worst(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).item())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float", "uint8"])
@EVERY
@torch.no_grad()
def test_the_deployed_model_is_exact_for_every_output(config: SwinConfig, kind: str) -> None:
    swin = random_swin(config)
    spec = Preprocess(size=config.image_size, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    raw = torch.randint(0, 256, (3, *config.image_size, 3), dtype=torch.uint8)
    mean, std = torch.tensor(spec.mean, dtype=torch.float64), torch.tensor(spec.std, dtype=torch.float64)
    normalised = ((raw.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    outputs = (*config.outputs, "layer_0", "layer_1", "layer_2", f"layer_{config.depth - 1}")
    expected = outputs_float64(swin, normalised, outputs)
    input_kind: Any = kind
    deployed = deploy(swin, PrecisionPlan.exact(), outputs=outputs, input_kind=input_kind, preprocess=spec)
    found = deployed(raw if kind == "uint8" else normalised)
    for output, got in zip(outputs, found, strict=True):
        assert got.dtype == torch.float64
        assert got.shape == (3, *(config.output_shape(output) or ())), output
        assert worst(got, expected[output]) < EXACT, output
        assert (got[0] - got[1]).abs().max() > 1e-3, output


@pytest.mark.slow
@EVERY
@torch.no_grad()
def test_fused_attention_is_the_same_function(config: SwinConfig) -> None:
    state = {name: tensor.double() for name, tensor in random_state(config).items()}
    x = pixels(config).double()
    fused = build_reference(config, state, fused_attention=True)
    assert worst(fused(x), build_reference(config, state)(x)) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("output", ["logits", "tokens", "layer_1"])
@pytest.mark.parametrize("name", ["v1", "padded", "odd_map", "three_stages", "wide", "v2", "v2_padded"])
def test_reported_flops_are_those_pytorch_counts(name: str, output: str) -> None:
    config = SWINS[name]
    swin, x = random_swin(config), pixels(config, 1)

    def counted(module: nn.Module, *args: object) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(x, *args)
        return int(counter.get_total_flops())

    if output == "logits":
        assert counted(swin) == swin_rewrites.forward_flops(config)
    saved = {r.name: r.flops_saved for r in swin_rewrites.applied_rewrites(config, (output,), "float")}
    deployed = deploy(swin, PrecisionPlan.of("fp32"), outputs=(output,))
    gemms = saved["fix_relative_positions"] + saved.get("project_without_padding", 0)
    assert counted(deployed) == counted(swin, output) - gemms


def test_flops_of_swin_t_are_the_papers() -> None:
    assert swin_rewrites.forward_flops(SwinConfig()) / 2e9 == pytest.approx(4.5, abs=0.05)


def test_rewrites_are_those_that_apply() -> None:
    def names(config: SwinConfig, kind: Any = "float") -> set[str]:
        return {rewrite.name for rewrite in swin_rewrites.applied_rewrites(config, ("logits",), kind)}

    always = {"patches_to_gemm", "keep_window_order", "merge_by_gather", "fix_mask"}
    always |= {"fix_relative_positions", "move_value_bias"}
    assert names(SWINS["v1"]) == always | {"fold_attention_scale", "drop_key_bias"}
    assert names(SWINS["wide"]) == names(SWINS["v1"]) | {"merge_qkv"}
    assert names(SWINS["v2"]) == always | {"fix_attention_scale", "merge_qkv"}
    assert names(SWINS["padded"], "uint8") - names(SWINS["v1"]) == {
        "project_without_padding",
        "fold_normalisation",
    }


@pytest.mark.slow
def test_tokens_change_their_order_seven_times_in_swin_t() -> None:
    config = SwinConfig(width=8, heads=(1, 1, 1, 1), classes=2)
    deployed = deploy(random_swin(config), PrecisionPlan.of("fp32"))
    merges = [block.merge is not None for block in deployed.blocks]
    changes = [block.reorder is not None for block in deployed.blocks]
    assert (sum(merges), sum(changes)) == (3, 7)
    assert not any(block.attn.cut or block.attn.join for block in deployed.blocks)
    assert deployed.readout.rows is None


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ["v1", "wide", "v2"])
@torch.no_grad()
def test_norms_and_cosines_are_islands(name: str, precision: str) -> None:
    config = SWINS[name]
    plan = PrecisionPlan.of(precision)  # type: ignore[arg-type]
    deployed = deploy(random_swin(config), plan, outputs=("logits", "tokens", "layer_1"))
    norms = {"norm", "pool", "patch_norm", "blocks.2.merge.norm"}
    norms |= {f"blocks.{i}.norm{k}" for i in range(config.depth) for k in (1, 2)}
    norms |= {f"blocks.{i}.attn.cosine" for i in range(config.depth)} if config.version == 2 else set()
    islands = set(island_names(deployed, plan))
    assert islands == (set() if precision == "fp32" else norms)
    for site, module in sites(deployed):
        dtype = torch.float32 if site in islands else plan.default
        assert all(p.dtype == dtype for p in module.parameters(recurse=False)), site
    assert {tensor.dtype for tensor in deployed(pixels(config))} == {torch.float32}


def test_weights_beyond_fp16_are_named() -> None:
    swin = random_swin(SWINS["v1"])
    swin.layers[1].blocks[0].mlp.fc1.weight[3, 4] = 70_000
    with pytest.raises(PrecisionError, match=r"blocks\.2\.mlp\.fc1\.weight \(largest magnitude 70000\)"):
        deploy(swin, PrecisionPlan.of("fp16"))


@torch.no_grad()
def test_a_layer_is_all_that_is_read() -> None:
    config = SWINS["v1"]
    swin, x = random_swin(config), pixels(config).double()
    deployed = deploy(swin, PrecisionPlan.exact(), outputs=("layer_2",))
    assert len(deployed.blocks) == 3
    assert not list(deployed.readout.parameters())
    assert worst(deployed(x), forward_float64(swin, x, "layer_2")) < EXACT


@EVERY
def test_configurations_survive_a_manifest(config: SwinConfig) -> None:
    kind, fields = model_type(model_fields(config))
    assert kind is CONFIGS["swin"]
    assert kind(**fields) == config  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": (2,)}, "heads has 1 entries for 2 stages"),
        ({"windows": ((4, 4),)}, "windows has 1 entries"),
        ({"pretrained_windows": ((4, 4),)}, "pretrained_windows has 1 entries"),
        ({"depths": (), "heads": (), "windows": (), "shifts": ()}, "must be at least 1"),
        ({"depths": (2, 0)}, "must be at least 1"),
        ({"shifts": ((4, 2), (2, 2))}, "windows of 4x4 cannot be shifted by 4x2"),
        ({"heads": (3, 4)}, "width 16 is not divisible by 3 heads"),
        ({"mlp_ratio": 0.01}, "leaves no columns"),
        ({"image_size": (33, 32)}, "image size 33x32 is not divisible by the patch size 2"),
        ({"image_size": (32, 12)}, "stage 1 has windows of 4x4, but a map of 8x3"),
    ],
)
def test_configurations_that_cannot_be_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        SwinConfig(**SMALL | changes)


def test_the_least_image_that_is_told_can_be_built() -> None:
    config = SwinConfig()
    with pytest.raises(ConfigError) as caught:
        config.at_size((128, 224))
    assert caught.value.hint == "no side of an image may be less than 196 pixels"
    assert config.at_size((196, 196)).maps[-1] == (7, 7)


# --- faults ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("name", ["v1", "padded", "v2"])
@torch.no_grad()
def test_a_fault_of_the_deployed_form_is_noticed(
    name: str, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    swin, x = random_swin(SWINS[name]), pixels(SWINS[name]).double()
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        deployed = deploy(swin, PrecisionPlan.exact())
    assert worst(deployed(x), forward_float64(swin, x)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v1", "v2"])
@torch.no_grad()
def test_biases_of_the_wrong_block_are_noticed(name: str) -> None:
    config = SWINS[name]
    state, x = random_state(config), pixels(config).double()
    faulty = build_reference(config, of_the_wrong_block(state))
    assert isinstance(faulty, Swin)
    expected = forward_float64(build_reference(config, state), x)
    assert worst(deploy(faulty, PrecisionPlan.exact())(x), expected) > 1e-3


@pytest.mark.parametrize("name", ["v1", "v2"])
@torch.no_grad()
def test_another_order_than_the_windows_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Gather that goes the wrong way."""
    swin, x = random_swin(SWINS[name]), pixels(SWINS[name]).double()
    right = swin_rewrites.reorder
    monkeypatch.setattr(swin_rewrites, "reorder", lambda now, then: right(then, now))
    assert worst(deploy(swin, PrecisionPlan.exact())(x), forward_float64(swin, x)) > 1e-3
