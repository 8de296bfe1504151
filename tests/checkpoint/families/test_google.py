from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from tests.helpers.paths import ORACLES
from vitdeploy.checkpoint.opening import Checkpoint, open_model
from vitdeploy.errors import CheckpointError
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.registry import build_reference

ORACLE = runpy.run_path(str(ORACLES / "google_npz.py"))


def opened(arrays: dict[str, Any], tmp_path: Path, **keywords: Any) -> Checkpoint:
    np.savez(tmp_path / "model.npz", **arrays)
    checkpoint = open_model(checkpoint=tmp_path / "model.npz", **keywords)
    assert isinstance(checkpoint, Checkpoint)
    return checkpoint


def assert_agrees(checkpoint: Checkpoint, arrays: dict[str, Any]) -> None:
    pixels = torch.randn(2, 3, *checkpoint.config.image_size, dtype=torch.float64)
    ours = forward_float64(build_reference(checkpoint.config, checkpoint.state), pixels).numpy()
    theirs = ORACLE["forward"](arrays, pixels.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)
    assert abs(theirs[0] - theirs[1]).max() > 1e-2


@pytest.mark.parametrize(
    "shape", [{}, {"representation": 12}, {"token": False}, {"heads": 4, "depth": 3, "patch": 2}]
)
def test_logits_equal_the_documented_layout(tmp_path: Path, shape: dict[str, Any]) -> None:
    arrays = ORACLE["synthesise"](seed=1, **shape)
    checkpoint = opened(arrays, tmp_path)
    assert checkpoint.family == "google"
    assert checkpoint.config.heads == shape.get("heads", 2)
    assert_agrees(checkpoint, arrays)


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (12, 28)])
def test_positions_interpolate_linearly_from_corner_to_corner(tmp_path: Path, size: tuple[int, int]) -> None:
    arrays = ORACLE["synthesise"](seed=2)
    checkpoint = opened(arrays, tmp_path, image_size=size)
    assert checkpoint.preprocess.size == size
    assert_agrees(checkpoint, arrays)


def test_oracle_stretches_as_scipy_does() -> None:
    table = np.random.default_rng(3).normal(size=(17, 6))
    zoomed = ndimage.zoom(table[1:].reshape(4, 4, 6), (7 / 4, 3 / 4, 1), order=1)
    np.testing.assert_allclose(ORACLE["stretch"](table, 1, (7, 3))[1:], zoomed.reshape(21, 6), atol=1e-12)


def test_optimizer_state_is_left_alone(tmp_path: Path) -> None:
    arrays = ORACLE["synthesise"](seed=4)
    training = {f"opt/target/{name}": array for name, array in arrays.items()}
    training["opt/state/step"] = np.array(7)
    assert_agrees(opened(training, tmp_path), arrays)


def test_big_endian_arrays_are_read(tmp_path: Path) -> None:
    arrays = ORACLE["synthesise"](seed=5)
    swapped = {name: array.astype(">f4") for name, array in arrays.items()}
    assert_agrees(opened(swapped, tmp_path), arrays)


def test_problems_are_listed_under_the_file_s_names(tmp_path: Path) -> None:
    arrays = ORACLE["synthesise"](seed=6)
    del arrays["head/bias"]
    arrays["Transformer/encoderblock_1/LayerNorm_9/scale"] = arrays["cls"]
    with pytest.raises(CheckpointError) as error:
        opened(arrays, tmp_path)
    assert "1 missing (head/bias)" in error.value.message
    assert "1 unexpected (Transformer/encoderblock_1/LayerNorm_9/scale)" in error.value.message


def test_query_without_heads_is_refused(tmp_path: Path) -> None:
    arrays = ORACLE["synthesise"](seed=7)
    name = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"
    arrays[name] = arrays[name].reshape(16, 16)
    with pytest.raises(
        CheckpointError, match=r"must be \(width, heads, head width\); it is of shape \(16, 16\)"
    ):
        opened(arrays, tmp_path)
