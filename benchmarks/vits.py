"""Checkpoints to measure with: ViTs of transformers with random weights, saved as its users save theirs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

Size = tuple[int, int, int]
"""Width, depth and heads."""

SIZES: Mapping[str, Size] = MappingProxyType(
    {
        "vit_tiny_patch16_224": (192, 12, 3),
        "vit_base_patch16_224": (768, 12, 12),
        "vit_large_patch16_224": (1024, 24, 16),
    }
)
SMALL: Size = (64, 2, 2)
"""To find out whether a suite runs, not how fast."""
CLASSES = 1000
PREPROCESSING: Mapping[str, Any] = MappingProxyType(
    {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 224, "width": 224},
        "resample": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "rescale_factor": 1 / 255,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
    }
)


def save_vit(size: Size, folder: Path) -> Path:
    """Save a checkpoint of that size and seed 0 into a folder; returns the folder."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    width, depth, heads = size
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        id2label={i: f"class {i}" for i in range(CLASSES)},
    )
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(folder)
    text = json.dumps(dict(PREPROCESSING), indent=2)
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
    return folder
