from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.paths import ORACLES
from vitdeploy.checkpoint.families import recognise
from vitdeploy.checkpoint.families.base import Foreign, take_over
from vitdeploy.checkpoint.families.positions import fit_positions
from vitdeploy.checkpoint.opening import Checkpoint, open_model
from vitdeploy.config import ViTConfig
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.registry import build_reference

RECORDED = ORACLES / "torchvision"
# The recordings have two heads of 8 columns; the file does not tell.
TWO_HEADS = ViTConfig(image_size=(16, 16), patch_size=4, width=16, depth=2, heads=2, mlp_width=32)


@pytest.mark.parametrize("case", ["vit", "representation"])
def test_logits_equal_torchvision(case: str) -> None:
    foreign = Foreign(case, load_file(RECORDED / f"{case}.safetensors"))
    answer = load_file(RECORDED / f"{case}.answer.safetensors")
    family, foreign, _ = recognise(foreign)
    assert family.name == "torchvision"
    reading = family.read(foreign, TWO_HEADS)
    state, _ = take_over(reading, family.name, case)
    ours = forward_float64(build_reference(reading.config, state), answer["pixels"])
    torch.testing.assert_close(ours, answer["output"], rtol=0, atol=1e-10)
    state["pos_embed"] = fit_positions(state["pos_embed"], reading.config, (24, 24), family.positions)
    larger = ViTConfig(**{**vars(reading.config), "image_size": (24, 24)})
    ours = forward_float64(build_reference(larger, state), answer["other.pixels"])
    torch.testing.assert_close(ours, answer["other.output"], rtol=0, atol=1e-10)


def test_heads_are_those_of_the_published_models(tmp_path: Path) -> None:
    state = load_file(RECORDED / "vit.safetensors")
    opened = open_model(checkpoint=RECORDED / "vit.safetensors")
    assert isinstance(opened, Checkpoint)
    assert opened.config.heads == 1
    assert any("heads" in note for note in opened.notes)
    assert (opened.preprocess.size, opened.preprocess.resize_edge) == ((16, 16), 18)
    elder = {
        k.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): t
        for k, t in state.items()
    }
    save_file(elder, tmp_path / "elder.safetensors")
    again = open_model(checkpoint=tmp_path / "elder.safetensors")
    assert isinstance(again, Checkpoint)
    assert all(torch.equal(again.state[name], tensor) for name, tensor in opened.state.items())


def test_a_model_of_one_channel_gets_the_average_of_imagenet(tmp_path: Path) -> None:
    state = load_file(RECORDED / "vit.safetensors")
    state["conv_proj.weight"] = state["conv_proj.weight"].sum(dim=1, keepdim=True)
    save_file(state, tmp_path / "grey.safetensors")
    opened = open_model(checkpoint=tmp_path / "grey.safetensors")
    assert isinstance(opened, Checkpoint)
    assert opened.config.channels == 1
    assert opened.preprocess.mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,), rel=1e-15)
    assert any("average" in note for note in opened.notes)
