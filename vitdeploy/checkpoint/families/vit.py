"""transformers' ``vit``: ViTForImageClassification, and ViTModel without a head."""

from __future__ import annotations

from vitdeploy.checkpoint.families import huggingface
from vitdeploy.checkpoint.families.base import Family, Foreign, Layout, Reading, linear
from vitdeploy.checkpoint.families.positions import PositionRule
from vitdeploy.config import ViTConfig

_LAYOUT: Layout = {**huggingface.EMBEDDINGS, **huggingface.VIT_BLOCK, **linear("head", "classifier")}


def _claims(foreign: Foreign) -> bool:
    other = ("distillation_token", "layer_scale1.lambda1")
    return huggingface.claims(foreign, "vit", not any(name.endswith(other) for name in foreign.state))


def _read(foreign: Foreign, template: ViTConfig | None) -> Reading:
    state, originals = huggingface.file_names(foreign, "vit", vit_mlp=True)
    config = huggingface.config_of(foreign, template, _LAYOUT, state, norm_eps=1e-12)
    return huggingface.reading(
        foreign,
        config,
        model_type="vit",
        layout=_LAYOUT,
        state=state,
        originals=originals,
        headless=("classifier.", "decoder."),
    )


FAMILY = Family("vit", _claims, _read, PositionRule(square_source=True))
