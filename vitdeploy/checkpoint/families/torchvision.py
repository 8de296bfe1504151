"""torchvision's ``vit_b_16``, ``vit_b_32``, ``vit_l_16``, ``vit_l_32`` and ``vit_h_14``.

Its files hold tensors alone. What its library says of a model it builds (``libraries/torchvision.py``) stands
under ``torchvision`` in the configuration: heads, image size, the settings of its images; and ``labels``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from vitdeploy.checkpoint.families.base import (
    Family,
    Foreign,
    Layout,
    Reading,
    Source,
    config_integer,
    config_object,
    flat,
    height_and_width,
    linear,
    merged_qkv,
    rename_tensors,
    sole_head,
)
from vitdeploy.checkpoint.families.infer import heads_note, infer_config, shape_note, what_is_open
from vitdeploy.checkpoint.families.positions import PositionRule
from vitdeploy.config import Preprocess, Size, ViTConfig
from vitdeploy.images.preprocess import at_size, from_torchvision

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
_IMAGENET = Preprocess(
    resize="shortest_edge",
    resize_edge=256,
    crop_rounding="round",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)


@dataclass(frozen=True)
class _Weights:
    """Weights that torchvision publishes, and how it prepares images for them."""

    name: str
    width: int
    patch: int
    size: int
    edge: int
    """The shorter edge that images are resized to, in pixels."""
    resample: Literal["bilinear", "bicubic"] = "bilinear"


_PUBLISHED = (
    _Weights("ViT_B_16_Weights.IMAGENET1K_V1", 768, 16, 224, 256),
    _Weights("ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1", 768, 16, 384, 384, "bicubic"),
    _Weights("ViT_B_32_Weights.IMAGENET1K_V1", 768, 32, 224, 256),
    _Weights("ViT_L_16_Weights.IMAGENET1K_V1", 1024, 16, 224, 242),
    _Weights("ViT_L_16_Weights.IMAGENET1K_SWAG_E2E_V1", 1024, 16, 512, 512, "bicubic"),
    _Weights("ViT_L_32_Weights.IMAGENET1K_V1", 1024, 32, 224, 256),
    _Weights("ViT_H_14_Weights.IMAGENET1K_SWAG_E2E_V1", 1280, 14, 518, 518, "bicubic"),
    _Weights("ViT_H_14_Weights.IMAGENET1K_SWAG_LINEAR_V1", 1280, 14, 224, 224, "bicubic"),
)
"""Of torchvision 0.29. B/16 and L/16 of SWAG_LINEAR cannot be told from those of IMAGENET1K_V1."""


def _published(config: ViTConfig) -> _Weights:
    """The weights that these are or probably began as: of their architecture, of their size if possible."""
    own = [known for known in _PUBLISHED if (known.width, known.patch) == (config.width, config.patch_size)]
    sized = [known for known in own if (known.size, known.size) == config.image_size]
    return (sized or own or list(_PUBLISHED))[0]


def _claims(foreign: Foreign) -> bool:
    return "conv_proj.weight" in foreign.state and any(
        name.startswith("encoder.layers.encoder_layer_0.") for name in foreign.state
    )


def _modern_name(name: str, head: str | None) -> str:
    """The MLP of torchvision 0.12 had names, later ones have numbers; ``head`` is the head's layer."""
    if head is not None and name.rpartition(".")[0] == head:
        return f"heads.head.{name.rpartition('.')[2]}"
    return name.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3.")


def _read(foreign: Foreign, template: ViTConfig | None) -> Reading:
    head = sole_head(foreign.state, "heads")
    state, originals = rename_tensors(foreign.state, lambda name: _modern_name(name, head))
    heads, sizes = what_is_open(template, foreign.wanted)
    library = config_object(foreign.config or {}, "torchvision")
    if "heads" in library:
        known = config_integer(library, "heads", 0)
        heads = lambda width: known  # noqa: E731
        sizes = [height_and_width(library["image_size"], "image_size"), *sizes]
    config = infer_config(_LAYOUT, state, foreign.source, heads=heads, sizes=sizes)
    published = _published(config)
    base = replace(
        _IMAGENET,
        size=(published.size, published.size),
        resize_edge=published.edge,
        resample=published.resample,
    )
    transforms = config_object(library, "transforms")
    if transforms:
        base = from_torchvision(transforms)

    def preprocess(size: Size | None) -> Preprocess:
        return at_size(base, size or config.image_size)

    assumed: dict[str, str | None] = {}
    if not transforms:
        assumed["preprocess"] = f"preprocessing is taken to be that of torchvision's {published.name}"
    if "heads" not in library:
        assumed["heads"] = heads_note(config) if template is None else None
    labels: Any = (foreign.config or {}).get("labels")
    notes = () if library else shape_note(config, template, foreign.wanted)
    if head not in (None, "heads.head"):
        notes = (f"the head is the linear layer {head!r}", *notes)
    return Reading(
        config,
        _LAYOUT,
        state,
        preprocess,
        labels=tuple(labels) if library and labels else None,
        notes=notes,
        assumed=assumed,
        originals=originals,
    )


FAMILY = Family("torchvision", _claims, _read, PositionRule(align_corners=True))
