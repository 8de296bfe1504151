"""timm's BEiT against what timm itself computed (recorded), and the authors' files, which have its names."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.paths import ORACLES
from vitdeploy.checkpoint.families.base import Foreign
from vitdeploy.checkpoint.families.positions import PositionRule
from vitdeploy.checkpoint.families.timm_beit import FAMILY
from vitdeploy.checkpoint.opening import Checkpoint, open_model
from vitdeploy.errors import CheckpointError
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.registry import build_reference

RECORDED = ORACLES / "timm_beit"
CASES = sorted(folder.name for folder in RECORDED.iterdir() if folder.is_dir())


def load(folder: Path, **keywords: Any) -> Checkpoint:
    opened = open_model(str(folder), **keywords)
    assert isinstance(opened, Checkpoint)
    assert opened.family == "timm_beit"
    return opened


def run(opened: Checkpoint, pixels: Tensor, output: str = "logits") -> Tensor:
    return forward_float64(build_reference(opened.config, opened.state), pixels, output)


def copy(case: str, tmp_path: Path, **config: Any) -> Path:
    folder = tmp_path / case
    shutil.copytree(RECORDED / case, folder)
    content = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_output_equals_timm(case: str) -> None:
    answer = load_file(RECORDED / case / "answer.safetensors")
    opened = load(RECORDED / case)
    torch.testing.assert_close(run(opened, answer["pixels"]), answer["output"], rtol=0, atol=1e-10)
    assert (answer["output"][0] - answer["output"][1]).abs().max() > 1e-2
    assert opened.config.score_bias


@pytest.mark.parametrize("case", CASES)
def test_resized_tables_equal_timm(case: str) -> None:
    answer = load_file(RECORDED / case / "answer.safetensors")
    opened = load(RECORDED / case, image_size=tuple(answer["other.pixels"].shape[2:]))
    # timm resizes in float32.
    torch.testing.assert_close(run(opened, answer["other.pixels"]), answer["other.output"], rtol=0, atol=2e-6)


def test_the_plain_interpolation_is_not_timms() -> None:
    """The recorded answers tell rules apart."""
    answer = load_file(RECORDED / "each" / "answer.safetensors")
    size = tuple(answer["other.pixels"].shape[2:])
    own, opened = load(RECORDED / "each"), load(RECORDED / "each", image_size=size)
    plain = PositionRule().fit(own.state, own.config, size)
    model = build_reference(opened.config, {**opened.state, **plain})
    assert (forward_float64(model, answer["other.pixels"]) - answer["other.output"]).abs().max() > 1e-4


def bare(case: str, tmp_path: Path, **keywords: Any) -> Checkpoint:
    shutil.copy(RECORDED / case / "model.safetensors", tmp_path / "weights.safetensors")
    opened = open_model(checkpoint=tmp_path / "weights.safetensors", **keywords)
    assert isinstance(opened, Checkpoint)
    return opened


@pytest.mark.slow
@pytest.mark.parametrize("case", ["each", "shared"])
def test_bare_weights_tell_all(case: str, tmp_path: Path) -> None:
    """Tables of relative positions have a column for each head, and rows for the grid."""
    opened = bare(case, tmp_path)
    assert opened.config == load(RECORDED / case).config
    assert not any("heads" in note or "DeiT" in note for note in opened.notes)
    size = (24, 12)
    resized, described = bare(case, tmp_path, image_size=size), load(RECORDED / case, image_size=size)
    assert all(torch.equal(resized.state[name], tensor) for name, tensor in described.state.items())


def test_a_bare_table_that_is_not_square_needs_a_size(tmp_path: Path) -> None:
    assert bare("not_square", tmp_path, image_size=(12, 20)).config == load(RECORDED / "not_square").config
    with pytest.raises(CheckpointError, match="the table of relative positions has 48 rows") as caught:
        bare("not_square", tmp_path)
    assert "--image-size" in (caught.value.hint or "")


ARCHITECTURES: dict[str, dict[str, Any]] = json.loads((RECORDED / "architectures.json").read_text())


def named(name: str, facts: dict[str, Any]) -> Foreign:
    """A model without values, of this architecture."""
    width = facts["width"]
    state = {
        "patch_embed.proj.weight": torch.empty(width, 3, 16, 16, device="meta"),
        "blocks.0.attn.qkv.weight": torch.empty(3 * width, width, device="meta"),
        "blocks.0.attn.q_bias": torch.empty(width, device="meta"),
        "blocks.0.attn.relative_position_bias_table": torch.empty(732, facts["heads"], device="meta"),
        "blocks.0.mlp.fc1.weight": torch.empty(64, width, device="meta"),
        "blocks.0.mlp.fc2.weight": torch.empty(width, 64, device="meta"),
        "fc_norm.weight": torch.empty(width, device="meta"),
    }
    pretrained = {"input_size": [3, *facts["image_size"]]}
    return Foreign(name, state, {"architecture": name, "pretrained_cfg": pretrained})


def test_every_beit_of_timm_has_its_heads_size_and_norm() -> None:
    assert len(ARCHITECTURES) == 7
    for name, facts in ARCHITECTURES.items():
        foreign = named(name, facts)
        assert FAMILY.claims(foreign)
        config = FAMILY.read(foreign, None).config
        assert (name, config.heads, list(config.image_size)) == (name, facts["heads"], facts["image_size"])
        assert (name, config.norm_eps, config.pool) == (name, facts["norm_eps"], "mean")
        assert facts["activation"] == "GELU"


@pytest.mark.parametrize("name", ["beit3_base_patch16_224", "beit_base_patch16_rope_224"])
def test_other_architectures_are_refused_by_name(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"timm's architecture {name}.* is not supported"):
        FAMILY.read(named(name, ARCHITECTURES["beit_base_patch16_224"]), None)


def test_a_replaced_head(tmp_path: Path) -> None:
    folder = copy("each", tmp_path)
    state = load_file(folder / "model.safetensors")
    save_file({k.replace("head.", "head.1."): t for k, t in state.items()}, folder / "model.safetensors")
    opened = load(folder)
    assert torch.equal(opened.state["head.weight"], state["head.weight"])
    assert "the head is the linear layer 'head.1'" in opened.notes


def test_models_that_transformers_wraps(tmp_path: Path) -> None:
    kinds = {"model_type": "timm_wrapper", "architectures": ["TimmWrapperForImageClassification"]}
    folder = copy("shared", tmp_path, **kinds)
    state = load_file(folder / "model.safetensors")
    save_file({f"timm_model.{name}": tensor for name, tensor in state.items()}, folder / "model.safetensors")
    assert load(folder).config == load(RECORDED / "shared").config


# What the authors' files call it; the rest lies under the same names as in timm.
_AUTHORS = {
    r"^beit\.embeddings\.patch_embeddings\.projection": "patch_embed.proj",
    r"^beit\.embeddings\.(cls|mask)_token": r"\1_token",
    r"^beit\.encoder\.relative_position_bias": "rel_pos_bias",
    r"^beit\.encoder\.layer": "blocks",
    r"attention\.output\.dense": "attn.proj",
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
    r"intermediate\.dense": "mlp.fc1",
    r"\.output\.dense": ".mlp.fc2",
    r"lambda_": "gamma_",
    r"^layernorm": "norm",
}


def test_the_authors_files_of_the_pre_training(save: Callable[..., Path], tmp_path: Path) -> None:
    model = transformers.BeitForMaskedImageModeling(
        transformers.BeitConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=1,
            intermediate_size=80,
            image_size=32,
            patch_size=8,
            vocab_size=30,
            use_mask_token=True,
            use_shared_relative_position_bias=True,
            layer_norm_eps=1e-6,
        )
    )
    state = {}
    for name, tensor in load_file(save(model) / "model.safetensors").items():
        for pattern, theirs in _AUTHORS.items():
            name = re.sub(pattern, theirs, name)
        state[name] = tensor
    for i in range(2):
        place = f"blocks.{i}.attention.attention"
        parts = [state.pop(f"{place}.{part}.weight") for part in ("query", "key", "value")]
        state[f"blocks.{i}.attn.qkv.weight"] = torch.cat(parts)
        state[f"blocks.{i}.attn.q_bias"] = state.pop(f"{place}.query.bias")
        state[f"blocks.{i}.attn.v_bias"] = state.pop(f"{place}.value.bias")
    state["rel_pos_bias.relative_position_index"] = torch.zeros(17, 17, dtype=torch.int64)
    torch.save({"model": state}, tmp_path / "beit_base_patch16_224_pt22k.pth")
    opened = open_model(checkpoint=tmp_path / "beit_base_patch16_224_pt22k.pth", image_size=(32, 32))
    assert isinstance(opened, Checkpoint)
    assert opened.family == "timm_beit"
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.inference_mode():
        theirs = model.double().eval()(pixels).logits
    assert (run(opened, pixels, "codes") - theirs).abs().max() <= 1e-10
