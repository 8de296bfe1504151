"""What people want to know of families of checkpoints: who writes them, what is read, what comes out.

One table for ``vitdeploy list`` and the documents. Needs no PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vitdeploy.config import Output


@dataclass(frozen=True)
class Library:
    """Whose way to write checkpoints it is."""

    title: str
    how: str
    """How ``--model`` takes them, in Markdown."""
    proof: str
    """What they are held against, in Markdown."""


@dataclass(frozen=True)
class Entry:
    """A family, as ``checkpoint.families.FAMILIES`` has it."""

    models: tuple[str, ...]
    """What papers call the models."""
    library: str
    """One of ``LIBRARIES``."""
    on_disk: tuple[str, ...]
    """What tells the family: the ``model_type`` of config.json, or names of tensors."""
    reads: str
    """Which models and parts of them, in Markdown."""
    outputs: tuple[Output, ...]
    """What some of its checkpoints can return, beside their layers."""


LIBRARIES: Mapping[str, Library] = {
    "transformers": Library(
        "transformers",
        "`-m FOLDER`, or `-m owner/name` from the hub",
        "*measured* against transformers",
    ),
    "timm": Library(
        "timm",
        "`-m FOLDER` (transformers' `timm_wrapper`, too), or `-m timm:NAME` with timm installed",
        "*measured* against timm's recorded answers",
    ),
    "open_clip": Library(
        "open_clip",
        "`-m FOLDER`, `-m owner/name` from the hub, or a bare `-m FILE`",
        "*measured* against open_clip's recorded answers",
    ),
    "torchvision": Library(
        "torchvision",
        "`-m FILE.pth`, or `-m torchvision:NAME` with torchvision installed",
        "*measured* against torchvision's recorded answers",
    ),
    "google": Library(
        "Google's `.npz`",
        "`-m FILE.npz`",
        "*measured* against a reimplementation: the original code is not run",
    ),
    "vitdeploy": Library(
        "vitdeploy's own", "`-m FOLDER`, or a bundle", "*measured* against what was written"
    ),
}
"""In the order of the documents' tables."""

_POOLED = ("features", "embedding", "tokens")
_CLASSES = ("logits", *_POOLED)
_CODES = ("logits", "codes", *_POOLED)

