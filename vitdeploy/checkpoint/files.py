"""Read the tensors of a checkpoint file, trusting nothing in it: safetensors, ``.npz``, PyTorch's own.

No file is ever unpickled freely, and no size a file claims is believed before it is checked against the
bytes that are there.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitdeploy.bundle.files import sha256
from vitdeploy.checkpoint.documents import AGAIN, PERMISSIONS, read_json
from vitdeploy.checkpoint.refusals import some
from vitdeploy.errors import CheckpointError

SUFFIXES = (".safetensors", ".npz", ".pt", ".pth", ".bin", ".ckpt", ".tar", ".pkl")
"""Of files that may hold weights; which kind a file is, its first bytes say."""

# Weights hardly compress: what unpacks to far more than the file holds is no checkpoint.
_MAX_RATIO, _SLACK = 20, 64 * 2**20
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "teacher", "student")
"""Keys under which training scripts keep a state dict, the one to take first."""
_AVERAGE = re.compile(r"(^|_)(ema|swa|averaged?|shadow)(_|$)", re.IGNORECASE)
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_FOREIGN: Mapping[bytes, tuple[str, str]] = {
    b"version https://git-lfs": (
        "is a Git LFS pointer, not the weights that it stands for",
        "git lfs pull, or download the file itself",
    ),
    b"\x89HDF": (
        "is an HDF5 file of Keras or TensorFlow",
        "save the model as safetensors with the library that wrote it",
    ),
    b"GGUF": ("is a GGUF file, whose weights are quantised", "give the checkpoint that it was made from"),
    b"\x08": ("is no checkpoint; it may be an ONNX file", "give the checkpoint that it was made from"),
}
"""First bytes of files that are taken for weights: what they are, and what to do."""


@dataclass(frozen=True)
class Weights:
    """The tensors of one file, or of all shards."""

    state: Mapping[str, Tensor]
    files: Mapping[str, str]
    """File names to sha256."""
    notes: tuple[str, ...] = ()


def read_weights(path: Path, part: tuple[str, ...] = ()) -> Weights:
    """Read one weights file, of the kind that its first bytes say.

    Args:
        part: what the names begin with that are wanted; where some do, no others are read.

    Raises:
        CheckpointError: the file is missing, unreadable, damaged, unsafe, or of another kind.
    """
    try:
        if not path.stat().st_size:
            raise CheckpointError(f"{path} is empty", hint=AGAIN)
        with path.open("rb") as file:
            start = file.read(32)
        digest = sha256(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", hint=PERMISSIONS) from error
    notes: tuple[str, ...] = ()
    every: Collection[str]
    for first, (what, hint) in _FOREIGN.items():
        if start.startswith(first) and start[8:9] != b"{":
            raise CheckpointError(f"{path} {what}", hint=hint)
    suffix = path.suffix.lower()
    if suffix == ".safetensors" or start[8:9] == b"{":
        state, every = _read_safetensors(path, start, part)
    elif suffix == ".npz" or _is_npz(path, start):
        state = every = _read_npz(path)
    elif start.startswith((_ZIP, _PICKLE)):
        state, notes = _read_pickle(path, start)
        every = state
    else:
        raise CheckpointError(
            f"{path} is neither safetensors nor a PyTorch file nor .npz",
            hint="download or save it again, or give the file with the weights",
        )
    if not state:
        raise CheckpointError(f"{path} holds no tensors", hint="give the file with the weights")
    chosen = {name: state[name] for name in of_part(state, part)}
    return Weights(chosen, {path.name: digest}, (*notes, *_part_note(part, len(chosen), len(every))))


def of_part(names: Iterable[str], part: tuple[str, ...]) -> list[str]:
    """The names that begin so; all of them where none does, or nothing is asked for."""
    every = list(names)
    return [name for name in every if name.startswith(part)] or every if part else every


def _part_note(part: tuple[str, ...], chosen: int, every: int) -> tuple[str, ...]:
    """What to say where a part was read."""
    if chosen == every:
        return ()
    prefixes = " or ".join(map(repr, part))
    return (
        f"read: the {chosen} tensors whose names begin with {prefixes}; {every - chosen} others left out",
    )


def shards_of(index: Path, part: tuple[str, ...] = ()) -> dict[str, str]:
    """In which shard each tensor is, of those whose names begin so.

    Args:
        index: a ``model.safetensors.index.json`` or ``pytorch_model.bin.index.json``.

    Raises:
        CheckpointError: the index is malformed.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names", hint=AGAIN)
    return {name: weight_map[name] for name in of_part(weight_map, part)}


