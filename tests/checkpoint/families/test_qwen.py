"""Qwen's vision towers against transformers: alone, and out of the whole model, whose rest is not read."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import qwen_models
from vitdeploy.checkpoint.opening import Checkpoint, open_model
from vitdeploy.config import QwenVisionConfig
from vitdeploy.errors import CheckpointError, ConfigError
from vitdeploy.images.preprocess import apply
from vitdeploy.model.qwen import patches_of
from vitdeploy.model.reference import outputs_float64, outputs_of
from vitdeploy.model.registry import build_reference

EXACT = 1e-10
GRIDS = [(8, 8), (20, 28), (6, 10)]
"""Whole windows of 8 patches, windows of three more sizes, and windows cut at two sides."""


def opened(folder: Path, grid: tuple[int, int] | None = None, **options: Any) -> Checkpoint:
    size = None if grid is None else (grid[0] * qwen_models.PATCH, grid[1] * qwen_models.PATCH)
    result = open_model(str(folder), image_size=size, **options)
    assert isinstance(result, Checkpoint)
    return result


def check_equal(model: Any, checkpoint: Checkpoint) -> None:
    """Images and their patches give what the tower gives, in float64."""
    config = checkpoint.config
    assert isinstance(config, QwenVisionConfig)
    pixels = torch.randn(2, 3, *config.image_size, generator=torch.Generator().manual_seed(3))
    expected = qwen_models.answers(model, qwen_models.patches(pixels), config.grid)
    assert tuple(expected) == config.outputs
    reference = build_reference(config, checkpoint.state)
    for inputs in (pixels, qwen_models.patches(pixels)):
        found = outputs_float64(reference, inputs, config.outputs)
        for name, answer in expected.items():
            assert found[name].shape == answer.shape == (2, *config.output_shapes[name])
            assert (found[name] - answer).abs().max() <= EXACT, name
            # Nothing is proven by outputs that do not depend on the image.
            assert (answer[0] - answer[1]).abs().max() > 1e-2, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", qwen_models.TOWERS)
def test_the_tower_equals_transformers_at_three_grids(kind: str, tmp_path: Path) -> None:
    model = qwen_models.tower(kind)
    folder = qwen_models.save(model, tmp_path / kind)
    for grid in GRIDS:
        check_equal(model, opened(folder, grid))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"window_size": 16}, {"fullatt_block_indexes": [0, 1, 2]}, {"spatial_merge_size": 1, "window_size": 24}],
)
def test_other_windows_and_merges(changes: dict[str, Any], tmp_path: Path) -> None:
    model = qwen_models.tower("qwen2_5_vl", **changes)
    folder = qwen_models.save(model, tmp_path / "saved")
    checkpoint = opened(folder, (10, 14))
    assert isinstance(checkpoint.config, QwenVisionConfig)
    if checkpoint.config.merge == 2:
        check_equal(model, checkpoint)
        return
    pixels = torch.randn(1, 3, 40, 56)
    own = qwen_models.processor()
    patches = torch.from_numpy(own.patchify(pixels[0].numpy(), 4, 1, 2)[0])[None]
    assert torch.equal(patches_of(pixels, checkpoint.config), patches)
    expected = qwen_models.answers(model, patches, (10, 14))["image_features"]
    reference = build_reference(checkpoint.config, checkpoint.state)
    found = outputs_float64(reference, pixels, ("image_features",))["image_features"]
    assert (found - expected).abs().max() <= EXACT


@pytest.mark.slow
def test_fused_attention_is_the_same_function(tmp_path: Path) -> None:
    folder = qwen_models.save(qwen_models.tower("qwen2_5_vl"), tmp_path / "saved")
    checkpoint = opened(folder, (20, 28))
    pixels = torch.randn(2, 3, 80, 112)
    fused = build_reference(checkpoint.config, checkpoint.state, fused_attention=True)
    plain = build_reference(checkpoint.config, checkpoint.state)
    outputs = [outputs_of(model, pixels, ("image_features",))["image_features"] for model in (fused, plain)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-4)


# --- the whole model --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_tower_out_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    model = qwen_models.whole(kind)
    checkpoint = opened(qwen_models.save(model, tmp_path / kind), (6, 10))
    check_equal(model.model.visual, checkpoint)
    assert any("others left out" in note for note in checkpoint.notes)
    assert any("smart_resize" in note for note in checkpoint.notes)


def sharded(folder: Path) -> tuple[Any, set[str], set[str]]:
    """A whole model in shards, and the names of those with and without tensors of the tower."""
    model = qwen_models.whole("qwen2_5_vl")
    qwen_models.save(model, folder, max_shard_size="30KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    every = set(index["weight_map"].values())
    needed = {file for name, file in index["weight_map"].items() if "visual." in name}
    assert needed
    assert every - needed
    return model, needed, every - needed


@pytest.mark.slow
def test_shards_without_the_tower_are_never_opened(tmp_path: Path) -> None:
    model, needed, others = sharded(tmp_path / "whole")
    first, *rest = sorted(others)
    (tmp_path / "whole" / first).write_bytes(b"garbage")
    for name in rest:
        (tmp_path / "whole" / name).unlink()
    checkpoint = opened(tmp_path / "whole", (6, 10))
    check_equal(model.model.visual, checkpoint)
    assert needed <= checkpoint.provenance.keys()
    assert others.isdisjoint(checkpoint.provenance)
    assert f"{len(others)} of {len(needed | others)} shards are not needed" in checkpoint.notes
    (tmp_path / "whole" / min(needed)).unlink()
    with pytest.raises(CheckpointError, match=f"shard {min(needed)} is missing"):
        opened(tmp_path / "whole", (6, 10))


def test_shards_without_the_tower_are_not_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "whole"
    _, needed, others = sharded(folder)
    asked: set[str] = set()

    def snapshot_download(name: str, *, allow_patterns: list[str], **options: Any) -> str:
        assert not any("*" in pattern for pattern in allow_patterns)
        asked.update(allow_patterns)
        return str(folder)

    hub = types.ModuleType("huggingface_hub")
    hub.__dict__["snapshot_download"] = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    for name in others:
        (folder / name).unlink()
    assert isinstance(open_model("owner/name", image_size=(24, 40)), Checkpoint)
    assert needed <= asked
    assert others.isdisjoint(asked)


# --- configuration and preprocessing ----------------------------------------------------------------------


def test_published_configurations() -> None:
    """The ``vision_config`` of Qwen2-VL-7B, Qwen2.5-VL-3B and Qwen3-VL-4B as their config.json have it."""
    from vitdeploy.checkpoint.families.base import Foreign
    from vitdeploy.checkpoint.families.qwen import FAMILY

    old = {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 3584,
    }
    middle = {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    }
    new = {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "out_hidden_size": 2560,
        "deepstack_visual_indexes": [5, 11, 17],
        "num_position_embeddings": 2304,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "num_heads": 16,
        "in_channels": 3,
    }

    def read(kind: str, vision: dict[str, Any]) -> QwenVisionConfig:
        foreign = Foreign("x", {}, {"model_type": kind, "vision_config": vision})
        assert FAMILY.claims(foreign)
        config = FAMILY.read(foreign, None).config
        assert isinstance(config, QwenVisionConfig)
        return config

    assert read("qwen2_vl", old) == QwenVisionConfig()
    assert read("qwen2_5_vl", middle) == QwenVisionConfig(
        mlp_width=3420,
        activation="silu",
        gated_mlp=True,
        norm="rms",
        window=112,
        full_attention=(7, 15, 23, 31),
        out_width=2048,
    )
    assert read("qwen3_vl", new) == QwenVisionConfig(
        patch_size=16,
        width=1024,
        depth=24,
        mlp_width=4096,
        activation="gelu_tanh",
        patch_bias=True,
        positions=48,
        taps=(5, 11, 17),
        out_width=2560,
    )


def test_preprocessing_is_the_processors_but_for_the_size(tmp_path: Path) -> None:
    """At a size that smart_resize leaves alone, images become the processor's patches."""
    folder = qwen_models.save(qwen_models.tower("qwen2_5_vl"), tmp_path / "saved")
    checkpoint = opened(folder, (10, 14))
    assert checkpoint.facts["preprocess"] == "checkpoint"
    picture = qwen_models.photograph((40, 56))
    seen = qwen_models.processor()(picture, return_tensors="np")
    assert seen["image_grid_thw"].tolist() == [list(checkpoint.config.grid_thw or ())]
    pixels = apply(picture, checkpoint.preprocess)
    assert isinstance(checkpoint.config, QwenVisionConfig)
    ours = patches_of(torch.from_numpy(pixels)[None], checkpoint.config)[0].numpy()
    np.testing.assert_allclose(ours, seen["pixel_values"], rtol=0, atol=2e-6)
    # Another picture is resized to the size of the model, bicubically as the processor does, not by its rule.
    other = qwen_models.photograph((90, 50))
    exact = np.asarray(other.resize((56, 40), 3), np.float64) / 255
    mean, std = np.array(checkpoint.preprocess.mean), np.array(checkpoint.preprocess.std)
    np.testing.assert_allclose(
        apply(other, checkpoint.preprocess), ((exact - mean) / std).transpose(2, 0, 1), rtol=0, atol=1e-5
    )


