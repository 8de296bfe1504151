from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vitdeploy.checkpoint.documents import read_json
from vitdeploy.checkpoint.files import read_shards, read_weights
from vitdeploy.errors import CheckpointError

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16)}


def write_safetensors(path: Path) -> None:
    save_file(STATE, path)


def write_npz(path: Path) -> None:
    np.savez_compressed(path, **{name: tensor.numpy() for name, tensor in STATE.items()})


def write_pt(path: Path) -> None:
    torch.save(STATE, path)


def write_legacy_pt(path: Path) -> None:
    torch.save(STATE, path, _use_new_zipfile_serialization=False)


KINDS: list[tuple[str, Callable[[Path], None]]] = [
    ("w.safetensors", write_safetensors),
    ("w.npz", write_npz),
    ("w.pt", write_pt),
    ("w.pth", write_legacy_pt),
]
every_kind = pytest.mark.parametrize("name,write", KINDS)


def equal(state: Any, expected: dict[str, Tensor] = STATE) -> bool:
    return state.keys() == expected.keys() and all(torch.equal(state[k], v) for k, v in expected.items())


@every_kind
def test_tensors_come_back_with_their_hash(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    weights = read_weights(tmp_path / name)
    assert equal(weights.state)
    assert weights.files == {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}
    assert weights.notes == ()


@pytest.mark.slow
@every_kind
def test_cut_short_anywhere_is_one_clear_error(
    tmp_path: Path, name: str, write: Callable[[Path], None]
) -> None:
    write(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for length in {0, 1, 7, 8, 9, *range(10, len(content), max(1, len(content) // 60))}:
        (tmp_path / name).write_bytes(content[:length])
        with pytest.raises(CheckpointError) as error:
            read_weights(tmp_path / name)
        assert name in error.value.message
        assert "\n" not in error.value.message


@pytest.mark.slow
@every_kind
def test_damage_never_escapes_as_another_error(
    tmp_path: Path, name: str, write: Callable[[Path], None]
) -> None:
    write(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    dice = random.Random(3)
    for _ in range(200):
        damaged = bytearray(content)
        for _ in range(dice.randint(1, 4)):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        (tmp_path / name).write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            read_weights(tmp_path / name)


def test_missing_file_folder_and_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_weights(tmp_path / "none.safetensors")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(CheckpointError, match="Is a directory"):
        read_weights(tmp_path / "folder.pt")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 346293852\n", "a Git LFS pointer"),
        (b"\x89HDF\r\n\x1a\n" + bytes(90), "an HDF5 file of Keras or TensorFlow"),
        (b"GGUF" + bytes(90), "a GGUF file, whose weights are quantised"),
        (b"\x08\x0a\x12\x07pytorch" + bytes(90), "it may be an ONNX file"),
        (b"<html>Not found</html>" + bytes(90), "neither safetensors nor a PyTorch file nor .npz"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_what_is_no_checkpoint_is_called_by_its_name(
    tmp_path: Path, content: bytes, message: str, name: str
) -> None:
    (tmp_path / name).write_bytes(content)
    if name.endswith(".safetensors") and content.startswith(b"<"):
        message = "truncated or not safetensors"
    with pytest.raises(CheckpointError, match=message) as error:
        read_weights(tmp_path / name)
    assert error.value.hint
    assert len(error.value.message) + len(error.value.hint) <= 400 + len(str(tmp_path))


def test_torchscript_is_called_that(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="is TorchScript") as error:
        read_weights(tmp_path / "model.pt")
    assert "torch.jit.load" in (error.value.hint or "")


@pytest.mark.parametrize("name", ["model_best.pth.tar", "last.ckpt", "weights.pkl", "WEIGHTS.PT", "epoch_9"])
def test_the_content_says_what_a_file_is(tmp_path: Path, name: str) -> None:
    torch.save({"state_dict": STATE, "epoch": 9, "args": argparse.Namespace(lr=0.1)}, tmp_path / name)
    assert equal(read_weights(tmp_path / name).state)
    save_file(STATE, tmp_path / name)
    assert equal(read_weights(tmp_path / name).state)


def test_an_average_that_is_empty_is_none(tmp_path: Path) -> None:
    torch.save({"state_dict_ema": {}, "state_dict": STATE}, tmp_path / "w.pt")
    assert equal(read_weights(tmp_path / "w.pt").state)


@pytest.mark.parametrize(
    "taken, beside",
    [
        ("state_dict_ema", ("state_dict",)),
        ("model_ema", ("model",)),
        ("teacher", ("student",)),
        ("network", ()),
    ],
)
def test_the_weights_that_are_deployed_are_taken(tmp_path: Path, taken: str, beside: tuple[str, ...]) -> None:
    other = {name: tensor * 0 for name, tensor in STATE.items()}
    torch.save({**dict.fromkeys(beside, other), taken: STATE, "epoch": 9}, tmp_path / "w.pt")
    weights = read_weights(tmp_path / "w.pt")
    assert equal(weights.state)
    assert f"weights taken from {taken!r} of w.pt" in weights.notes[0]
    assert all(repr(name) in weights.notes[0] for name in beside)


def test_pickle_under_the_name_of_safetensors_is_called_that(tmp_path: Path) -> None:
    for write in (write_pt, write_legacy_pt):
        write(tmp_path / "w.safetensors")
        with pytest.raises(CheckpointError, match="is a pickle or a zip file, not safetensors"):
            read_weights(tmp_path / "w.safetensors")


@pytest.mark.slow
def test_header_that_claims_more_than_the_file_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="its header claims 4611686018427387904 bytes, the file has 10"):
        read_weights(path)
    with path.open("wb") as file:  # a sparse file, so that the header is there, but larger than any real one
        file.write((101 * 10**6).to_bytes(8, "little"))
        file.truncate(102 * 10**6)
    with pytest.raises(CheckpointError, match="damaged or not safetensors"):
        read_weights(path)


class Harmful:
    """Unpickling this would leave a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_are_never_run(tmp_path: Path, legacy: bool) -> None:
    path, mark = tmp_path / "w.pt", tmp_path / "mark"
    torch.save({"state_dict": STATE, "extra": Harmful(mark)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="holds more than tensors") as error:
        read_weights(path)
    assert "model.state_dict()" in (error.value.hint or "")
    assert not mark.exists()


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state", "model_state_dict"])
def test_common_wrappers_are_opened(tmp_path: Path, wrapper: str) -> None:
    torch.save({wrapper: STATE, "epoch": 3, "lr": 0.1}, tmp_path / "w.pt")
    weights = read_weights(tmp_path / "w.pt")
    assert equal(weights.state)
    assert weights.notes == (f"weights taken from {wrapper!r} of w.pt",)


@pytest.mark.parametrize("content", [{"epoch": 3}, [torch.ones(2)], torch.ones(2), {"state_dict": {}}])
def test_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_weights(tmp_path / "w.pt")


def test_empty_containers_are_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "w.safetensors")
    np.savez(tmp_path / "w.npz")
    for name in ("w.safetensors", "w.npz"):
        with pytest.raises(CheckpointError, match="holds no tensors"):
            read_weights(tmp_path / name)


@pytest.mark.slow
def test_zip_bombs_are_not_unpacked(tmp_path: Path) -> None:
    for name in ("bomb.npz", "bomb.pt"):
        with (
            zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open("a.npy", "w") as file,
        ):
            for _ in range(100):
                file.write(bytes(2**20))
        with pytest.raises(CheckpointError, match="would unpack to 104857600 bytes"):
            read_weights(tmp_path / name)


def npz_with_header(path: Path, header: bytes, data: bytes = b"") -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", header + data)


def npy_header(shape: str, dtype: str = "<f4", version: bytes = b"\x01\x00") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + version + len(text).to_bytes(2 if version[0] == 1 else 4, "little") + text


@pytest.mark.parametrize(
    "header,message",
    [
        (npy_header("(1000000000000,)"), "needs more than its"),
        (npy_header("(2,)", "|O"), "arrays of object are not supported"),
        (npy_header("(2,)", "|V2"), "are not supported"),
        (npy_header("(2,)", version=b"\x03\x00"), "npy version"),
        (b"not an array at all", "damaged or not .npz"),
    ],
)
def test_arrays_that_lie_are_not_believed(tmp_path: Path, header: bytes, message: str) -> None:
    npz_with_header(tmp_path / "w.npz", header, b"\0" * 8)
    with pytest.raises(CheckpointError) as error:
        read_weights(tmp_path / "w.npz")
    assert message in error.value.message


def test_npz_of_pickled_objects_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    np.savez(tmp_path / "w.npz", a=np.array([Harmful(mark)], dtype=object))
    with pytest.raises(CheckpointError):
        read_weights(tmp_path / "w.npz")
    assert not mark.exists()


# --- shards -------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number, name in enumerate(STATE, 1):
        save_file({name: STATE[name]}, tmp_path / f"model-{number}-of-2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    weight_map = {name: f"model-{number}-of-2.safetensors" for number, name in enumerate(STATE, 1)}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards_are_joined(shards: Path) -> None:
    weights = read_shards(shards)
    assert equal(weights.state)
    assert len(weights.files) == 3


def test_missing_shard_is_named(shards: Path) -> None:
    (shards.parent / "model-2-of-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard model-2-of-2\.safetensors is missing"):
        read_shards(shards)


def test_tensor_missing_from_its_shard_is_named(shards: Path) -> None:
    save_file({"other": torch.ones(1)}, shards.parent / "model-2-of-2.safetensors")
    with pytest.raises(CheckpointError, match=r"model-2-of-2\.safetensors lacks tensors it should hold: b"):
        read_shards(shards)


@pytest.mark.parametrize("shard", ["../out.safetensors", "/etc/out.safetensors", "w.h5", ""])
def test_shards_lie_in_the_same_folder(shards: Path, shard: str) -> None:
    shards.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="is not a weights file in the same folder"):
        read_shards(shards)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_index_without_a_map_is_refused(shards: Path, content: str) -> None:
    shards.write_text(content)
    with pytest.raises(CheckpointError, match="weight_map must map"):
        read_shards(shards)


# --- JSON -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b"nonsense"])
def test_what_is_not_json_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="is not JSON") as error:
        read_json(tmp_path / "config.json")
    assert "\n" not in error.value.message


def test_json_that_is_no_object_or_too_large(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="must hold a JSON object"):
        read_json(tmp_path / "config.json")
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(CheckpointError, match="too many for a configuration"):
        read_json(tmp_path / "config.json")
