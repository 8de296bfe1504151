"""Bundles of a model of any kind and random weights, whose ONNX file only stands for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.small_bundles import draft
from vitdeploy.bundle.folder import WEIGHTS, Bundle, BundleWriter
from vitdeploy.bundle.manifest import Artifact, input_spec, output_specs
from vitdeploy.checkpoint.opening import random_state
from vitdeploy.config import BatchRange, ModelConfig, Preprocess
from vitdeploy.data import digits_images
from vitdeploy.model.registry import build_reference


def model_bundle(folder: Path, config: ModelConfig, seed: int = 1, **fields: Any) -> Bundle:
    """Of float32 weights, with an ONNX artifact whose file no program could read."""
    outputs = fields.setdefault("outputs", (fields.get("output", "logits"),))
    artifact = Artifact(
        name="onnx-fp32",
        format="onnx",
        precision="fp32",
        requested="fp32",
        path="model.onnx",
        files=("model.onnx",),
        batch=BatchRange(),
        inputs=(input_spec(config, fields.get("input", "float")),),
        outputs=output_specs(config, outputs),
    )
    fields = {"preprocess": Preprocess(size=config.image_size), "artifacts": (artifact,), **fields}
    with BundleWriter(folder) as writer:
        for artifact in fields["artifacts"]:
            writer.file(artifact.path).write_bytes(b"an ONNX file of the model")
        save_file(lively_state(config, seed), writer.file(WEIGHTS))
        writer.seal(draft("some-model", model=config, **fields))
        return writer.commit()


def lively_state(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Random weights whose logits differ from image to image."""
    state = random_state(config, seed)
    return {
        name: tensor * (30 if "head" in name else 3) if tensor.ndim > 1 else tensor
        for name, tensor in state.items()
    }


def logits(config: ModelConfig, pixels: Tensor, seed: int = 1) -> Tensor:
    """The float64 reference's."""
    state = {name: tensor.double() for name, tensor in lively_state(config, seed).items()}
    found: Tensor = build_reference(config, state)(pixels.double(), "logits")
    return found


def photographs() -> list[Image.Image]:
    """Photographs that libraries carry, landscape and portrait, and a digit, which is small."""
    return [Image.open(path).convert("RGB") for path in (*photograph_files(), digits_images()[0])]


def photograph_files() -> list[Path]:
    """Three JPEG files, of scikit-learn and of Matplotlib."""
    import matplotlib
    from sklearn import datasets

    images = Path(datasets.__file__).parent / "images"
    sample = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return [images / "china.jpg", images / "flower.jpg", sample]


def random_pixels(config: ModelConfig) -> Tensor:
    """(2, 3, H, W), the same each time."""
    return torch.randn(2, 3, *config.image_size, generator=torch.Generator().manual_seed(4))