@pytest.mark.slow
def test_without_a_processor_the_published_settings_hold(tmp_path: Path) -> None:
    for kind, mean in (("qwen2_vl", 0.48145466), ("qwen3_vl", 0.5)):
        folder = tmp_path / kind
        qwen_models.tower(kind).save_pretrained(folder)
        checkpoint = opened(folder, (6, 10))
        assert checkpoint.preprocess.mean[0] == mean
        assert checkpoint.preprocess.resample == "bicubic"
        assert checkpoint.facts["preprocess"] == "default"
        assert checkpoint.config.image_size == checkpoint.preprocess.size == (24, 40)


def test_the_whole_config_beside_a_tower_of_version_4(tmp_path: Path) -> None:
    """There the tower's own model type was that of the whole."""
    folder = qwen_models.save(qwen_models.tower("qwen2_5_vl"), tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_5_vl"}))
    assert opened(folder, (6, 10)).config.depth == 3


# --- refusals ---------------------------------------------------------------------------------------------


def test_sizes_that_blocks_do_not_divide(tmp_path: Path) -> None:
    folder = qwen_models.save(qwen_models.tower("qwen2_vl"), tmp_path / "saved")
    with pytest.raises(ConfigError, match="32x36 is not divisible by 8, 2 patches of 4") as error:
        opened(folder, (8, 9))
    assert error.value.hint == "nearest that is: 32x32"
    assert opened(folder, (8, 10)).config.grid_thw == (1, 8, 10)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fullatt_block_indexes": [5]}, "full_attention"),
        ({"fullatt_block_indexes": "all"}, "must be numbers of blocks"),
        ({"window_size": 4}, "windows of 4 pixels"),
        ({"num_heads": 7}, "heads"),
        ({"patch_size": [4, 4]}, "patch_size must be a whole number"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported"),
        ({"model_type": "qwen2_5_omni"}, "'qwen2_5_omni' in config.json has no vision tower"),
    ],
)
def test_configurations_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = qwen_models.save(qwen_models.tower("qwen2_5_vl"), tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message) as error:
        opened(folder, (6, 10))
    assert "\n" not in error.value.message
    assert len(f"{error.value.message}{error.value.hint}") <= 400


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_a_tower_without_its_configuration_is_called_that(kind: str, tmp_path: Path) -> None:
    folder = qwen_models.save(qwen_models.tower(kind), tmp_path / "saved")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="beside the weights of this vision tower of Qwen"):
        open_model(str(folder / "model.safetensors"))


def test_a_tower_that_lacks_a_tensor_names_it_as_the_file_would(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = qwen_models.save(qwen_models.tower("qwen3_vl"), tmp_path / "saved")
    state = load_file(folder / "model.safetensors")
    del state["deepstack_merger_list.1.norm.weight"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"deepstack_merger_list\.1\.norm\.weight"):
        opened(folder, (6, 10))
