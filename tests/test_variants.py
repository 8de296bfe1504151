"""The named variants: their names, and their sizes against the papers and other libraries."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.documents import rows_after
from vitdeploy.config import Rotary, SwinConfig, ViTConfig
from vitdeploy.errors import ConfigError, UsageError
from vitdeploy.images.preprocess import PRESETS
from vitdeploy.model.registry import architecture_of, expected_shapes, parameter_count
from vitdeploy.variants import decode_variant, find_variant, is_variant, variant_names

LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
SMALL = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
}
BEIT = {"use_relative_position_bias": True, "num_labels": 1000}

PUBLISHED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "CLIP-B/32": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {}),
    "CLIP-B/16": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {"patch_size": 16}),
    "CLIP-L/14": (
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        {**LARGE, "patch_size": 14, "projection_dim": 768},
    ),
    "SigLIP-B/16": ("SiglipVisionModel", "SiglipVisionConfig", {}),
    "SigLIP-L/16": ("SiglipVisionModel", "SiglipVisionConfig", {**LARGE, "image_size": 256}),
    "SigLIP-So400m/14": ("SiglipVisionModel", "SiglipVisionConfig", {**SO400M, "patch_size": 14}),
    "DINOv3-S/16": ("DINOv3ViTModel", "DINOv3ViTConfig", {**SMALL, "num_register_tokens": 4}),
    "DINOv3-S+/16": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**SMALL, "num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
    ),
    "DINOv3-B/16": ("DINOv3ViTModel", "DINOv3ViTConfig", {**BASE, "num_register_tokens": 4}),
    "DINOv3-L/16": ("DINOv3ViTModel", "DINOv3ViTConfig", {**LARGE, "num_register_tokens": 4}),
    "BEiT-B/16": ("BeitForImageClassification", "BeitConfig", BEIT),
    "BEiT-L/16": ("BeitForImageClassification", "BeitConfig", {**BEIT, **LARGE}),
    "BLIP-B/16": ("BlipVisionModel", "BlipVisionConfig", {}),
    "MAE-B/16": ("ViTMAEModel", "ViTMAEConfig", {}),
    "MSN-S/16": ("ViTMSNModel", "ViTMSNConfig", SMALL),
}
"""transformers' model and configuration of each, and what published files say beside its defaults."""

ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh"}

# Millions of parameters, billions of multiplications: table 1 of the papers, and model_hub.md of their
# repository, https://github.com/microsoft/Swin-Transformer.
SWINS = {"Swin-T": (28.3, 4.5), "Swin-S": (49.6, 8.7), "Swin-B": (87.8, 15.4), "SwinV2-T": (28.3, 5.9)}

# timm 1.0.31: the parameters of create_model("eva02_..._patch14_224.mim_in22k", num_classes=1000).
EVA02 = {"Ti": 5_695_144, "S": 22_006_120, "B": 86_527_720, "L": 304_293_800}
# And of create_model("vit_small_r26_s32_224").
R26 = 36_431_912


@pytest.mark.slow
@pytest.mark.parametrize("name", variant_names())
def test_every_listed_variant_decodes(name: str) -> None:
    variant = find_variant(name)
    config = variant.config
    assert is_variant(name)
    assert variant.preset in PRESETS
    larger = {"SigLIP-L/16": (256, 256), "BLIP-B/16": (384, 384), "SwinV2-T": (256, 256)}
    assert config.image_size == larger.get(name, (224, 224))
    if isinstance(config, ViTConfig):
        assert f"{config.step}" in name
        assert config.head_width == 64 or config.width in (1152, 1280)
    else:
        assert all(width == 32 * heads for width, heads in zip(config.widths, config.heads, strict=True))
    assert expected_shapes(config)
    assert config.output_shapes[config.outputs[0]]


