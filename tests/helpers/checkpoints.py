"""Checkpoints to open and to spoil."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitdeploy.checkpoint.opening import Checkpoint, open_model
from vitdeploy.data import digits_folder
from vitdeploy.errors import CheckpointError
from vitdeploy.model.registry import expected_shapes

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 4,
}


_TRANSFORMERS = {
    "blocks.": "vit.encoder.layer.",
    "attn.q.": "attention.attention.query.",
    "attn.k.": "attention.attention.key.",
    "attn.v.": "attention.attention.value.",
    "attn.proj.": "attention.output.dense.",
    "mlp.fc1.": "intermediate.dense.",
    "mlp.fc2.": "output.dense.",
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "norm.": "vit.layernorm.",
    "head.": "classifier.",
    "patch_embed.": "vit.embeddings.patch_embeddings.projection.",
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
}
"""Names of the digits model's tensors, and what transformers' files call them."""


def save_tiny(folder: Path) -> Path:
    """What ``save_pretrained`` of a model of transformers and of its processor write."""
    torch.manual_seed(0)
    transformers.ViTForImageClassification(transformers.ViTConfig(**TINY)).save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_digits(folder: Path) -> None:
    """The trained digits model, as transformers saves one that was fine-tuned, with its labels in words."""
    state = load_file(digits_folder() / "model.safetensors")
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    config = transformers.ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=192,
        layer_norm_eps=1e-6,
        id2label=dict(enumerate(words)),
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    theirs = load_file(folder / "model.safetensors")
    for name, tensor in state.items():
        for ours, written in _TRANSFORMERS.items():
            name = name.replace(ours, written)
        theirs[name].copy_(tensor.reshape(theirs[name].shape))
    save_file(theirs, folder / "model.safetensors", metadata={"format": "pt"})
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def opened(name: str | None = None, **keywords: Any) -> Checkpoint:
    checkpoint = open_model(name, **keywords)
    assert isinstance(checkpoint, Checkpoint)
    assert {name: tuple(t.shape) for name, t in checkpoint.state.items()} == expected_shapes(
        checkpoint.config
    )
    assert checkpoint.preprocess.size == checkpoint.config.image_size
    return checkpoint


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def refusal(name: str | None = None, **keywords: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as error:
        open_model(name, **keywords)
    assert "\n" not in error.value.message
    return error.value
