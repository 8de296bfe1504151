"""Bundles that earlier versions wrote open, verify, run, and are served.

``tests/oracles/record_bundle.py`` records them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from safetensors.numpy import load_file

import vitdeploy
from tests.helpers.commands import in_a_process
from tests.helpers.live_server import serving
from tests.helpers.paths import ORACLES
from vitdeploy.bundle.folder import Bundle

pytestmark = pytest.mark.parametrize(
    "folder", sorted((ORACLES / "bundles").iterdir()), ids=lambda folder: folder.name
)
LABELS = ("cat", "dog", "owl")


def softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def raw_image(folder: Path) -> tuple[Image.Image, np.ndarray[Any, Any]]:
    """A raw image of the bundle, and its probabilities by ONNX Runtime alone."""
    golden = load_file(folder / "golden.safetensors")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"pixel_values": golden["image.0.pixel_values"][None]})
    return Image.fromarray(golden["image.0"]), softmax(np.asarray(logits)[0])


def test_it_opens(folder: Path) -> None:
    manifest = Bundle.open(folder).manifest
    assert manifest.labels == LABELS
    assert [(a.name, a.path, a.precision) for a in manifest.artifacts] == [
        ("onnx-fp32", "model.onnx", "fp32")
    ]
    assert manifest.model is not None
    assert manifest.model.image_size == (16, 16)


def test_it_verifies(folder: Path) -> None:
    report = vitdeploy.verify(folder, backends=["onnxruntime"])
    assert report.passed
    assert [record.batch for record in report.parity] == [1, 2, 4]


def test_it_predicts(folder: Path) -> None:
    image, probabilities = raw_image(folder)
    with vitdeploy.load(folder, backend="onnxruntime") as model:
        (found,) = model.predict(image)
    assert {one.label: one.score for one in found} == pytest.approx(
        dict(zip(LABELS, probabilities.tolist(), strict=True)), abs=1e-6
    )


def test_it_is_served(folder: Path, tmp_path: Path) -> None:
    image, probabilities = raw_image(folder)
    path = tmp_path / "image.png"
    image.save(path)
    with serving(f"tiny={folder}") as server:
        reply = server.ask("POST", "/v1/models/tiny:predict", path.read_bytes())
    assert reply.status == 200
    (best, *_) = reply.document["predictions"][0]
    assert best["label"] == LABELS[probabilities.argmax()]
    assert best["score"] == pytest.approx(probabilities.max(), abs=1e-6)


@pytest.mark.slow
def test_it_is_inspected(folder: Path) -> None:
    document = in_a_process("inspect", folder, "--json").document
    assert document["ok"] is True
    recorded = json.loads((folder / "manifest.json").read_text())
    assert {key: document["manifest"][key] for key in ("digest", "files", "labels", "parity")} == {
        key: recorded[key] for key in ("digest", "files", "labels", "parity")
    }
    shown = in_a_process("inspect", folder)
    assert shown.code == 0
    assert "cat, dog, owl" in shown.out