def _shards_note(index: Path, chosen: Mapping[str, str], part: tuple[str, ...]) -> tuple[str, ...]:
    every = shards_of(index)
    needed, there = len(set(chosen.values())), len(set(every.values()))
    unopened = (f"{there - needed} of {there} shards are not needed",) if needed < there else ()
    return (*_part_note(part, len(chosen), len(every)), *unopened)


def read_shards(index: Path, part: tuple[str, ...] = ()) -> Weights:
    """Read every shard that an index lists, see :func:`shards_of`.

    Args:
        part: what the names begin with that are wanted; shards without them are not opened.

    Raises:
        CheckpointError: the index is malformed, or a shard is missing, damaged or lacks a tensor.
    """
    weight_map = shards_of(index, part)
    state: dict[str, Tensor] = {}
    files = {index.name: sha256(index)}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not file.endswith((".safetensors", ".bin")):
            raise CheckpointError(
                f"{index}: shard {file!r} is not a weights file in the same folder",
                hint=AGAIN,
            )
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index}: shard {file} is missing", hint=AGAIN)
        shard = read_weights(index.parent / file, part)
        absent = sorted(name for name, home in weight_map.items() if home == file and name not in shard.state)
        if absent:
            raise CheckpointError(
                f"{index}: {file} lacks tensors it should hold: {some(absent, 3)}",
                hint=AGAIN,
            )
        state |= shard.state
        files |= shard.files
    return Weights(state, files, _shards_note(index, weight_map, part))


def _read_safetensors(
    path: Path, start: bytes, part: tuple[str, ...]
) -> tuple[dict[str, Tensor], Collection[str]]:
    """The tensors of a part, and the names of all."""
    # A header may well be 128 bytes long, and then starts like a pickle; but its JSON follows.
    if start.startswith((_ZIP, _PICKLE)) and start[8:9] != b"{":
        raise CheckpointError(
            f"{path} is a pickle or a zip file, not safetensors, whatever its name says",
            hint="give it its own suffix (.pt), or save it as safetensors",
        )
    header = int.from_bytes(start[:8], "little")
    size = path.stat().st_size
    if len(start) < 8 or header > size - 8:
        raise CheckpointError(
            f"{path} is truncated or not safetensors: its header claims {header} bytes, the file has {size}",
            hint=AGAIN,
        )
    try:
        with safe_open(path, framework="pt") as file:
            every = list(file.keys())
            return {name: file.get_tensor(name) for name in of_part(every, part)}, every
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged or not safetensors: {_line(error)}", hint=AGAIN) from error


def _is_npz(path: Path, start: bytes) -> bool:
    if not start.startswith(_ZIP):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return False


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            _check_unpacked(path, archive)
            for member in archive.infolist():
                with archive.open(member) as file:
                    _check_npy(file, member.file_size, f"{path}: {member.filename}")
        with np.load(path, allow_pickle=False) as arrays:
            # Copied in native byte order; torch knows no other.
            return {name: torch.from_numpy(_native(arrays[name])) for name in arrays.files}
    except CheckpointError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise almost anything on damaged bytes
        raise CheckpointError(f"{path} is damaged or not .npz: {_line(error)}", hint=AGAIN) from error


def _check_unpacked(path: Path, archive: zipfile.ZipFile) -> None:
    total = sum(member.file_size for member in archive.infolist())
    if total > _MAX_RATIO * path.stat().st_size + _SLACK:
        raise CheckpointError(f"{path} would unpack to {total} bytes; that is no checkpoint", hint=AGAIN)


