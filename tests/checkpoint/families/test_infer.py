"""What no file states: the shape of a position table is a guess, said, and settled by the size asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.checkpoints import opened
from tests.helpers.paths import ORACLES
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.registry import build_reference

RECORDED = ORACLES / "timm" / "not_square"
"""3x5 patches of 4 pixels: made square below by another row."""


@pytest.fixture
def oblong(tmp_path: Path) -> Path:
    """Weights of 2x8 patches of 4 pixels without a word about them, as many as 4x4 have."""
    state = load_file(RECORDED / "model.safetensors")
    state["pos_embed"] = torch.randn(1, 17, 16, generator=torch.Generator().manual_seed(0))
    save_file(state, tmp_path / "rect.safetensors")
    return tmp_path / "rect.safetensors"


def test_a_square_is_a_guess_and_said(oblong: Path) -> None:
    model = opened(checkpoint=oblong)
    assert model.config.image_size == (16, 16)
    assert any(
        "16 patches: 4x4, of 16x16 pixels, is taken, and --image-size settles it" in n for n in model.notes
    )


def test_the_size_asked_for_settles_it(oblong: Path) -> None:
    model = opened(checkpoint=oblong, image_size=(8, 32))
    table = load_file(oblong)["pos_embed"][0]
    assert model.config.image_size == (8, 32)
    assert torch.equal(model.state["pos_embed"], table)  # not interpolated from a square
    assert any("2x8, of the 8x32 pixels asked for" in note for note in model.notes)
    assert not any("interpolated" in note for note in model.notes)


def test_the_table_lies_in_rows(oblong: Path) -> None:
    """Patch (r, c) of the 2x8 grid has row 1 + 8 r + c of the table, as in timm's flatten of (H, W)."""
    model = opened(checkpoint=oblong, image_size=(8, 32))
    pixels = torch.randn(1, 3, 8, 32, generator=torch.Generator().manual_seed(1))
    reference = build_reference(model.config, model.state)
    moved = pixels.unflatten(3, (8, 4)).roll(1, 3).flatten(3)
    table = model.state["pos_embed"]
    patches = table[1:].unflatten(0, (2, 8)).roll(1, 1).flatten(0, 1)
    rolled = build_reference(model.config, {**model.state, "pos_embed": torch.cat([table[:1], patches])})
    torch.testing.assert_close(
        forward_float64(reference, pixels), forward_float64(rolled, moved), rtol=0, atol=1e-12
    )


def test_another_size_is_interpolated_from_the_square(oblong: Path) -> None:
    model = opened(checkpoint=oblong, image_size=(32, 32))
    assert any("is taken, and --image-size settles it" in note for note in model.notes)
    assert any("positions interpolated from 16x16 to 32x32" in note for note in model.notes)


def test_a_stated_size_beats_the_one_asked_for(oblong: Path) -> None:
    config = json.loads((RECORDED / "config.json").read_text())
    config["model_args"]["img_size"] = [16, 16]
    (oblong.parent / "config.json").write_text(json.dumps(config))
    model = opened(checkpoint=oblong, image_size=(8, 32))
    assert any("positions interpolated from 16x16 to 8x32" in note for note in model.notes)
    assert not any("does not tell" in note for note in model.notes)


@pytest.mark.slow
def test_torchvisions_and_our_own_names_say_it_too(tmp_path: Path) -> None:
    for name, state in (
        ("torchvision", load_file(ORACLES / "torchvision" / "vit.safetensors")),
        ("own", dict(opened("vit_tiny_patch16_64").state)),
    ):
        save_file(state, tmp_path / f"{name}.safetensors")
        assert any("settles it" in note for note in opened(checkpoint=tmp_path / f"{name}.safetensors").notes)
