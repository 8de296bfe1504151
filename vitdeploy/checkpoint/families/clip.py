"""transformers' ``clip`` and ``clip_vision_model``: the image tower of CLIP.

Radford et al. 2021 (https://arxiv.org/abs/2103.00020). Tokens stay as the last block left them, the final
norm works on the pooled CLS token; the embedding is that one projected. ``CLIPForImageClassification`` reads
the mean of the patches, without a norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitdeploy.checkpoint.families import image_text
from vitdeploy.checkpoint.families.base import (
    Family,
    Foreign,
    Layout,
    Reading,
    Source,
    config_integer,
    linear,
)
from vitdeploy.checkpoint.families.positions import PositionRule
from vitdeploy.config import ViTConfig

MODEL_TYPES = ("clip", "clip_vision_model")

_PROJECTION = "visual_projection.weight"
_LAYOUT: Layout = {
    **image_text.TOWER,
    "cls_token": Source("embeddings.class_embedding"),
    **linear("pre_norm", "pre_layrnorm"),
    "projection.weight": Source(_PROJECTION),
}


def _claims(foreign: Foreign) -> bool:
    if foreign.config is not None and "model_type" in foreign.config:
        return foreign.config["model_type"] in MODEL_TYPES
    names = {name.removeprefix(f"{image_text.PREFIX}.") for name in foreign.state}
    return {"embeddings.class_embedding", "pre_layrnorm.weight"} <= names


def _projection(config: Mapping[str, object], state: Mapping[str, Tensor]) -> int:
    """Columns of the embedding; of a model that should project and does not, as many as it states."""
    projection = state.get(_PROJECTION)
    if projection is not None and projection.ndim:
        return projection.shape[0]
    kind = str(config.get("architectures"))
    return config_integer(config, "projection_dim", 512) if "CLIPModel" in kind or "Projection" in kind else 0


def _read(foreign: Foreign, template: ViTConfig | None) -> Reading:
    fields: dict[str, Any] = {"patch_bias": False, "pre_norm": True, "norm_eps": 1e-5}
    zero_shot = image_text.is_zero_shot(foreign)
    if image_text.has_classifier(foreign) and not zero_shot:
        fields |= {"pool": "mean", "final_norm": "none"}
        ignored = {r"post_layernorm\.(weight|bias)": None}
    else:
        projection = _projection(foreign.config or {}, foreign.state)
        fields |= {"pool": "cls", "final_norm": "pooled", "projection": projection}
        fields |= {"head_on": "embedding"} if zero_shot else {}
        ignored = {}
    return image_text.read(
        foreign,
        template,
        model_type="clip",
        layout=_LAYOUT,
        patch_size=32,
        hidden_act="quick_gelu",
        ignored=ignored,
        **fields,
    )


FAMILY = Family("clip", _claims, _read, PositionRule(square_source=True))
