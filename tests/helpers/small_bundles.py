"""Bundles of a few bytes, for tests of the folder itself: nothing in them runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from vitdeploy.bundle.folder import GOLDEN, Bundle, BundleWriter
from vitdeploy.bundle.manifest import Artifact, Manifest, Provenance, TensorSpec
from vitdeploy.config import BatchRange

ARRAYS = {"pixel_values": np.arange(12, dtype=np.float32).reshape(2, 6), "reference": np.eye(2)}


def draft(name: str = "tiny", **fields: Any) -> Manifest:
    provenance = Provenance(source="tiny", family="vit")
    return Manifest(
        name=name,
        created="2026-11-21T03:00:00Z",
        generator="vitdeploy 0.1.0",
        provenance=provenance,
        **fields,
    )


def artifact(name: str, path: str, precision: str = "fp32", requested: str = "fp32") -> Artifact:
    return Artifact(
        name=name,
        format="onnx",
        precision=precision,
        requested=requested,
        path=path,
        files=(path,),
        batch=BatchRange(),
        inputs=(TensorSpec(name="pixel_values", dtype="float32", shape=("N", 6)),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("N", 2)),),
    )


def write_small(target: Path, name: str = "tiny", *, force: bool = False) -> Bundle:
    """A bundle whose files all carry its name."""
    with BundleWriter(target, force=force) as writer:
        writer.file("model.onnx").write_bytes(name.encode() * 100)
        writer.file("engines/sm_90/model.plan").write_bytes(name.encode() * 50)
        save_file(ARRAYS, writer.file(GOLDEN))
        writer.seal(draft(name, artifacts=(artifact("onnx-fp32", "model.onnx"),)))
        return writer.commit()


def siblings(target: Path) -> list[str]:
    return sorted(entry.name for entry in target.parent.iterdir())


def flip(path: Path, position: int, bit: int) -> None:
    """Change one bit of a file; a negative position counts from its end."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)
