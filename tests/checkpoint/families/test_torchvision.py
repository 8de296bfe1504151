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
from vitdeploy.errors import CheckpointError
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


def bare(width: int, patch: int, size: int, **renames: str) -> dict[str, torch.Tensor]:
    """A state dict with torchvision's names, of one block."""
    small = load_file(RECORDED / "vit.safetensors")
    rows = (size // patch) ** 2 + 1
    shapes = {
        "conv_proj.weight": (width, 3, patch, patch),
        "encoder.pos_embedding": (1, rows, width),
    }
    state = {
        name: torch.zeros(shapes.get(name, tuple(_wider(length, width) for length in tensor.shape)))
        for name, tensor in small.items()
        if ".encoder_layer_1." not in name
    }
    return {renames.get(name, name): tensor for name, tensor in state.items()}


def _wider(length: int, width: int) -> int:
    """A length of the recordings, where widths are 16, 32 and 48, with another width."""
    return {16: width, 32: 64, 48: 3 * width}.get(length, length)


# torchvision 0.29, models/vision_transformer.py: crop, resize and interpolation of the published weights.
WEIGHTS = [
    (768, 16, 224, "ViT_B_16_Weights.IMAGENET1K_V1", 256, "bilinear"),
    (768, 16, 384, "ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1", 384, "bicubic"),
    (768, 32, 224, "ViT_B_32_Weights.IMAGENET1K_V1", 256, "bilinear"),
    (1024, 16, 224, "ViT_L_16_Weights.IMAGENET1K_V1", 242, "bilinear"),
    (1024, 16, 512, "ViT_L_16_Weights.IMAGENET1K_SWAG_E2E_V1", 512, "bicubic"),
    (1024, 32, 224, "ViT_L_32_Weights.IMAGENET1K_V1", 256, "bilinear"),
    (1280, 14, 224, "ViT_H_14_Weights.IMAGENET1K_SWAG_LINEAR_V1", 224, "bicubic"),
    (1280, 14, 518, "ViT_H_14_Weights.IMAGENET1K_SWAG_E2E_V1", 518, "bicubic"),
]


@pytest.mark.parametrize("width, patch, size, name, edge, resample", WEIGHTS)
def test_preprocessing_is_that_of_the_published_weights(
    width: int, patch: int, size: int, name: str, edge: int, resample: str
) -> None:
    family, foreign, _ = recognise(Foreign("file", bare(width, patch, size)))
    reading = family.read(foreign, None)
    spec = reading.preprocess(None)
    assert (spec.size, spec.resize_edge, spec.resample) == ((size, size), edge, resample)
    assert (spec.mean, spec.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert reading.assumed["preprocess"] == f"preprocessing is taken to be that of torchvision's {name}"


def test_preprocessing_at_another_size_keeps_the_models_share() -> None:
    family, foreign, _ = recognise(Foreign("file", bare(1024, 16, 384)))
    assert family.read(foreign, None).preprocess(None).resize_edge == 415  # 384 * 242 / 224


@pytest.mark.parametrize("place", ["heads", "heads.0", "heads.head.1", "heads.fc"])
def test_a_head_of_one_linear_layer_under_another_name(tmp_path: Path, place: str) -> None:
    state = load_file(RECORDED / "vit.safetensors")
    moved = {name.replace("heads.head.", f"{place}."): tensor for name, tensor in state.items()}
    save_file(moved, tmp_path / "vit.safetensors")
    opened = open_model(checkpoint=tmp_path / "vit.safetensors")
    assert isinstance(opened, Checkpoint)
    assert torch.equal(opened.state["head.weight"], state["heads.head.weight"])
    assert f"the head is the linear layer {place!r}" in opened.notes


@pytest.mark.parametrize("shape", [(16, 16), (16,)])
def test_a_head_of_several_layers_is_no_head(tmp_path: Path, shape: tuple[int, ...]) -> None:
    state = load_file(RECORDED / "vit.safetensors")
    moved = {name.replace("heads.head.", "heads.2."): tensor for name, tensor in state.items()}
    moved["heads.0.weight"] = torch.ones(shape)
    save_file(moved, tmp_path / "vit.safetensors")
    with pytest.raises(CheckpointError, match=r"3 unexpected \(heads\.\{0,2\}\.weight, heads\.2\.bias"):
        open_model(checkpoint=tmp_path / "vit.safetensors")


def test_a_model_of_one_channel_gets_the_average_of_imagenet(tmp_path: Path) -> None:
    state = load_file(RECORDED / "vit.safetensors")
    state["conv_proj.weight"] = state["conv_proj.weight"].sum(dim=1, keepdim=True)
    save_file(state, tmp_path / "grey.safetensors")
    opened = open_model(checkpoint=tmp_path / "grey.safetensors")
    assert isinstance(opened, Checkpoint)
    assert opened.config.channels == 1
    assert opened.preprocess.mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,), rel=1e-15)
    assert any("average" in note for note in opened.notes)