def _check_npy(file: IO[bytes], size: int, where: str) -> None:
    """Refuse an array whose header promises more than its bytes, before numpy allocates for it."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise CheckpointError(
            f"{where}: npy version {version} is not supported",
            hint="save it as safetensors, or with a recent numpy",
        )
    shape, _, dtype = readers[version](file)
    if dtype.kind not in "fiub":
        raise CheckpointError(
            f"{where}: arrays of {dtype} are not supported", hint="save the weights as floating-point arrays"
        )
    if math.prod(shape) * dtype.itemsize > size:
        raise CheckpointError(f"{where}: shape {shape} needs more than its {size} bytes", hint=AGAIN)


def _native(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")


def _read_pickle(path: Path, start: bytes) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    try:
        if start.startswith(_ZIP):
            with zipfile.ZipFile(path) as archive:
                _check_unpacked(path, archive)
                if any("/code/" in name for name in archive.namelist()):
                    raise CheckpointError(
                        f"{path} is TorchScript, a compiled model",
                        hint='torch.save(torch.jit.load(FILE).state_dict(), "weights.pt"), then give that',
                    )
        with (
            warnings.catch_warnings(
                action="ignore"
            ),  # about odd pickles; the error says it, or there is none
            torch.serialization.safe_globals([argparse.Namespace]),  # a training script's arguments
        ):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch.load raises almost anything on damaged bytes
        if isinstance(error, pickle.UnpicklingError) and "unsupported" in str(error).lower():
            raise CheckpointError(
                f"{path} holds more than tensors (a pickled model or training state): loading could run code",
                hint='where you trust it: torch.save(model.state_dict(), "weights.pt"), then give that file',
            ) from error
        raise CheckpointError(
            f"{path} is damaged or not a PyTorch file: {_line(error)}", hint=AGAIN
        ) from error
    if (way := _way(content, set())) is None:
        keys = f"keys {', '.join(map(str, list(content)[:5]))}" if isinstance(content, Mapping) else "no dict"
        raise CheckpointError(
            f"{path} holds no state dict ({keys})", hint=f"known wrappers: {', '.join(_WRAPPERS)}"
        )
    notes = []
    for taken in way:
        others = [key for key in _wrappers(content) if key != taken and _way(content[key], set()) is not None]
        beside = f", not from {', '.join(map(repr, others))} beside it" if others else ""
        notes.append(f"weights taken from {taken!r} of {path.name}{beside}")
        content = content[taken]
    state = {name: tensor.detach() for name, tensor in content.items() if isinstance(tensor, Tensor)}
    return state, tuple(notes)


def is_average(name: str) -> bool:
    """Whether a key means an average of the weights over the training, which is what is deployed.

    As timm's loader, which takes ``state_dict_ema`` and ``model_ema`` first.
    """
    return _AVERAGE.search(name) is not None


def _way(content: object, seen: set[int]) -> tuple[str, ...] | None:
    """The keys that lead to the state dict to take; None where none do.

    Args:
        seen: the mappings on the way, which a damaged file may lead back to.
    """
    if _is_state(content):
        return ()
    if not isinstance(content, Mapping) or id(content) in seen:
        return None
    seen.add(id(content))
    ways = ((key, _way(content[key], seen)) for key in _wrappers(content))
    return next(((key, *way) for key, way in ways if way is not None), None)


def _wrappers(content: Mapping[Any, Any]) -> list[str]:
    """The keys that may lead to a state dict, the one to follow first: known ones, else the only one."""
    averages = [key for key in content if isinstance(key, str) and is_average(key)]
    known = [key for key in (*averages, *_WRAPPERS) if isinstance(content.get(key), Mapping)]
    if known:
        return known
    states = [key for key, value in content.items() if isinstance(key, str) and _is_state(value)]
    return states if len(states) == 1 else []


def _is_state(content: object) -> bool:
    """A mapping of names to tensors; counters and the like may stand between them."""
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        return False
    return sum(isinstance(value, Tensor) for value in content.values()) > len(content) // 2


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " ..."
