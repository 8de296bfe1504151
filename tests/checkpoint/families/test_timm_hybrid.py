"""timm's hybrids against what timm itself computed (recorded)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from torch import Tensor

from tests.checkpoint.families.conftest import EXACT
from tests.helpers.checkpoints import edit_weights
from tests.helpers.paths import ORACLES
from vitdeploy.checkpoint.families import timm_hybrid
from vitdeploy.checkpoint.families.base import Foreign
from vitdeploy.checkpoint.families.timm_hybrid import FAMILY
from vitdeploy.checkpoint.opening import Checkpoint, open_model
from vitdeploy.config import Stem, ViTConfig
from vitdeploy.errors import CheckpointError, ConfigError
from vitdeploy.images.preprocess import apply
from vitdeploy.model import stem
from vitdeploy.model.reference import outputs_float64
from vitdeploy.model.registry import build_reference

RECORDED = ORACLES / "timm_hybrid"
STAGES = {"r26": (2, 1, 1, 1), "r50": (1, 2, 3), "root": (), "features": (1, 1)}
ARCHITECTURES: dict[str, dict[str, Any]] = json.loads((RECORDED / "architectures.json").read_text())


@pytest.fixture(autouse=True)
def _fewer_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded channels are too few for timm's 32 groups, which ``architectures.json`` proves."""
    monkeypatch.setattr(timm_hybrid, "STEM", replace(timm_hybrid.STEM, groups=2))


def load(folder: Path, **keywords: Any) -> Checkpoint:
    opened = open_model(str(folder), **keywords)
    assert isinstance(opened, Checkpoint)
    assert opened.family == "timm_hybrid"
    return opened


def config_of(opened: Checkpoint) -> ViTConfig:
    assert isinstance(opened.config, ViTConfig)
    return opened.config


def answer_of(case: str, prefix: str) -> dict[str, Tensor]:
    answer = load_file(RECORDED / case / "answer.safetensors")
    names = [f"{prefix}{name}" for name in ("pixels", "logits", "features", "tokens")]
    return {name.removeprefix(prefix): answer[name] for name in names if name in answer}


def farthest(case: str, prefix: str = "") -> dict[str, float]:
    """How far each output is from timm's."""
    answer = answer_of(case, prefix)
    pixels = answer.pop("pixels")
    size = {"image_size": tuple(pixels.shape[2:])} if prefix else {}
    opened = load(RECORDED / case, **size)
    found = outputs_float64(build_reference(opened.config, opened.state), pixels, tuple(answer))
    for name, expected in answer.items():
        assert found[name].shape == expected.shape == (2, *(opened.config.output_shape(name) or ()))
        # Nothing is proven by outputs that do not depend on the image.
        assert (expected[0] - expected[1]).abs().max() > 1e-2
    return {name: float((found[name] - expected).abs().max()) for name, expected in answer.items()}


@pytest.mark.parametrize("case", STAGES)
def test_outputs_equal_timm(case: str) -> None:
    distances = farthest(case)
    assert set(distances) == {"features", "tokens", *(() if case == "features" else ("logits",))}
    assert max(distances.values()) <= EXACT


@pytest.mark.parametrize("case", STAGES)
def test_outputs_at_another_size_equal_timm(case: str) -> None:
    # The table is resampled in float32, where builds of torch may differ in the last bit.
    assert max(farthest(case, "other.").values()) <= 2e-6


@pytest.mark.slow
def test_what_a_file_tells_of_its_stem() -> None:
    for case, stages in STAGES.items():
        config = config_of(load(RECORDED / case))
        assert config.stem == Stem(stages, width=8, groups=2)
        assert config.depth == 2
        assert config.channels == 3
    r26, r50, root = (config_of(load(RECORDED / case)) for case in ("r26", "r50", "root"))
    assert (r26.image_size, r26.step, r26.grid, r26.patch_channels) == ((64, 64), 32, (2, 2), 256)
    assert (r50.image_size, r50.step, r50.grid, r50.patch_channels) == ((32, 48), 16, (2, 3), 128)
    assert (root.image_size, root.step, root.grid, root.patch_channels) == ((64, 64), 32, (2, 2), 8)
    assert r50.final_norm == "pooled"


@pytest.mark.parametrize("case", ["r26", "root", "features"])
def test_bare_weights_tell_all_but_heads(case: str, tmp_path: Path) -> None:
    whole = config_of(load(RECORDED / case))
    shutil.copy(RECORDED / case / "model.safetensors", tmp_path / "weights.safetensors")
    bare = open_model(checkpoint=tmp_path / "weights.safetensors")
    assert isinstance(bare, Checkpoint)
    assert bare.config == replace(whole, heads=1)
    assert any("heads" in note for note in bare.notes)


@pytest.mark.slow
def test_a_photograph_has_the_scores_of_timms_transform_and_model() -> None:
    image = Image.fromarray(load_sample_images().images[0])
    for case in STAGES:
        opened = load(RECORDED / case)
        model = build_reference(opened.config, opened.state)
        pixels = torch.from_numpy(apply(image, opened.preprocess)[None])
        output = opened.config.outputs[0]
        theirs = load_file(RECORDED / case / "answer.safetensors")["photograph"].double()
        ours = outputs_float64(model, pixels, (output,))[output][0]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


