"""What is served: bundles, the requests of each kind, and the right answers to them."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import vitdeploy
from benchmarks.peers.environments import ROOT
from vitdeploy.backends.base import Array
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import Artifact
from vitdeploy.machine.child import child_environment

KINDS = ("tensor", "image")
"""Preprocessed pixels, or image files."""
WORK = ROOT / "build" / "serving"
DIGITS = ROOT / "vitdeploy" / "data" / "digits" / "images"
_PHOTOGRAPHS = 16
_CALIBRATION = 48
"""Photographs that int8 is calibrated and proven with."""
_BUDGET = "60s"
"""For the measurements of ``vitdeploy optimize``."""
_PHOTOGRAPH = (427, 640)
"""Height and width: what many photographs on the web have."""


@dataclass(frozen=True)
class Subject:
    """A bundle that is served, with requests."""

    name: str
    bundle: Bundle
    artifact: Artifact
    """The one that is run."""
    pixels: Array
    """(K, ...) golden inputs."""
    reference: Array
    """(K, classes) what they give in float64."""
    images: tuple[bytes, ...] = ()
    """JPEG files."""
    classes: tuple[int, ...] = ()
    """The likeliest class of each image, from the predictor in this process."""

    @property
    def input(self) -> str:
        return "pixel_values"

    @property
    def output(self) -> str:
        return self.bundle.manifest.output


def prepare(name: str, folder: Path = WORK) -> Subject:
    """Export a model, always anew, and make its requests."""
    folder.mkdir(parents=True, exist_ok=True)
    bundle = vitdeploy.export(name, folder / f"{name}.bundle", format="onnx", force=True)
    images = tuple(_digits() if name == "digits" else _photographs(_PHOTOGRAPHS))
    with vitdeploy.load(bundle, backend="onnxruntime") as predictor:
        classes = tuple(best[0].index for best in predictor.predict(images, top_k=1))
    (artifact,) = bundle.manifest.artifacts
    golden = bundle.golden(artifact)
    return Subject(name, bundle, artifact, golden["pixel_values"], golden["reference"], images, classes)


def prepare_optimized(name: str, folder: Path = WORK) -> Subject:
    """What ``vitdeploy optimize`` picks for throughput of a model, int8 among the contestants.

    The bundle is made once; remove it to have it made anew. It takes tensors only here.

    Raises:
        CalledProcessError: it cannot be made.
    """
    root, calibration = folder / f"{name}.optimized.bundle", folder / "calibration"
    if not root.is_dir():
        calibration.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(_photographs(_CALIBRATION)):
            (calibration / f"{index:02}.jpg").write_bytes(image)
        words = ["-m", name, "-o", str(root), "--goal", "throughput", "--calibration", str(calibration)]
        command = [sys.executable, "-P", "-m", "vitdeploy", "optimize", *words, "--budget", _BUDGET]
        subprocess.run(command, env={**os.environ, **child_environment()}, capture_output=True, check=True)
    bundle = Bundle.open(root)
    picked = next(choice for choice in bundle.manifest.choices if choice.goal == "throughput")
    artifact = bundle.artifact(str(picked.artifact))
    golden = bundle.golden(artifact)
    return Subject(name, bundle, artifact, golden["pixel_values"], golden["reference"])


def _digits() -> list[bytes]:
    """The model's own images, as JPEG."""
    return [_jpeg(Image.open(path)) for path in sorted(DIGITS.iterdir()) if path.suffix in (".png", ".jpg")]


def _photographs(count: int) -> list[bytes]:
    """Images whose decoding costs what a photograph's does: smooth shapes, edges, and some grain."""
    random = np.random.default_rng(0)
    height, width = _PHOTOGRAPH
    found = []
    for _ in range(count):
        shapes = Image.fromarray(random.integers(0, 256, (12, 18, 3), dtype=np.uint8))
        smooth = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        blocks = Image.fromarray(random.integers(0, 60, (27, 40, 3), dtype=np.uint8))
        edges = np.asarray(blocks.resize((width, height), Image.Resampling.NEAREST), np.int16)
        grain = random.integers(-8, 9, (height, width, 1), dtype=np.int16)
        found.append(_jpeg(Image.fromarray(np.clip(smooth + edges + grain, 0, 255).astype(np.uint8))))
    return found


def _jpeg(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "JPEG", quality=85)
    return stream.getvalue()


@dataclass(frozen=True)
class Asked:
    """How a server is asked for one kind of thing."""

    path: str
    headers: Mapping[str, str]
    bodies: Sequence[bytes]


def binary_v2(subject: Subject, path: str) -> Asked:
    """Tensors as the Open Inference Protocol's binary extension has them, one image in a request."""
    bodies, head = list[bytes](), b""
    for row in subject.pixels:
        data = row.tobytes()
        tensor = {
            "name": subject.input,
            "shape": [1, *row.shape],
            "datatype": {"float32": "FP32", "uint8": "UINT8"}[row.dtype.name],
            "parameters": {"binary_data_size": len(data)},
        }
        output = {"name": subject.output, "parameters": {"binary_data": True}}
        head = json.dumps({"inputs": [tensor], "outputs": [output]}).encode()
        bodies.append(head + data)
    return Asked(path, {"Inference-Header-Content-Length": str(len(head))}, bodies)


def raw_bytes(bodies: Sequence[bytes], path: str, kind: str) -> Asked:
    """Bytes as they are."""
    return Asked(path, {"Content-Type": kind}, bodies)


def in_json(bodies: Sequence[bytes], path: str, key: str) -> Asked:
    """Base64 in a JSON object."""
    texts = [json.dumps({key: base64.b64encode(body).decode()}).encode() for body in bodies]
    return Asked(path, {"Content-Type": "application/json"}, texts)


def logits_of(answer: bytes, headers: Mapping[str, str], output: str) -> Array | None:
    """The logits of one image in a server's answer; None where it has labels instead."""
    length = headers.get("Inference-Header-Content-Length")
    if length is not None:
        return np.frombuffer(answer[int(length) :], "<f4")
    document: dict[str, Any] = json.loads(answer)
    return np.array(document[output], np.float64) if output in document else None


def class_of(answer: bytes) -> int:
    """The likeliest class in a server's answer about an image."""
    document = json.loads(answer)
    if "predictions" in document:
        return int(document["predictions"][0][0]["index"])
    if "indices" in document:
        return int(document["indices"][0])
    (logits,) = (value for value in document.values() if isinstance(value, list))
    return int(np.argmax(logits))
