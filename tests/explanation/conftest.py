"""Small random models of transformers, and the same ones read as references, in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor

from tests.helpers.checkpoints import TINY, opened
from vitdeploy.model.reference import Reference
from vitdeploy.model.registry import build_reference

SWIN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
CLIP: dict[str, Any] = {key: value for key, value in TINY.items() if key != "num_labels"}


class Pair(NamedTuple):
    """A model of transformers and our reference of its weights."""

    theirs: Any
    ours: Reference

    def attentions(self, pixels: Tensor) -> list[Tensor]:
        """Of each of their blocks, (windows, h, A, A); a Swin itself gives those of each stage's last."""
        found: list[Tensor] = []
        parts = [part for part in self.theirs.modules() if type(part).__name__ == "SwinAttention"]
        handles = [
            part.register_forward_hook(lambda _, __, output: found.append(output[1])) for part in parts
        ]
        with torch.no_grad():
            given = list(self.theirs(pixel_values=pixels, output_attentions=True).attentions)
        for handle in handles:
            handle.remove()
        return found or given


def _build(kind: str) -> Any:
    eager = {"attn_implementation": "eager"}
    if kind == "vit":
        return transformers.ViTForImageClassification(transformers.ViTConfig(**TINY, **eager))
    if kind == "deit":
        return transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**TINY, **eager))
    if kind == "clip":
        return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**CLIP, **eager))
    if kind == "swin":
        return transformers.SwinForImageClassification(transformers.SwinConfig(**SWIN, num_labels=4, **eager))
    raise ValueError(kind)


@pytest.fixture
def pair(tmp_path: Path) -> Callable[[str], Pair]:
    """``pair("vit")``: weights that make attention far from even."""

    def make(kind: str) -> Pair:
        torch.manual_seed(0)
        theirs = _build(kind).eval()
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "norm" not in name:
                    parameter.normal_(std=0.3)
        theirs.save_pretrained(tmp_path / kind)
        checkpoint = opened(str(tmp_path / kind))
        ours = build_reference(checkpoint.config, {k: v.double() for k, v in checkpoint.state.items()})
        return Pair(theirs.double(), ours)

    return make
