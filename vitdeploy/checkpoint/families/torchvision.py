"""torchvision's ``vit_b_16``, ``vit_b_32``, ``vit_l_16``, ``vit_l_32`` and ``vit_h_14``."""

from __future__ import annotations

from vitdeploy.checkpoint.families.base import (
    Family,
    Foreign,
    Layout,
    Reading,
    Source,
    flat,
    linear,
    merged_qkv,
    rename_tensors,
)
from vitdeploy.checkpoint.families.infer import heads_note, infer_config, what_is_open
from vitdeploy.checkpoint.families.positions import PositionRule
from vitdeploy.config import Preprocess, Size, ViTConfig
from vitdeploy.images.preprocess import at_size

_BLOCK = "encoder.layers.encoder_layer_{i}"
_LAYOUT: Layout = {
    **linear("patch_embed", "conv_proj"),
    "cls_token": Source("class_token", flat(1)),
    "pos_embed": Source("encoder.pos_embedding", flat(2)),
    **linear("blocks.{i}.norm1", f"{_BLOCK}.ln_1"),
    **merged_qkv(f"{_BLOCK}.self_attention.in_proj_weight", f"{_BLOCK}.self_attention.in_proj_bias"),
    **linear("blocks.{i}.attn.proj", f"{_BLOCK}.self_attention.out_proj"),
    **linear("blocks.{i}.norm2", f"{_BLOCK}.ln_2"),
    **linear("blocks.{i}.mlp.fc1", f"{_BLOCK}.mlp.0"),
    **linear("blocks.{i}.mlp.fc2", f"{_BLOCK}.mlp.3"),
    **linear("norm", "encoder.ln"),
    **linear("representation", "heads.pre_logits"),
    **linear("head", "heads.head"),
}
# ViT_B_16_Weights.IMAGENET1K_V1; the SWAG weights only differ in size.
_PREPROCESS = Preprocess(
    resize="shortest_edge",
    resize_edge=256,
    crop_rounding="round",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)


def _claims(foreign: Foreign) -> bool:
    return "conv_proj.weight" in foreign.state and any(
        name.startswith("encoder.layers.encoder_layer_0.") for name in foreign.state
    )


def _modern_name(name: str) -> str:
    """The MLP of torchvision 0.12 had names, that of its successors has numbers."""
    return name.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3.")


def _read(foreign: Foreign, template: ViTConfig | None) -> Reading:
    state, originals = rename_tensors(foreign.state, _modern_name)
    heads, sizes = what_is_open(template)
    config = infer_config(_LAYOUT, state, foreign.source, heads=heads, sizes=sizes)

    def preprocess(size: Size | None) -> Preprocess:
        return at_size(_PREPROCESS, size or config.image_size)

    assumed = {
        "preprocess": "preprocessing is torchvision's for its ImageNet weights",
        "heads": heads_note(config) if template is None else None,
    }
    return Reading(config, _LAYOUT, state, preprocess, assumed=assumed, originals=originals)


FAMILY = Family("torchvision", _claims, _read, PositionRule(align_corners=True))
