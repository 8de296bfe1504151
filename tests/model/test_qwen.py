"""The deployed form of Qwen's towers computes what the reference computes, and planted faults are seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.qwens import CONFIGS, QWEN2_5, SMALL
from vitdeploy.checkpoint.opening import random_state
from vitdeploy.config import InputKind, Preprocess, QwenVisionConfig, model_fields, model_type
from vitdeploy.errors import ConfigError
from vitdeploy.model import qwen_deployed, qwen_grid
from vitdeploy.model.deployed import DeployedModel, Linear, RmsNorm
from vitdeploy.model.precision import PrecisionPlan, island_names, sites
from vitdeploy.model.qwen import QwenVision, patches_of
from vitdeploy.model.reference import outputs_float64, state_of
from vitdeploy.model.registry import architecture_of, build_reference, parameter_count

EXACT = 1e-12


def random_tower(config: QwenVisionConfig) -> QwenVision:
    state = random_state(config, seed=5)
    lively = {n: t if n.endswith("norm.weight") else 6 * t for n, t in state.items() if "norm" not in n}
    result = build_reference(config, {**state, **lively})
    assert isinstance(result, QwenVision)
    return result


def spec_of(config: QwenVisionConfig) -> Preprocess:
    means, deviations = (0.4, 0.5, 0.6)[: config.channels], (0.2, 0.25, 0.3)[: config.channels]
    return Preprocess(size=config.image_size, mean=means, std=deviations)


def inputs_of(config: QwenVisionConfig) -> dict[InputKind, Tensor]:
    """The same images, as each kind of input has them."""
    generator, spec = torch.Generator().manual_seed(2), spec_of(config)
    raw = torch.randint(
        0, 256, (3, *config.image_size, config.channels), dtype=torch.uint8, generator=generator
    )
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (spec.mean, spec.std))
    pixels = ((raw.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    return {"float": pixels, "uint8": raw, "patches": patches_of(pixels, config)}


def deployed(
    tower: QwenVision, outputs: tuple[str, ...], kind: InputKind = "float", precision: Any = None
) -> DeployedModel:
    plan = PrecisionPlan.exact() if precision is None else PrecisionPlan.of(precision)
    return architecture_of(tower.config).deploy(
        tower, plan, outputs=outputs, input_kind=kind, preprocess=spec_of(tower.config)
    )


def worst(tower: QwenVision, kind: InputKind = "float", outputs: tuple[str, ...] | None = None) -> float:
    """How far the deployed form is from the reference."""
    names = outputs or tower.config.outputs
    inputs = inputs_of(tower.config)
    expected = outputs_float64(tower, inputs["float"], names)
    found = deployed(tower, names, kind)(inputs[kind])
    tensors = found if isinstance(found, tuple) else (found,)
    return max(float((tensors[i] - expected[name]).abs().max()) for i, name in enumerate(names))


@pytest.mark.parametrize("kind", ["float", "uint8", "patches"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_whole_deployed_tower_is_exact(name: str, kind: InputKind) -> None:
    tower = random_tower(CONFIGS[name])
    with torch.inference_mode():
        assert worst(tower, kind) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "all"])
def test_deepstack_features_alone_need_no_later_block(name: str) -> None:
    tower = random_tower(CONFIGS[name])
    with torch.inference_mode():
        assert worst(tower, outputs=("deepstack_features",)) < EXACT
        assert worst(tower, outputs=("deepstack_features", "image_features")) < EXACT
    assert len(deployed(tower, ("deepstack_features",)).blocks) == 2
    assert not any(name.startswith("deepstack") for name, _ in sites(deployed(tower, ("image_features",))))


@pytest.mark.slow
def test_patches_whose_frames_differ_go_through_the_whole_kernel() -> None:
    tower = random_tower(CONFIGS["qwen2_5"])
    x = torch.randn(2, *tower.config.inputs["patches"], dtype=torch.float64)
    expected = outputs_float64(tower, x, ("image_features",))["image_features"]
    with torch.inference_mode():
        assert (deployed(tower, ("image_features",), "patches")(x) - expected).abs().max() < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "all"])
def test_another_size_shares_its_layers_with_the_first(name: str) -> None:
    tower = random_tower(CONFIGS[name])
    larger = build_reference(tower.config.at_size((48, 72)), state_of(tower))
    assert isinstance(larger, QwenVision)
    first = deployed(tower, tower.config.outputs)
    again = architecture_of(tower.config).redeploy(
        larger,
        first,
        PrecisionPlan.exact(),
        outputs=tower.config.outputs,
        input_kind="float",
        preprocess=spec_of(tower.config),
    )
    pixels = torch.randn(2, tower.config.channels, 48, 72, dtype=torch.float64)
    expected = outputs_float64(larger, pixels, tower.config.outputs)
    with torch.inference_mode():
        found = again(pixels)
        assert worst(tower) < EXACT
    tensors = found if isinstance(found, tuple) else (found,)
    for output, tensor in zip(tower.config.outputs, tensors, strict=True):
        assert (tensor - expected[output]).abs().max() < EXACT
    pairs = zip(first.blocks, again.blocks, strict=True)
    assert all(one.mlp.fc1.weight.data_ptr() == other.mlp.fc1.weight.data_ptr() for one, other in pairs)


def test_windows_are_few_groups_and_no_mask() -> None:
    config = CONFIGS["qwen2_5"]
    groups = qwen_grid.grouped(config)
    assert groups is not None
    assert groups.sizes == ((6, 64), (5, 32), (1, 16))
    assert sorted(groups.blocks.tolist()) == list(range(config.feature_rows))
    assert qwen_grid.grouped(CONFIGS["one_window"]) is None
    assert qwen_grid.grouped(CONFIGS["qwen3"]) is None


def test_still_images_need_half_the_columns() -> None:
    tower = random_tower(CONFIGS["qwen2"])
    for kind, columns in (("float", 48), ("uint8", 48), ("patches", 96)):
        embedding: Any = deployed(tower, ("image_features",), kind).embedding  # type: ignore[arg-type]
        assert embedding.patch_embed.weight.shape[0] == columns


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_norms_are_islands_without_weights(precision: str) -> None:
    tower = random_tower(CONFIGS["qwen2_5"])
    model = deployed(tower, ("image_features",), precision=precision)
    norms = {"merger.norm", *(f"blocks.{i}.norm{k}" for i in range(3) for k in (1, 2))}
    islands = set(island_names(model, PrecisionPlan.of(precision)))  # type: ignore[arg-type]
    assert islands == (set() if precision == "fp32" else norms)
    assert all(isinstance(site, RmsNorm) for name, site in sites(model) if name in norms)
    with torch.inference_mode():
        assert model(inputs_of(tower.config)["float"].float()).dtype == torch.float32


def test_flops_and_rewrites() -> None:
    config = QwenVisionConfig(**{**QWEN2_5, "image_size": (448, 448), "mlp_width": 3420, "out_width": 2048})
    windows = replace(config, window=112, full_attention=(7, 15, 23, 31))
    architecture = architecture_of(config)
    t, d = 1024, 1280
    dense = 2 * t * d * (1176 + 32 * (4 * d + 3 * 3420)) + 2 * 256 * 5120 * (5120 + 2048)
    assert architecture.forward_flops(config) == dense + 32 * 4 * t * t * d
    assert architecture.forward_flops(windows) == dense + 4 * d * (4 * t * t + 28 * 16 * 64 * 64)
    rewrites = {
        rewrite.name: rewrite
        for rewrite in architecture.applied_rewrites(windows, ("image_features",), "uint8")
    }
    assert rewrites.keys() == {
        *("patches_to_gemm", "sum_temporal_kernel", "group_windows", "fold_attention_scale"),
        *("move_value_bias", "fold_rms_weights", "fix_rotation", "fold_normalisation"),
    }
    assert rewrites["sum_temporal_kernel"].flops_saved == 2 * t * d * 588
    assert rewrites["group_windows"].detail == "windows of 28 blocks without a mask: 16 of 64 patches"
    patches = architecture.applied_rewrites(CONFIGS["qwen3"], ("deepstack_features",), "patches")
    assert {"sum_temporal_kernel", "group_windows", "fold_normalisation"}.isdisjoint(r.name for r in patches)


# --- planted faults ---------------------------------------------------------------------------------------


def _other_group_order(config: QwenVisionConfig) -> qwen_grid.Groups | None:
    groups = qwen_grid.grouped(config)
    assert groups is not None
    return replace(groups, blocks=groups.blocks.roll(4))


def _columns_first(config: QwenVisionConfig) -> tuple[Tensor, Tensor]:
    """The columns' angles where the rows' belong."""
    turned = [table.reshape(config.patches, 2, 2, -1).flip(2) for table in qwen_grid.rotation(config)]
    return turned[0].flatten(1), turned[1].flatten(1)


def _of_another_grid(of: Callable[..., Any]) -> Callable[..., Any]:
    """As many patches, in another grid."""

    def wrong(*args: Any) -> Any:
        *before, config = args
        return of(*before, config.at_size(config.image_size[::-1]))

    return wrong


FAULTS: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "groups permuted": ("qwen2_5", "grouped", _other_group_order),
    "rotation pairs swapped": ("qwen2_5", "rotation", _columns_first),
    "rotation of another grid": ("qwen2_5", "rotation", _of_another_grid(qwen_grid.rotation)),
    "windows of another grid": ("qwen2_5", "grouped", _of_another_grid(qwen_grid.grouped)),
    "positions of another grid": ("qwen3", "interpolated", _of_another_grid(qwen_grid.interpolated)),
    "patches of another grid": ("qwen3", "patch_order", _of_another_grid(qwen_grid.patch_order)),
    "patches row by row": ("qwen2", "patch_order", lambda config: torch.arange(config.patches)),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, function, wrong = FAULTS[fault]
    tower = random_tower(CONFIGS[name])
    with torch.inference_mode():
        assert worst(tower) < EXACT
        monkeypatch.setattr(qwen_deployed, function, wrong)
        assert worst(tower) > 1e-3


def test_a_key_bias_that_is_dropped_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a rotation it does not cancel."""
    tower = random_tower(CONFIGS["qwen2"])
    grouped = qwen_deployed.group_windows

    def without(projections: Sequence[Linear], *args: Any, **kwargs: Any) -> nn.Module:
        projections[1].bias = None
        return grouped(projections, *args, **kwargs)

    monkeypatch.setattr(qwen_deployed, "group_windows", without)
    with torch.inference_mode():
        assert worst(tower) > 1e-3


