from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from tests.helpers.paths import ORACLES
from vitdeploy.checkpoint.families import google
from vitdeploy.checkpoint.opening import Checkpoint, open_model
from vitdeploy.config import Stem, ViTConfig
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


HYBRIDS: dict[str, dict[str, Any]] = {
    "stages": {"resnet": (2, 1), "patch": 1, "side": 4},
    "elder": {"resnet": (1, 1, 1), "patch": 1, "side": 2, "elder": True, "representation": 12},
    "root": {"resnet": (), "patch": 2, "side": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_equal_the_documented_layout(tmp_path: Path, name: str) -> None:
    arrays = ORACLE["synthesise"](seed=8, **HYBRIDS[name])
    checkpoint = opened(arrays, tmp_path)
    config = checkpoint.config
    assert isinstance(config, ViTConfig)
    assert config.stem == Stem(HYBRIDS[name]["resnet"], 32, 32, 1e-6, 1e-5, "deviation")
    assert config.image_size == (32, 32)
    assert_agrees(checkpoint, arrays)
    assert_agrees(opened(arrays, tmp_path, image_size=(64, 32)), arrays)


@pytest.mark.slow
@pytest.mark.parametrize("field, value", [("norm_eps", 1e-5), ("weight_eps_on", "variance"), ("groups", 16)])
def test_timms_settings_of_the_resnet_are_seen(
    tmp_path: Path, field: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm loads these files into a model that adds other numbers, at other places."""
    changed: Any = {field: value}
    monkeypatch.setattr(google, "_STEM", replace(google._STEM, **changed))
    arrays = ORACLE["synthesise"](seed=8, **HYBRIDS["stages"])
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_agrees(opened(arrays, tmp_path), arrays)


def test_a_missing_tensor_of_a_resnet_is_named_as_the_file_does(tmp_path: Path) -> None:
    arrays = ORACLE["synthesise"](seed=8, **HYBRIDS["stages"])
    del arrays["block2/unit1/gn_proj/bias"], arrays["block1/unit2/conv2/kernel"]
    with pytest.raises(CheckpointError) as error:
        opened(arrays, tmp_path)
    for name in ("block2/unit1/gn_proj/bias", "block1/unit2/conv2/kernel"):
        assert name in error.value.message


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
