"""Folders and files that are no checkpoint are called what they are, and the hint leads on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.checkpoints import edit_config, edit_weights, save_tiny
from tests.helpers.paths import ORACLES
from vitdeploy.checkpoint.opening import Checkpoint, open_model
from vitdeploy.errors import CheckpointError


def refused(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_model(str(path))
    error = caught.value
    assert error.hint
    assert "\n" not in error.message + error.hint
    assert len(error.message) + len(error.hint) <= 400 + 2 * len(str(path))
    return error


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of transformers."""
    return save_tiny(tmp_path / "model")


def test_an_adapter_without_its_weights(tmp_path: Path) -> None:
    made = tmp_path / "adapter"
    made.mkdir()
    (made / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    assert "is an adapter without its weights" in refused(made).message


def test_the_hubs_cache_and_its_hint(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--google--vit"
    (cache / "refs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    folder.rename(cache / "snapshots" / "0123abc")
    error = refused(cache)
    assert "is a cache of the hub" in error.message
    assert isinstance(open_model((error.hint or "").rpartition(": ")[2]), Checkpoint)


@pytest.mark.parametrize("name", ["tf_model.h5", "flax_model.msgpack"])
def test_weights_of_another_framework(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    assert "weights of TensorFlow or Flax only" in refused(folder).message


@pytest.mark.parametrize("place", ["model.onnx", "onnx/model.onnx"])
def test_somebodys_onnx_export(folder: Path, place: str) -> None:
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / "model.safetensors").rename(folder / place)
    assert "holds an ONNX export (model.onnx) and no checkpoint" in refused(folder).message


def split(folder: Path, stem: str, suffix: str) -> list[str]:
    """Cut the folder's weights into two shards, and return their names."""
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    parts = {f"{stem}-0000{i}-of-00002.{suffix}": names[i - 1 :: 2] for i in (1, 2)}
    for part, keys in parts.items():
        shard = {key: state[key] for key in keys}
        if suffix == "bin":
            torch.save(shard, folder / part)
        else:
            save_file(shard, folder / part)
    content = {"metadata": {}, "weight_map": {key: part for part, keys in parts.items() for key in keys}}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(content))
    (folder / "model.safetensors").unlink()
    return list(parts)


@pytest.mark.parametrize("stem, suffix", [("model", "safetensors"), ("pytorch_model", "bin")])
def test_shards_are_read_together_and_not_alone(folder: Path, stem: str, suffix: str) -> None:
    whole = open_model(str(folder))
    first, _ = split(folder, stem, suffix)
    read = open_model(str(folder))
    assert isinstance(whole, Checkpoint)
    assert isinstance(read, Checkpoint)
    assert read.config == whole.config
    assert all(torch.equal(read.state[name], tensor) for name, tensor in whole.state.items())
    error = refused(folder / first)
    assert "is one of 2 shards" in error.message
    assert isinstance(open_model((error.hint or "").partition(", ")[2]), Checkpoint)


@pytest.mark.parametrize("name", ["vit.layers.0.q.weight.SCB", "head.weight.absmax", "head._packed_params"])
def test_quantised_weights(folder: Path, name: str) -> None:
    state = load_file(folder / "model.safetensors") | {name: torch.ones(3)}
    save_file(state, folder / "model.safetensors")
    assert "holds quantised weights" in refused(folder).message


def test_a_quantised_configuration(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert "(bitsandbytes)" in refused(folder).message


def test_a_file_beside_and_its_hint(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "best.safetensors")
    error = refused(folder)
    assert "none of model.safetensors" in error.message
    assert isinstance(open_model((error.hint or "").rpartition(": ")[2]), Checkpoint)


SIGNS = [
    ("blocks.0.attn.q_norm.weight", "norms of its queries and keys"),
    ("shared_rel_pos.relative_position_bias_table", "relative positions"),
    ("blocks.0.attn.q_bias", "BEiT"),
    ("blocks.0.attn.rel_pos.mlp.fc1.weight", "relative positions"),
    ("blocks.0.attn.rope.freqs", "rotary positions"),
    ("blocks.0.attn.lambda_q1", "differential attention"),
    ("blocks.0.attn.rel_pos_h", "SAM"),
    ("blocks.0.attn.norm.weight", "norms inside its branches"),
    ("blocks.0.mlp.fc1_g.weight", "another gated MLP"),
    ("patch_embed.backbone.conv1.0.weight", "a hybrid, with another ResNet"),
    ("blocks_token_only.0.norm1.weight", "CaiT"),
    ("decoder_blocks.0.norm1.weight", "MAE's pretraining"),
]
"""Names that timm's state dicts have (1.0.31), and what they are a sign of."""


@pytest.mark.parametrize("name, what", SIGNS)
def test_another_architecture_is_called_what_it_probably_is(tmp_path: Path, name: str, what: str) -> None:
    state = load_file(ORACLES / "timm" / "vit" / "model.safetensors") | {name: torch.ones(2)}
    save_file(state, tmp_path / "weights.safetensors")
    error = refused(tmp_path / "weights.safetensors")
    assert what in error.message.partition("; it looks like ")[2]
    assert "module:function" in (error.hint or "")


def test_without_positions(tmp_path: Path) -> None:
    state = load_file(ORACLES / "timm" / "vit" / "model.safetensors")
    del state["pos_embed"]
    save_file(state, tmp_path / "weights.safetensors")
    message = refused(tmp_path / "weights.safetensors").message
    assert "positions are rotary or relative, and a config.json beside it has to tell which" in message


@pytest.mark.parametrize(
    "names, what",
    [
        (["layers.0.blocks.0.attn.relative_position_bias_table"], "Swin"),
        (["conv1.weight", "layer1.0.conv1.weight"], "a ResNet"),
        (["stages.0.downsample.0.weight"], "a model in stages"),
        (["text_model.final_layer_norm.weight", "logit_scale"], "a text model of CLIP or SigLIP"),
        (["visual.layer1.0.conv1.weight", "transformer.resblocks.0.ln_1.weight"], "CLIP with a ResNet"),
        (["base_model.model.vit.layers.0.q.lora_A.weight"], "a LoRA adapter"),
    ],
)
def test_names_of_no_family_say_what_they_are(tmp_path: Path, names: list[str], what: str) -> None:
    save_file({name: torch.ones(2) for name in names}, tmp_path / "weights.safetensors")
    assert f"it looks like {what}" in refused(tmp_path / "weights.safetensors").message


@pytest.mark.parametrize("kind", ["levit", "data2vec-vision", "yolos"])
def test_model_types_of_others_are_no_misspelt_ones(folder: Path, kind: str) -> None:
    edit_config(folder, model_type=kind)
    error = refused(folder)
    assert f"model_type {kind!r} in config.json is not supported" in error.message
    assert "did you mean" not in error.message


def test_a_wrapped_model_of_timm_that_is_no_vit(folder: Path) -> None:
    edit_config(folder, model_type="timm_wrapper", architecture="resnet50")
    edit_weights(
        folder, lambda state: state.clear() or state.update({"timm_model.conv1.weight": torch.ones(2)})
    )
    assert "timm's architecture resnet50" in refused(folder).message


@pytest.mark.parametrize("key", ["hidden_size", "hidden_act", "model_type", "problem_type"])
def test_long_values_are_cut(folder: Path, key: str) -> None:
    edit_config(folder, **{key: "x" * 5000})
    refused(folder)
