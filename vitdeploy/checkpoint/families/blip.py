"""The vision tower of transformers' ``blip``: alone, or out of any model that has it beside its text model.

Li et al. 2022 (https://arxiv.org/abs/2201.12086): a ViT whose CLS goes through the final norm twice.
BlipModel projects that vector to its embedding.
"""

from __future__ import annotations

from dataclasses import replace

from vitdeploy.checkpoint.families import huggingface
from vitdeploy.checkpoint.families.base import (
    Family,
    Foreign,
    Layout,
    Reading,
    Source,
    config_object,
    flat,
    linear,
    merged_qkv,
    rename_tensors,
)
from vitdeploy.checkpoint.families.image_text import PREFIX
from vitdeploy.checkpoint.families.positions import PositionRule
from vitdeploy.config import ViTConfig

MODEL_TYPES = ("blip", "blip_vision_model")

_BLOCK = "encoder.layers.{i}"
_LAYOUT: Layout = {
    **linear("patch_embed", "embeddings.patch_embedding"),
    "cls_token": Source("embeddings.class_embedding", flat(1)),
    "pos_embed": Source("embeddings.position_embedding", flat(2)),
    **linear("blocks.{i}.norm1", f"{_BLOCK}.layer_norm1"),
    **merged_qkv(f"{_BLOCK}.self_attn.qkv.weight", f"{_BLOCK}.self_attn.qkv.bias"),
    **linear("blocks.{i}.attn.proj", f"{_BLOCK}.self_attn.projection"),
    **linear("blocks.{i}.norm2", f"{_BLOCK}.layer_norm2"),
    **linear("blocks.{i}.mlp.fc1", f"{_BLOCK}.mlp.fc1"),
    **linear("blocks.{i}.mlp.fc2", f"{_BLOCK}.mlp.fc2"),
    **linear("norm", "post_layernorm"),
    "projection.weight": Source("visual_projection.weight"),
}
_IGNORED = {
    r"(text_\w+|logit_scale|vision_proj|itm_head)(\..*)?": (
        "BLIP's text model and what joins it to the images are left out"
    )
}


def _claims(foreign: Foreign) -> bool:
    if foreign.config is not None and "model_type" in foreign.config:
        return foreign.config["model_type"] in MODEL_TYPES
    return any(
        {f"{prefix}embeddings.class_embedding", f"{prefix}encoder.layers.0.self_attn.qkv.weight"}
        <= foreign.state.keys()
        for prefix in ("", f"{PREFIX}.")
    )


def _read(foreign: Foreign, template: ViTConfig | None) -> Reading:
    state, originals = rename_tensors(foreign.state, lambda name: name.removeprefix(f"{PREFIX}."))
    given = foreign.config
    if given is not None:
        tower = config_object(given, "vision_config") if given.get("model_type") == "blip" else given
        given = {"image_size": 384, **tower}
    projection = state.get("visual_projection.weight")
    config = huggingface.config_of(
        replace(foreign, config=given),
        template,
        _LAYOUT,
        state,
        norm_eps=1e-5,
        final_norm="both",
        projection=projection.shape[0] if projection is not None and projection.ndim else 0,
    )
    return huggingface.reading(
        replace(foreign, config=given),
        config,
        model_type="blip",
        layout=_LAYOUT,
        state=state,
        originals=originals,
        headless=("visual_projection.",),
        prefix=PREFIX,
        ignored=_IGNORED,
    )


FAMILY = Family("blip", _claims, _read, PositionRule(square_source=True))
