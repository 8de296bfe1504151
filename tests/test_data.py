"""The shipped digits model: as good as it says, small, and tested on images it never saw."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from tests.helpers.paths import ROOT
from vitdeploy.config import Preprocess, ViTConfig, model_type
from vitdeploy.data import digits_folder, digits_heldout, digits_images
from vitdeploy.images import preprocess
from vitdeploy.model.registry import build_reference, expected_shapes
from vitdeploy.model.vit import ViT

LIMIT = 1_500_000


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((digits_folder() / "config.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def config(settings: dict[str, Any]) -> ViTConfig:
    fields = dict(settings["model"])
    kind, values = model_type(fields | {"image_size": tuple(fields["image_size"])})
    config = kind(**values)
    assert isinstance(config, ViTConfig)
    return config


@pytest.fixture(scope="module")
def pixels(settings: dict[str, Any]) -> Preprocess:
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(settings["preprocess"]).items()}
    return Preprocess(**fields)


@pytest.fixture(scope="module")
def model(config: ViTConfig) -> ViT:
    return build_reference(config, load_file(digits_folder() / "model.safetensors"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_digits", ROOT / "examples" / "train_digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def predict(model: ViT, images: list[Image.Image], pixels: Preprocess) -> np.ndarray:
    batch = np.stack([preprocess.apply(image, pixels) for image in images])
    with torch.inference_mode():
        return model(torch.from_numpy(batch)).argmax(dim=1).numpy()


@pytest.mark.slow
def test_model_is_as_accurate_as_its_card_says(model: ViT, pixels: Preprocess) -> None:
    images, labels = digits_heldout()
    right = int((predict(model, [Image.fromarray(image) for image in images], pixels) == labels).sum())
    assert right / len(labels) >= 0.97
    stated = re.search(r"\((\d+) of (\d+)\)", (digits_folder() / "README.md").read_text())
    assert stated is not None
    assert (right, len(labels)) == (int(stated[1]), int(stated[2]))


def test_image_files_are_read_right(model: ViT, pixels: Preprocess) -> None:
    paths = digits_images()
    assert {path.suffix for path in paths} == {".png", ".jpg"}
    labels = [int(path.name[0]) for path in paths]
    assert set(labels) == set(range(10))
    predicted = predict(model, [preprocess.load_image(path) for path in paths], pixels)
    assert predicted.tolist() == labels


def test_png_files_hold_the_heldout_pixels(pixels: Preprocess) -> None:
    original = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    for path in digits_images():
        if path.suffix == ".png":
            grey = Image.fromarray(original[int(path.stem.partition("_")[2])]).convert("RGB")
            expected = preprocess.apply(grey, pixels)
            assert np.array_equal(preprocess.apply(preprocess.load_image(path), pixels), expected)


def test_heldout_images_are_not_the_training_images() -> None:
    digits = load_digits()
    images, labels = digits_heldout()
    train, held_out = train_test_split(
        np.arange(len(digits.target)), test_size=0.25, random_state=0, stratify=digits.target
    )
    held_out = np.sort(held_out)
    assert np.array_equal(images[..., 0], np.rint(digits.images[held_out] * 255 / 16).astype(np.uint8))
    assert np.array_equal(labels, digits.target[held_out])
    seen = {digits.images[i].tobytes() for i in train}
    assert seen.isdisjoint(digits.images[i].tobytes() for i in held_out)
    names = {int(path.stem.partition("_")[2]) for path in digits_images()}
    assert names <= set(held_out.tolist())


def test_weights_are_small_and_complete(config: ViTConfig, settings: dict[str, Any]) -> None:
    state = load_file(digits_folder() / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected_shapes(config)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert settings["labels"] == [str(digit) for digit in range(10)]
    assert sum(path.stat().st_size for path in digits_folder().rglob("*") if path.is_file()) <= LIMIT


def test_script_describes_the_shipped_model(
    script: ModuleType, config: ViTConfig, pixels: Preprocess
) -> None:
    assert config == script.MODEL
    assert pixels == script.PIXELS
    _, labels = script.dataset()
    assert np.array_equal(labels[script.split(labels)[1]], digits_heldout()[1])


@pytest.mark.slow
def test_script_writes_a_checkpoint(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "examples" / "train_digits.py"),
        "--epochs",
        "2",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    shipped = {path.relative_to(digits_folder()) for path in digits_folder().rglob("*")}
    assert written == shipped
    with np.load(tmp_path / "heldout.npz") as new, np.load(digits_folder() / "heldout.npz") as shipped_arrays:
        assert all(
            np.array_equal(new[name], shipped_arrays[name]) for name in ("images", "labels", "indices")
        )