# --- the configuration ------------------------------------------------------------------------------------


def test_it_travels_in_a_manifest() -> None:
    for config in CONFIGS.values():
        fields = model_fields(config)
        assert fields["kind"] == "qwen_vl"
        kind, rest = model_type(fields)
        assert kind(**rest) == config
        assert config.depth == 3


def test_the_published_towers_have_their_parameters() -> None:
    """Counted by hand: Qwen2.5-VL-7B's tower is 676.55 M (its paper's table 1 calls it 675 M)."""
    config = QwenVisionConfig(**QWEN2_5, mlp_width=3420, window=112, full_attention=(7, 15, 23, 31))
    d = 1280
    block = 2 * d + 4 * d * d + 4 * d + 3 * d * 3420 + 2 * 3420 + d
    merger = d + 5120 * 5120 + 5120 + 5120 * 3584 + 3584
    assert parameter_count(config) == 1176 * d + 32 * block + merger == 676_550_144


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_size": (24, 44)}, "24x44 is not divisible by 8, 2 patches of 4"),
        ({"heads": 3}, "does not make 3 heads of 4n columns"),
        ({"width": 36}, "does not make 2 heads of 4n columns"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"window": 4}, "windows of 4 pixels"),
        ({"full_attention": (1,)}, "go with windows"),
        ({"taps": (2, 1)}, r"taps \[2, 1\] must be rising numbers of blocks"),
        ({"taps": (3,)}, "of which there are 3"),
        ({"rotary_base": 1.0}, "a rotation by base"),
    ],
)
def test_numbers_that_make_no_tower(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QwenVisionConfig(**{**SMALL, **change})
