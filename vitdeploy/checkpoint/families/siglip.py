"""transformers' ``siglip`` and ``siglip_vision_model``: the image tower of SigLIP.

Zhai et al. 2023 (https://arxiv.org/abs/2303.15343); SigLIP 2 (Tschannen et al. 2025,
https://arxiv.org/abs/2502.14786), where its images are of one size. No CLS token: a learned probe attends to
all tokens. ``SiglipForImageClassification`` reads their mean instead.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vitdeploy.checkpoint.families import image_text
from vitdeploy.checkpoint.families.base import (
    Family,
    Foreign,
    Layout,
    Reading,
    Source,
    flat,
    linear,
    merged_qkv,
)
from vitdeploy.checkpoint.families.positions import PositionRule
from vitdeploy.config import ViTConfig
from vitdeploy.errors import CheckpointError

MODEL_TYPES = ("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model")

_PATCHES = "embeddings.patch_embedding.weight"
_LAYOUT: Layout = {
    **image_text.TOWER,
    "patch_embed.bias": Source("embeddings.patch_embedding.bias"),
    "probe_pool.probe": Source("head.probe", flat(1)),
    **merged_qkv("head.attention.in_proj_weight", "head.attention.in_proj_bias", "probe_pool"),
    **linear("probe_pool.proj", "head.attention.out_proj"),
    **linear("probe_pool.norm", "head.layernorm"),
    **linear("probe_pool.mlp.fc1", "head.mlp.fc1"),
    **linear("probe_pool.mlp.fc2", "head.mlp.fc2"),
}


def _claims(foreign: Foreign) -> bool:
    if foreign.config is not None and "model_type" in foreign.config:
        return foreign.config["model_type"] in MODEL_TYPES
    names = {name.removeprefix(f"{image_text.PREFIX}.") for name in foreign.state}
    return {_PATCHES, "head.probe"} <= names


def _read(foreign: Foreign, template: ViTConfig | None) -> Reading:
    tower = image_text.tower_config(foreign.config or {})
    weight = foreign.state.get(f"{image_text.PREFIX}.{_PATCHES}", foreign.state.get(_PATCHES))
    if "num_patches" in tower or (weight is not None and weight.ndim == 2):
        raise CheckpointError(
            f"{foreign.source}: SigLIP 2 NaFlex, which reads images of any shape as lists of patches, is not "
            "supported",
            hint="give a SigLIP 2 of fixed size, such as google/siglip2-base-patch16-224",
        )
    fields: dict[str, Any] = {"cls_token": False, "position_prefix": 0, "norm_eps": 1e-6, "pool": "probe"}
    ignored: dict[str, str | None] = {}
    if image_text.is_zero_shot(foreign):
        fields["head_on"] = "embedding"
    elif image_text.has_classifier(foreign):
        fields["pool"] = "mean"
        ignored[r"head\..*"] = (
            "the pooling by attention is left out: the classifier reads the mean of the tokens"
        )
    elif tower.get("vision_use_head") is False:
        fields["pool"] = "mean"
    reading = image_text.read(
        foreign,
        template,
        model_type="siglip",
        layout=_LAYOUT,
        patch_size=16,
        hidden_act="gelu_pytorch_tanh",
        ignored=ignored,
        **fields,
    )
    if not reading.config.classes and fields["pool"] == "mean":
        note = "the model does not pool (vision_use_head is false): features are the mean of its tokens"
        return replace(reading, notes=(*reading.notes, note))
    return reading


FAMILY = Family("siglip", _claims, _read, PositionRule(square_source=True))
