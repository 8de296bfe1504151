"""Folders and files that are no checkpoint are called what they are, and the hint leads on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.checkpoints import save_tiny
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
