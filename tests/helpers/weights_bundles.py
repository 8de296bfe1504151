"""Bundles of weights without an exported file, for backends that build the model themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.helpers.models import CONFIGS, pixels, random_state, random_vit
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.bundle.folder import WEIGHTS, Bundle, BundleWriter
from vitdeploy.bundle.manifest import Artifact, Manifest, Provenance, TensorSpec
from vitdeploy.config import BatchRange, Preprocess, ViTConfig
from vitdeploy.model.reference import forward_float64

CONFIG = CONFIGS["vit"]
SPEC = Preprocess(size=CONFIG.image_size, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def write_weights(
    folder: Path, config: ViTConfig = CONFIG, state: dict[str, torch.Tensor] | None = None, **manifest: Any
) -> Bundle:
    """A bundle with weights and without any artifact."""
    with BundleWriter(folder, force=True) as writer:
        save_file(random_state(config) if state is None else state, writer.file(WEIGHTS))
        fields: dict[str, Any] = {"model": config, "output": config.outputs[0], "preprocess": SPEC}
        writer.seal(
            Manifest(
                name="tiny",
                created="2026-11-21T03:00:00Z",
                generator="vitdeploy 0.1.0",
                provenance=Provenance(source="tiny", family="vit"),
                **(fields | manifest),
            )
        )
        return writer.commit()


def artifact(precision: ArtifactPrecision) -> Artifact:
    """Something exported in this precision; its file is never opened."""
    height, width = CONFIG.image_size
    return Artifact(
        name=f"onnx-{precision}",
        format="onnx",
        precision=precision,
        requested=precision,
        path="model.onnx",
        files=("model.onnx",),
        batch=BatchRange(1, 2, 4),
        inputs=(TensorSpec(name="pixel_values", dtype="float32", shape=("N", 3, height, width)),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("N", 10)),),
    )


def golden(
    config: ViTConfig = CONFIG, output: str | None = None, others: Sequence[str] = (), count: int = 5
) -> dict[str, np.ndarray[Any, Any]]:
    """``count`` inputs, and the reference's answers for an output and for ``others`` beside it."""
    images, vit = pixels(config, count), random_vit(config)
    wanted = {"reference": output} | {f"reference.{other}": other for other in others}
    answers = {key: forward_float64(vit, images, name).numpy() for key, name in wanted.items()}
    return {"pixel_values": images.numpy(), **answers}
