"""Folders under our own names: what a configuration computes, and tables at other sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.models import CONFIGS, random_state
from vitdeploy.checkpoint.opening import Checkpoint, open_model, save_folder
from vitdeploy.config import Preprocess, Size, ViTConfig
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.registry import build_reference


def folder(tmp_path: Path, name: str) -> Path:
    config = CONFIGS[name]
    spec = Preprocess(size=config.image_size)
    save_folder(Checkpoint(config, random_state(config), spec, None, "vitdeploy", "test"), tmp_path / name)
    return tmp_path / name


def opened(path: Path, size: Size | None = None) -> Checkpoint:
    checkpoint = open_model(str(path), image_size=size)
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.family == "vitdeploy"
    return checkpoint


def sinusoids(config: ViTConfig) -> Tensor:
    """Vaswani et al. 2017, section 3.5, at the frequencies of big_vision's tables: sines, then cosines."""
    half = config.width // 2
    angles = [[n / 10_000 ** (i / (half - 1)) for i in range(half)] for n in range(config.patches)]
    rows = [[*map(math.sin, row), *map(math.cos, row)] for row in angles]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("size", [None, (24, 40), (64, 64)])
def test_fixed_1d_positions_are_computed_at_any_size(tmp_path: Path, size: Size | None) -> None:
    checkpoint = opened(folder(tmp_path, "sincos1d"), size)
    config = checkpoint.config
    assert isinstance(config, ViTConfig)
    assert (config.position, "pos_embed" in checkpoint.state) == ("sincos1d", False)
    learned = replace(config, position="learned")
    table = {name: tensor.double() for name, tensor in checkpoint.state.items()}
    table["pos_embed"] = sinusoids(config)
    pixels = torch.randn(2, config.channels, *config.image_size, dtype=torch.float64)
    ours, theirs = (
        forward_float64(build_reference(c, state), pixels, "tokens")
        for c, state in ((config, checkpoint.state), (learned, table))
    )
    assert (ours - theirs).abs().max() <= 1e-12


@pytest.mark.slow
def test_fixed_1d_positions_are_exported(tmp_path: Path, exported: Callable[[Path, Tensor], Tensor]) -> None:
    source = folder(tmp_path, "sincos1d")
    checkpoint = opened(source)
    pixels = torch.randn(2, checkpoint.config.channels, *checkpoint.config.image_size)
    answer = exported(source, pixels)
    expected = forward_float64(build_reference(checkpoint.config, checkpoint.state), pixels)
    assert torch.linalg.vector_norm(answer - expected) <= 1e-4 * torch.linalg.vector_norm(expected)


def test_relative_positions_are_resized_around_their_middle(tmp_path: Path) -> None:
    path = folder(tmp_path, "beit")
    own, larger = opened(path), opened(path, (64, 96))
    assert all(torch.equal(larger.state[n], t) for n, t in own.state.items() if "score_bias" not in n)
    name = "blocks.1.attn.score_bias"
    before, after = own.state[name].double(), larger.state[name]
    # 7x11 offsets of 4x6 patches become 15x23 of 8x12.
    assert (before.shape, after.shape) == ((7 * 11 + 3, 3), (15 * 23 + 3, 3))
    assert torch.equal(before[-3:], after[-3:])
    before, after = before[:-3].reshape(7, 11, 3), after[:-3].reshape(15, 23, 3)
    assert torch.allclose(before[3, 5], after[7, 11], rtol=0, atol=1e-12)
    assert torch.allclose(before[0, 0], after[0, 0], rtol=0, atol=1e-12)