CATALOGUE: Mapping[str, Entry] = {
    "vit": Entry(("ViT",), "transformers", ("vit",), "`ViTForImageClassification`, `ViTModel`", _CLASSES),
    "deit": Entry(
        ("DeiT",),
        "transformers",
        ("deit",),
        "`DeiTForImageClassification`; `...WithTeacher`, the mean of both heads; `DeiTModel`",
        _CLASSES,
    ),
    "dinov2": Entry(
        ("DINOv2",),
        "transformers",
        ("dinov2",),
        "`Dinov2ForImageClassification`, on CLS and the mean of the patches; `Dinov2Model`",
        _CLASSES,
    ),
    "dinov2_with_registers": Entry(
        ("DINOv2",), "transformers", ("dinov2_with_registers",), "the same with registers", _CLASSES
    ),
    "dinov3_vit": Entry(
        ("DINOv3",),
        "transformers",
        ("dinov3_vit",),
        "`DINOv3ViTModel`, with gated MLPs (S+, H+, 7B), too",
        _POOLED,
    ),
    "clip": Entry(
        ("CLIP",),
        "transformers",
        ("clip", "clip_vision_model"),
        "the image tower of `CLIPModel`, `CLIPVisionModel` and `CLIPVisionModelWithProjection`; "
        "`CLIPForImageClassification`",
        _CLASSES,
    ),
    "siglip": Entry(
        ("SigLIP", "SigLIP 2"),
        "transformers",
        ("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model"),
        "the image tower of `SiglipModel` and `SiglipVisionModel`; `SiglipForImageClassification`; SigLIP 2 "
        "of fixed size",
        _CLASSES,
    ),
    "beit": Entry(
        ("BEiT", "BEiT v2"),
        "transformers",
        ("beit",),
        "`BeitForImageClassification`, `BeitModel`, `BeitForMaskedImageModeling`",
        _CODES,
    ),
    "blip": Entry(
        ("BLIP",),
        "transformers",
        ("blip", "blip_vision_model"),
        "`BlipVisionModel`; the image tower of `BlipModel` and of the models for captions, questions and "
        "retrieval",
        _POOLED,
    ),
    "qwen_vl": Entry(
        ("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "Qwen3.5"),
        "transformers",
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
        "the vision tower of the whole model, of which nothing else is read, or alone (`..._vision`); stills",
        ("image_features", "deepstack_features"),
    ),
    "vit_mae": Entry(
        ("MAE",),
        "transformers",
        ("vit_mae",),
        "`ViTMAEModel`, and the encoder of `ViTMAEForPreTraining`; every patch goes in",
        _POOLED,
    ),
    "vit_msn": Entry(
        ("MSN",), "transformers", ("vit_msn",), "`ViTMSNForImageClassification`, `ViTMSNModel`", _CLASSES
    ),
    "swin": Entry(
        ("Swin",),
        "transformers",
        ("swin",),
        "`SwinForImageClassification`, `SwinModel`, and the encoder of `SwinForMaskedImageModeling`",
        _CLASSES,
    ),
    "swinv2": Entry(("Swin v2",), "transformers", ("swinv2",), "the same of version 2", _CLASSES),
    "timm": Entry(
        ("ViT", "DeiT", "DeiT III", "DINOv2", "CLIP", "SigLIP"),
        "timm",
        ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
        "`vit_*`, `deit_*`, `deit3_*`, `vit_*_dinov2`, `vit_*_clip_*`, `vit_*_siglip_*`; the names of "
        "DINOv2's and DeiT III's own releases",
        _CLASSES,
    ),
    "timm_eva": Entry(
        ("DINOv3", "EVA02"),
        "timm",
        ("reg_token", "blocks.0.attn.q_bias", "blocks.0.attn.q_proj.weight"),
        "`vit_*_dinov3`, `eva02_*_patch14_*`",
        _CLASSES,
    ),
    "timm_hybrid": Entry(
        ("ViT hybrids",),
        "timm",
        ("patch_embed.backbone.stem.conv.weight", "patch_embed.backbone.conv.weight"),
        "`vit_*_r26_s32_*`, `vit_*_r50_s*_*`, `vit_tiny_r_s16_p8_*`",
        _CLASSES,
    ),
    "timm_beit": Entry(
        ("BEiT", "BEiT v2"),
        "timm",
        ("blocks.0.attn.relative_position_bias_table", "rel_pos_bias.relative_position_bias_table"),
        "`beit_*`, `beitv2_*`, and the authors' own files, of which those of the pre-training give `codes`",
        _CODES,
    ),
    "timm_swin": Entry(
        ("Swin", "Swin v2"),
        "timm",
        ("layers.0.blocks.0.attn.qkv.weight",),
        "`swin_*`, `swin_s3_*`, `swinv2_*`, and the authors' own files",
        _CLASSES,
    ),
    "open_clip": Entry(
        ("CLIP",),
        "open_clip",
        ("visual.conv1.weight", "visual.class_embedding"),
        "the image tower, as open_clip and OpenAI name it, beside its text tower or alone; training files",
        _POOLED,
    ),
    "open_clip_timm": Entry(
        ("SigLIP", "SigLIP 2"),
        "open_clip",
        ("visual.trunk.patch_embed.proj.weight",),
        "the image tower, where timm builds it from blocks that are read",
        _POOLED,
    ),
    "torchvision": Entry(
        ("ViT",),
        "torchvision",
        ("conv_proj.weight", "encoder.layers.encoder_layer_0.*"),
        "`vit_b_16` ... `vit_h_14`, MLP names of 0.12 and after",
        _CLASSES,
    ),
    "google": Entry(
        ("ViT", "ViT hybrids"),
        "google",
        ("embedding/kernel",),
        "`.npz` of the ViT paper and vit_jax, hybrids too, `opt/target/` of training checkpoints, the "
        "`pre_logits` layer",
        _CLASSES,
    ),
    "vitdeploy": Entry(
        ("any of these",),
        "vitdeploy",
        ("vitdeploy",),
        "`config.json` and `model.safetensors`; a bundle's `manifest.json` and `weights.safetensors`",
        _CODES,
    ),
}
"""What ``checkpoint.families.FAMILIES`` reads, by the families' names."""


def models_of(library: str) -> tuple[str, ...]:
    """What papers call the models that are read from a library's files."""
    found = (model for entry in CATALOGUE.values() if entry.library == library for model in entry.models)
    return tuple(dict.fromkeys(found))
