"""Files as training scripts and frameworks write them: what was trained is found below their own names."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.helpers.checkpoints import save_tiny
from tests.helpers.paths import ORACLES
from vitdeploy.checkpoint.opening import Checkpoint, open_model
from vitdeploy.errors import CheckpointError


@pytest.fixture(params=["timm", "transformers"])
def state(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Tensor]:
    """What a library calls the tensors of a ViT."""
    if request.param == "timm":
        return load_file(ORACLES / "timm" / "vit" / "model.safetensors")
    made = save_tiny(tmp_path / "tiny")
    shutil.copy(made / "config.json", tmp_path)  # which belongs beside weights of transformers
    return load_file(made / "model.safetensors")


def opened(content: object, folder: Path) -> Checkpoint:
    torch.save(content, folder / "weights.ckpt")
    found = open_model(checkpoint=folder / "weights.ckpt")
    assert isinstance(found, Checkpoint)
    return found


def put(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def require_same(found: Checkpoint, expected: Checkpoint) -> None:
    assert found.config == expected.config
    assert found.state.keys() == expected.state.keys()
    assert all(torch.equal(found.state[name], tensor) for name, tensor in expected.state.items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "net.backbone.", "module._orig_mod."])
def test_what_stands_before_every_name_is_dropped(
    state: dict[str, Tensor], tmp_path: Path, prefix: str
) -> None:
    found = opened({"state_dict": put(prefix, state), "epoch": 9}, tmp_path)
    require_same(found, opened(state, tmp_path))
    assert f"the prefix {prefix!r} of every name was dropped" in found.notes


def test_other_tensors_beside_the_model_are_left_out(tmp_path: Path) -> None:
    state = load_file(ORACLES / "timm" / "vit" / "model.safetensors")
    beside = {"criterion.weight": torch.ones(7), "loss.projection.weight": torch.ones(3, 3)}
    found = opened({"state_dict": put("model.", state) | beside}, tmp_path)
    require_same(found, opened(state, tmp_path))
    assert "weights taken from names that begin with 'model.'; 2 others left out" in found.notes


@pytest.mark.parametrize(
    "key", ["ema", "model_ema", "state_dict_ema", "ema_model", "EMA_state_dict", "swa_model", "averaged"]
)
def test_an_average_under_any_of_its_names(tmp_path: Path, key: str) -> None:
    state = load_file(ORACLES / "timm" / "vit" / "model.safetensors")
    raw = {name: tensor + 1 for name, tensor in state.items()}
    found = opened({"state_dict": raw, key: {"decay": 0.999, "module": state}}, tmp_path)
    require_same(found, opened(state, tmp_path))
    assert f"weights taken from {key!r} of weights.ckpt, not from 'state_dict' beside it" in found.notes


def test_settings_of_an_average_are_no_weights(tmp_path: Path) -> None:
    state = load_file(ORACLES / "timm" / "vit" / "model.safetensors")
    found = opened({"ema": {"decay": 0.999}, "model_ema": {}, "schema": {"x": 1}, "model": state}, tmp_path)
    require_same(found, opened(state, tmp_path))


def test_a_file_that_leads_back_to_itself(tmp_path: Path) -> None:
    content: dict[str, object] = {"epoch": 1}
    content |= {"model": content, "ema": content, "net": {"module": content}}
    torch.save(content, tmp_path / "circle.pt")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        open_model(checkpoint=tmp_path / "circle.pt")


@pytest.mark.slow
def test_of_two_models_the_averaged_one_is_taken(tmp_path: Path) -> None:
    state = load_file(ORACLES / "timm" / "vit" / "model.safetensors")
    raw = {name: tensor + 1 for name, tensor in state.items()}
    for averaged, other in (("teacher", "student"), ("ema", "model"), ("ema_model", "model")):
        both = put(f"{other}.backbone.", raw) | put(f"{averaged}.backbone.", state)
        found = opened(both, tmp_path)
        require_same(found, opened(state, tmp_path))
        assert any(f"begin with '{averaged}.backbone.'" in note for note in found.notes)


def test_an_averaged_model_of_torch(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self, state: Mapping[str, Tensor]) -> None:
            super().__init__()
            for name, tensor in state.items():
                part = self
                *path, leaf = name.split(".")
                for step in path:
                    if not hasattr(part, step):
                        part.add_module(step, nn.Module())
                    part = getattr(part, step)
                part.register_parameter(leaf, nn.Parameter(tensor))

    state = load_file(ORACLES / "timm" / "vit" / "model.safetensors")
    averaged = torch.optim.swa_utils.AveragedModel(Named(state))
    require_same(opened(averaged.state_dict(), tmp_path), opened(state, tmp_path))


def test_names_that_no_family_has_are_still_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no known family names its tensors like this"):
        opened({"state_dict": {"model.a.weight": torch.ones(2), "model.b.weight": torch.ones(2)}}, tmp_path)