def test_short_and_long_names_are_one() -> None:
    assert decode_variant("B/16") == decode_variant("ViT-B/16") == decode_variant("vit_base_patch16_224")
    assert decode_variant("H/14") == decode_variant("vit_huge_patch14_224")


def test_a_name_takes_any_resolution_its_patch_divides() -> None:
    assert decode_variant("vit_base_patch16_384").grid == (24, 24)
    with pytest.raises(ConfigError, match="225x225 is not divisible by the patch size 16") as caught:
        decode_variant("vit_base_patch16_225")
    assert "224x224" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "name, meant",
    [
        ("vit_bse_patch16_224", "vit_base_patch16_224"),
        ("vit_base_distilled_patch16_224", "deit_base_distilled_patch16_224"),
        ("B/17", "B/16"),
        ("b/16", "B/16"),
        ("CLIP-B/33", "CLIP-B/32"),
        ("clip-b/32", "CLIP-B/32"),
        ("DINOV3-S+/16", "DINOv3-S+/16"),
        ("SigLIP-SO400M/14", "SigLIP-So400m/14"),
        ("BEiT-B+/16", "BEiT-B/16"),
        ("swin-t", "Swin-T"),
        ("swin-b", "Swin-B"),
        ("SwinV2-S", "SwinV2-T"),
        ("R26-S/16", "R26-S/32"),
    ],
)
def test_unknown_names_get_a_suggestion(name: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        decode_variant(name)
    assert caught.value.message.endswith(f"unknown model {name!r}; did you mean {meant!r}?")
    assert "vitdeploy list" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["clip-b/32", "CLIP-H/14", "DINOv3-s+/16", "BLIP-B/17", "swinv2-b"])
def test_names_like_a_variants_are_not_looked_for_elsewhere(name: str) -> None:
    assert is_variant(name)


@pytest.mark.parametrize("name", ["openai/clip-vit-base-patch32", "google/siglip-base-patch16-224", "CLIP"])
def test_hub_ids_are_no_variants(name: str) -> None:
    assert not is_variant(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, millions",
    [
        *(("Ti/16", 5.7), ("S/16", 22), ("B/16", 86), ("L/16", 304), ("H/14", 632), ("B/32", 88)),
        *(("CLIP-B/32", 87.8), ("CLIP-B/16", 86.2), ("CLIP-L/14", 304)),
        *(("SigLIP-B/16", 92.9), ("SigLIP-So400m/14", 428)),
        *(("DINOv3-S/16", 21.6), ("DINOv3-S+/16", 28.7), ("DINOv3-B/16", 85.7), ("DINOv3-L/16", 303)),
        *(("BEiT-B/16", 86.5), ("BEiT-L/16", 304)),
        *((name, millions) for name, (millions, _) in SWINS.items()),
        *(("EVA02-Ti/14", 5.7), ("EVA02-S/14", 22), ("EVA02-B/14", 86), ("EVA02-L/14", 304)),
        ("R26-S/32", 36.4),
    ],
)
def test_parameter_counts_are_the_papers(name: str, millions: float) -> None:
    assert parameter_count(decode_variant(name)) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("name", SWINS)