# Planted faults: each is far from what timm computes.


def unbiased(self: stem.StandardisedConv) -> Tensor:
    filters = self.weight.flatten(1)
    deviation = (filters.var(dim=1, keepdim=True) + self.config.weight_eps).sqrt()
    return ((filters - filters.mean(dim=1, keepdim=True)) / deviation).reshape(self.weight.shape)


@pytest.mark.parametrize("case", ["r26", "r50"])
def test_the_other_variance_is_seen(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GroupNorm follows, which takes away what all filters have in common but for its epsilon."""
    monkeypatch.setattr(stem.StandardisedConv, "standardised", unbiased)
    assert farthest(case)["tokens"] > 1000 * EXACT


@pytest.mark.parametrize("case", ["r26", "r50", "root"])
def test_padding_in_front_is_seen(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = stem.same_padding
    monkeypatch.setattr(stem, "same_padding", lambda kernel, stride: rule(kernel, stride)[::-1])
    assert farthest(case)["tokens"] > 1e-2


@pytest.mark.parametrize("case", ["r26", "r50"])
def test_symmetric_padding_is_seen(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stem, "same_padding", lambda kernel, _: (kernel // 2, kernel // 2))
    assert farthest(case)["tokens"] > 1e-2


def test_blocks_in_another_order_are_seen(tmp_path: Path) -> None:
    def exchange(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if ".stages.2.blocks.1." in name]:
            other = name.replace("blocks.1.", "blocks.2.")
            state[name], state[other] = state[other], state[name]

    folder = copy("r50", tmp_path)
    edit_weights(folder, exchange)
    answer, opened = answer_of("r50", ""), load(folder)
    found = outputs_float64(build_reference(opened.config, opened.state), answer["pixels"], ("tokens",))
    assert (found["tokens"] - answer["tokens"]).abs().max() > 1e-2


@pytest.mark.parametrize("case", ["r26", "r50"])
def test_stages_in_another_order_are_seen(case: str, tmp_path: Path) -> None:
    def exchange(state: dict[str, Tensor]) -> None:
        names = [name for name in state if ".stages.0." in name or ".stages.1." in name]
        moved = {name: state.pop(name) for name in names}
        turn = {"stages.0.": "stages.1.", "stages.1.": "stages.0."}
        for name, tensor in moved.items():
            old = next(stage for stage in turn if stage in name)
            state[name.replace(old, turn[old])] = tensor

    folder = copy(case, tmp_path)
    edit_weights(folder, exchange)
    with pytest.raises(CheckpointError, match=r"of the wrong shape"):
        load(folder)


@pytest.mark.parametrize("field, value", [("norm_eps", 1e-6), ("weight_eps_on", "deviation"), ("groups", 4)])
def test_other_settings_of_the_stem_are_seen(
    field: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed: Any = {field: value}
    monkeypatch.setattr(timm_hybrid, "STEM", replace(timm_hybrid.STEM, **changed))
    assert farthest("r50")["tokens"] > 1e-8


# What else there is.


def copy(case: str, tmp_path: Path, arguments: dict[str, Any] | None = None, **config: Any) -> Path:
    folder = tmp_path / case
    shutil.copytree(RECORDED / case, folder)
    content = json.loads((folder / "config.json").read_text()) | config
    content["model_args"] |= arguments or {}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "arguments, architecture, message",
    [
        ({"padding_same": False}, None, "padding_same False"),
        ({"norm_layer": "rmsnorm"}, None, "norm_layer 'rmsnorm'"),
        ({}, "vit_small_resnet26d_224", r"resnet26d_224 \(another ResNet before the blocks\)"),
        ({}, "vit_base_mci_224", r"vit_base_mci_224 \(convolutions before the blocks\)"),
        ({}, "vit_base_patch16_224", "architecture vit_base_patch16_224"),
    ],
)
def test_what_else_the_names_can_mean_is_refused(
    tmp_path: Path, arguments: dict[str, Any], architecture: str | None, message: str
) -> None:
    named = {} if architecture is None else {"architecture": architecture}
    with pytest.raises(CheckpointError, match=message):
        load(copy("r26", tmp_path, arguments, **named))


def test_a_size_that_timm_would_pad_is_refused(tmp_path: Path) -> None:
    """timm's map of 60 pixels is rounded up to two cells, as of 64."""
    sizes = {"pretrained_cfg": {"input_size": [3, 60, 60]}}
    folder = copy("r26", tmp_path, {"img_size": [60, 60]}, **sizes)
    with pytest.raises(
        CheckpointError, match=r"60x60 pixels, which the ResNet's stride .* 32, does"
    ) as caught:
        load(folder)
    assert caught.value.hint is not None
    assert "--image-size 64x64" in caught.value.hint
    assert load(folder, image_size=(64, 64)).config.image_size == (64, 64)
    with pytest.raises(ConfigError, match="stride times the patch size, 32") as other:
        load(RECORDED / "r26", image_size=(60, 70))
    assert other.value.hint == "nearest that is: 64x64"


@pytest.mark.parametrize(
    "name, message",
    [
        ("stages.1.blocks.0.conv3.weight", "1 missing .*stages.1.blocks.0.conv3.weight"),
        ("stages.0.blocks.0.downsample.conv.weight", "1 missing .*downsample.conv.weight"),
        ("stem.conv.weight", "."),
    ],
)
def test_a_stem_with_holes_is_refused(tmp_path: Path, name: str, message: str) -> None:
    folder = copy("r26", tmp_path)
    edit_weights(folder, lambda state: state.pop(f"patch_embed.backbone.{name}"))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize(
    "name", ["stages.7.blocks.0.conv1.weight", "stages.1.blocks.99999999999.conv1.weight"]
)
def test_numbers_out_of_all_proportion_are_refused(tmp_path: Path, name: str) -> None:
    folder = copy("r26", tmp_path)
    edit_weights(folder, lambda state: state.update({f"patch_embed.backbone.{name}": torch.ones(1)}))
    with pytest.raises(CheckpointError):
        load(folder)


def test_a_resnet_with_batch_normalisation_is_called_what_it_is(tmp_path: Path) -> None:
    folder = copy("r26", tmp_path)
    edit_weights(
        folder,
        lambda state: state.update({"patch_embed.backbone.bn1.running_mean": torch.ones(8)}),
    )
    with pytest.raises(CheckpointError, match=r"1 unexpected .*a hybrid, with another ResNet"):
        load(folder)


def named(name: str, facts: dict[str, Any]) -> Foreign:
    """A model without values, of this architecture."""
    width, stem_width, stages = facts["width"], facts["stem_width"], facts["stages"]
    below = "patch_embed.backbone." + ("stem." if stages else "")
    out = stem_width * 4 * 2 ** (len(stages) - 1) if stages else stem_width
    state = {
        f"{below}conv.weight": torch.empty(stem_width, 3, 7, 7, device="meta"),
        "patch_embed.proj.weight": torch.empty(width, out, *2 * [facts["patch_size"]], device="meta"),
        "pos_embed": torch.empty(1, facts["grid"][0] * facts["grid"][1] + 1, width, device="meta"),
        "cls_token": torch.empty(1, 1, width, device="meta"),
        "blocks.0.attn.qkv.weight": torch.empty(3 * width, width, device="meta"),
        "blocks.0.mlp.fc1.weight": torch.empty(64, width, device="meta"),
        "blocks.0.mlp.fc2.weight": torch.empty(width, 64, device="meta"),
    }
    for i, blocks in enumerate(stages):
        for j in range(blocks):
            key = f"patch_embed.backbone.stages.{i}.blocks.{j}.conv1.weight"
            state[key] = torch.empty(1, 1, 1, 1, device="meta")
    return Foreign(name, state, {"architecture": name})


def test_every_hybrid_of_timm_is_known_with_what_no_tensor_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert len(ARCHITECTURES) == 9
    for name, facts in ARCHITECTURES.items():
        foreign = named(name, facts)
        assert FAMILY.claims(foreign), name
        config = FAMILY.read(foreign, None).config
        assert isinstance(config, ViTConfig)
        found = config.stem
        assert found is not None
        assert (name, list(found.stages)) == (name, facts["stages"])
        assert (found.groups, found.norm_eps, found.weight_eps) == (
            32,
            facts["group_eps"],
            facts["weight_eps"],
        )
        assert facts["groups"] == 32
        assert (config.heads, config.norm_eps, config.activation) == (
            facts["heads"],
            facts["norm_eps"],
            "gelu",
        )
        assert (list(config.image_size), list(config.grid)) == (facts["image_size"], facts["grid"])


@pytest.mark.slow
def test_names_that_timm_gave_up(tmp_path: Path) -> None:
    for name in ("vit_base_resnet50_384", "vit_base_resnet50_224_in21k", "vit_small_r26_s32_224_in21k"):
        load(copy("r26", tmp_path / name, architecture=name))


def test_weights_as_transformers_wraps_them(tmp_path: Path) -> None:
    kinds = {"model_type": "timm_wrapper", "architectures": ["TimmWrapperForImageClassification"]}
    folder = copy("root", tmp_path, **kinds)
    state = load_file(folder / "model.safetensors")
    save_file({f"timm_model.{name}": tensor for name, tensor in state.items()}, folder / "model.safetensors")
    opened, plain = load(folder), load(RECORDED / "root")
    assert opened.config == plain.config
    assert all(torch.equal(opened.state[name], tensor) for name, tensor in plain.state.items())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["r26", "root"])
def test_exports_pass(case: str, exported: Callable[[Path, Tensor], Tensor]) -> None:
    answer = answer_of(case, "")
    given = exported(RECORDED / case, answer["pixels"])
    torch.testing.assert_close(given.double(), answer["logits"], rtol=0, atol=1e-4)
