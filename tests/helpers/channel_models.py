"""Models of one channel and of four, as transformers saves them, and what transformers computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from tests.helpers.commands import in_a_process
from tests.helpers.exports import Exported, Exports

SIZE = (32, 48)
MEAN, STD = (0.4, 0.5, 0.6, 0.3), (0.2, 0.25, 0.3, 0.35)
"""The first of these for a model of one channel."""
Array = np.ndarray[Any, Any]


def save_model(folder: Path, channels: int) -> None:
    """A model whose every parameter matters, saved with its processor as a user would."""
    torch.manual_seed(channels)
    config = transformers.ViTConfig(
        image_size=list(SIZE),
        patch_size=16,
        num_channels=channels,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        num_labels=6,
    )
    model = transformers.ViTForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    transformers.ViTImageProcessorPil(
        size={"height": SIZE[0], "width": SIZE[1]},
        image_mean=list(MEAN[:channels]),
        image_std=list(STD[:channels]),
    ).save_pretrained(folder)


def exported(exports: Exports, channels: int, *flags: str) -> Exported:
    """The bundle of ``save_model``, whose folder lies beside it."""

    def make(bundle: Path) -> Any:
        model = bundle.parent / "model"
        save_model(model, channels)
        return in_a_process("export", "-m", model, "--format", "onnx", *flags, "-o", bundle)

    return exports.get(f"{channels} channels {' '.join(flags)}", make)


def expected_logits(bundle: Path, pixel_values: Array) -> Array:
    """What transformers' own model gives for (N, C, H, W), in float64."""
    model = transformers.ViTForImageClassification.from_pretrained(
        bundle.parent / "model", attn_implementation="eager"
    )
    with torch.inference_mode():
        logits: Array = model.double().eval()(torch.from_numpy(pixel_values).double()).logits.numpy()
    return logits


def expected_pixels(bundle: Path, *grey: Image.Image) -> Array:
    """What transformers' own processor makes of images of mode L."""
    processor = transformers.ViTImageProcessorPil.from_pretrained(bundle.parent / "model")
    pixels: Array = np.stack([processor(image, return_tensors="np")["pixel_values"][0] for image in grey])
    return pixels


def normalised(images: Array) -> Array:
    """Images (N, H, W, C) uint8 as the model reads them: (N, C, H, W) float64."""
    channels = images.shape[-1]
    values: Array = (images / 255 - np.array(MEAN[:channels])) / np.array(STD[:channels])
    return values.transpose(0, 3, 1, 2)