def test_a_swins_flops_are_the_papers(name: str) -> None:
    config = decode_variant(name)
    flops = architecture_of(config).forward_flops(config)
    assert flops / 2e9 == pytest.approx(SWINS[name][1], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", SWINS)
def test_a_swin_has_the_sizes_and_settings_of_transformers(name: str) -> None:
    import torch
    import transformers

    ours = decode_variant(name)
    assert isinstance(ours, SwinConfig)
    said = {"embed_dim": ours.width, "depths": list(ours.depths), "num_heads": list(ours.heads)}
    if ours.version == 2:
        config = transformers.Swinv2Config(**said, image_size=256, window_size=8)
        kind = transformers.Swinv2ForImageClassification
    else:
        config, kind = transformers.SwinConfig(**said), transformers.SwinForImageClassification
    config.num_labels = 1000
    with torch.device("meta"):
        model = kind(config)
    assert parameter_count(ours) == sum(parameter.numel() for parameter in model.parameters())
    assert (ours.image_size, ours.patch_size) == ((config.image_size,) * 2, config.patch_size)
    assert ours.windows == ((config.window_size,) * 2,) * 4
    assert (ours.mlp_ratio, ours.norm_eps) == (config.mlp_ratio, config.layer_norm_eps)
    assert (ours.activation, ours.qkv_bias) == (config.hidden_act, config.qkv_bias)


@pytest.mark.parametrize("size", EVA02)
def test_eva02_has_timms_parameters(size: str) -> None:
    assert parameter_count(decode_variant(f"EVA02-{size}/14")) == EVA02[size]


def test_the_hybrid_has_timms_parameters() -> None:
    config = decode_variant("R26-S/32")
    assert parameter_count(config) == R26
    assert (config.grid, config.tokens, config.heads) == ((7, 7), 50, 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_variant_has_the_sizes_and_settings_of_transformers(name: str) -> None:
    import torch
    import transformers

    model, kind, said = PUBLISHED[name]
    theirs = getattr(transformers, kind)(**said)
    with torch.device("meta"):
        parameters = getattr(transformers, model)(theirs).named_parameters()
        count = sum(p.numel() for n, p in parameters if not n.endswith("mask_token"))
    ours = decode_variant(name)
    assert parameter_count(ours) == count
    assert (ours.image_size, ours.patch_size) == ((theirs.image_size,) * 2, theirs.patch_size)
    assert (ours.width, ours.heads, ours.depth) == (
        theirs.hidden_size,
        theirs.num_attention_heads,
        theirs.num_hidden_layers,
    )
    assert ours.norm_eps == theirs.layer_norm_eps
    assert ours.activation == ACTIVATIONS.get(theirs.hidden_act, theirs.hidden_act)
    if ours.rotary is not None:
        assert ours.rotary == Rotary("centred", theirs.rope_theta)


USUAL = ("patches_to_gemm", "merge_qkv", "fold_attention_scale", "move_value_bias")
"""Rewrites of every family, which the documents' table leaves out."""
SHOWN = (
    *("B/16", "deit_base_distilled_patch16_224", "CLIP-B/32", "SigLIP-B/16", "DINOv3-S/16", "EVA02-S/14"),
    *("BEiT-B/16", "BLIP-B/16", "MAE-B/16", "MSN-S/16", "R26-S/32", "Swin-T", "SwinV2-T"),
)


def rewrites_row(name: str) -> str:
    """What the documents say of a variant's rewrites."""
    config = decode_variant(name)
    architecture = architecture_of(config)
    applied = architecture.applied_rewrites(config, (config.outputs[0],), "float")
    usual = set(USUAL) - ({"fold_attention_scale"} if name == "SwinV2-T" else set())
    assert {rewrite.name for rewrite in applied} >= usual
    own = ", ".join(f"`{rewrite.name}`" for rewrite in applied if rewrite.name not in USUAL)
    saved = sum(rewrite.flops_saved for rewrite in applied) / architecture.forward_flops(config)
    return f"| `{name}` | `{config.outputs[0]}` | {own} | {saved:.1%} |".replace("%", " %")


def test_the_page_on_families_says_which_rewrites_hold() -> None:
    rows = rows_after("docs/families.md", "| variant | output | rewrites | saves, with all of them |")
    assert rows == [rewrites_row(name) for name in SHOWN]


def test_every_family_is_at_hand() -> None:
    families = {name.partition("-")[0] for name in variant_names() if "-" in name}
    of_timm = ("EVA02", "R26")
    assert families == {*(name.partition("-")[0] for name in (*PUBLISHED, *SWINS)), *of_timm}
    others = {name for name in variant_names() if "-" in name and not name.startswith(of_timm)}
    assert others == PUBLISHED.keys() | SWINS.keys()
