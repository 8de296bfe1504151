"""The named variants: models that papers name, without a checkpoint.

``vit_base_patch16_224`` and ``B/16`` are the plain ViT, ``CLIP-B/32`` or ``DINOv3-S/16`` the image tower of a
family, ``Swin-T`` a Swin Transformer. Each is a configuration and the preprocessing of its family; weights
are random, or those of a file beside it. Needs no PyTorch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitdeploy.config import Rotary, Stem, SwinConfig, ViTConfig
from vitdeploy.errors import UsageError, did_you_mean

DEFAULT_MODEL = "vit_base_patch16_224"
"""The named variant that is meant where a user names none."""


@dataclass(frozen=True)
class Variant:
    """What a name stands for."""

    config: ViTConfig | SwinConfig
    preset: str
    """The preprocessing of its family, one of ``images.preprocess.PRESETS``."""


@dataclass(frozen=True)
class _Size:
    short: str
    width: int
    depth: int
    heads: int
    mlp_width: int

    @property
    def fields(self) -> dict[str, Any]:
        return {"width": self.width, "depth": self.depth, "heads": self.heads, "mlp_width": self.mlp_width}


@dataclass(frozen=True)
class _Family:
    """What all models of a family have, and each of its own, by size and patch: ``B/32``."""

    preset: str
    fields: Mapping[str, Any]
    members: Mapping[str, Mapping[str, Any]]


# Widths and depths: ViT paper, table 1 (B, L, H); DeiT (https://arxiv.org/abs/2012.12877), table 1 (Ti, S).
_SIZES = {
    "tiny": _Size("Ti", 192, 12, 3, 768),
    "small": _Size("S", 384, 12, 6, 1536),
    "base": _Size("B", 768, 12, 12, 3072),
    "large": _Size("L", 1024, 24, 16, 4096),
    "huge": _Size("H", 1280, 32, 16, 5120),
}
# SoViT-400m: Alabdulmohsin et al. 2023 (https://arxiv.org/abs/2305.13035), table 1.
_SHORT_SIZES = {size.short: size for size in (*_SIZES.values(), _Size("So400m", 1152, 27, 16, 4304))}
_PATCHES = (8, 14, 16, 32)
_LONG = re.compile(
    r"(?P<kind>vit|deit)_(?P<size>[a-z]+)(?P<distilled>_distilled)?_patch(?P<patch>\d+)(_(?P<image>\d+))?"
)
_SHORT = re.compile(r"(?:ViT-)?(?P<size>Ti|S|B|L|H)/(?P<patch>\d+)")
_NO_TABLE = {"position": "none", "position_prefix": 0}

_FAMILIES: Mapping[str, _Family] = {
    # Radford et al. 2021 (https://arxiv.org/abs/2103.00020), tables 19 and 20; config.json of
    # openai/clip-vit-base-patch32, -base-patch16, -large-patch14.
    "CLIP": _Family(
        "clip",
        {
            "activation": "quick_gelu",
            "classes": 0,
            "final_norm": "pooled",
            "norm_eps": 1e-5,
            "patch_bias": False,
            "pre_norm": True,
        },
        {"B/32": {"projection": 512}, "B/16": {"projection": 512}, "L/14": {"projection": 768}},
    ),
    # Zhai et al. 2023 (https://arxiv.org/abs/2303.15343); config.json of google/siglip-base-patch16-224,
    # -large-patch16-256 (there is none of 224 pixels), -so400m-patch14-224.
    "SigLIP": _Family(
        "siglip",
        {
            "activation": "gelu_tanh",
            "classes": 0,
            "cls_token": False,
            "pool": "probe",
            "position_prefix": 0,
        },
        {"B/16": {}, "L/16": {"image_size": (256, 256)}, "So400m/14": {}},
    ),
    # Siméoni et al. 2025 (https://arxiv.org/abs/2508.10104); config.json of
    # facebook/dinov3-vits16-pretrain-lvd1689m, -vits16plus-, -vitb16-, -vitl16-.
    "DINOv3": _Family(
        "dinov3",
        {
            **_NO_TABLE,
            "classes": 0,
            "key_bias": False,
            "layer_scale": True,
            "norm_eps": 1e-5,
            "registers": 4,
            "rotary": Rotary("centred", 100.0),
        },
        {"S/16": {}, "S+/16": {"activation": "silu", "gated_mlp": True}, "B/16": {}, "L/16": {}},
    ),
    # Bao et al. 2022 (https://arxiv.org/abs/2106.08254), section 3; config.json and
    # preprocessor_config.json of microsoft/beit-base-patch16-224, -large-.
    "BEiT": _Family(
        "inception",
        {
            **_NO_TABLE,
            "final_norm": "pooled",
            "key_bias": False,
            "layer_scale": True,
            "norm_eps": 1e-12,
            "pool": "mean",
            "score_bias": True,
        },
        {"B/16": {}, "L/16": {}},
    ),
    # Fang et al. 2023 (https://arxiv.org/abs/2303.11331), table 3; timm's eva02_*_patch14_224: the MLP has
    # 8/3 of the width, base and large a norm in it. Images as of those that are fine-tuned: no margin.
    "EVA02": _Family(
        "clip",
        {
            "activation": "silu",
            "final_norm": "pooled",
            "gated_mlp": True,
            "key_bias": False,
            "pool": "mean",
            "rotary": Rotary("indexed", 10_000.0, (16, 16)),
        },
        {
            "Ti/14": {"mlp_width": 512},
            "S/14": {"mlp_width": 1024},
            "B/14": {"mlp_width": 2048, "mlp_norm": True},
            "L/14": {"mlp_width": 2730, "mlp_norm": True},
        },
    ),
    # Li et al. 2022 (https://arxiv.org/abs/2201.12086); vision_config of
    # Salesforce/blip-image-captioning-base.
    "BLIP": _Family(
        "blip",
        {"classes": 0, "final_norm": "both", "image_size": (384, 384), "norm_eps": 1e-5},
        {"B/16": {}},
    ),
    # He et al. 2022 (https://arxiv.org/abs/2111.06377); config.json and preprocessor_config.json of
    # facebook/vit-mae-base.
    "MAE": _Family("mae", {"classes": 0, "norm_eps": 1e-12}, {"B/16": {}}),
    # Assran et al. 2022 (https://arxiv.org/abs/2204.07141); the same of facebook/vit-msn-small.
    "MSN": _Family("mae", {"classes": 0}, {"S/16": {}}),
    # Steiner et al. 2022 (https://arxiv.org/abs/2106.10270), table 2; timm's vit_small_r26_s32_224. The
    # name's patch is in pixels: one cell of the ResNet's last map.
    "R26": _Family("inception", {"patch_size": 1, "stem": Stem((2, 2, 2, 2))}, {"S/32": {}}),
}
_LARGER = (2, 2, 18, 2)
_SWINS: Mapping[str, SwinConfig] = {
    # Liu et al. 2021 (https://arxiv.org/abs/2103.14030), section 3.3.
    "Swin-T": SwinConfig(),
    "Swin-S": SwinConfig(depths=_LARGER),
    "Swin-B": SwinConfig(width=128, depths=_LARGER, heads=(4, 8, 16, 32)),
    # Liu et al. 2022 (https://arxiv.org/abs/2111.09883), section 4; config.json of
    # microsoft/swinv2-tiny-patch4-window8-256: the last stage has one window, which is not shifted.
    "SwinV2-T": SwinConfig(
        version=2,
        image_size=(256, 256),
        windows=((8, 8),) * 4,
        shifts=((4, 4), (4, 4), (4, 4), (0, 0)),
        window_rule="fixed",
        mask=-200.0,
    ),
}
_OF_FAMILY = re.compile(rf"(?P<family>{'|'.join(_FAMILIES)})-(?P<member>(?P<size>\w+)\+?/(?P<patch>\d+))")
_NEAR = re.compile(rf"{_OF_FAMILY.pattern}|swin(v2)?-\w{{1,2}}", re.IGNORECASE)


def variant_names() -> tuple[str, ...]:
    """Every named variant, long names first: ``vit_base_patch16_224`` ... ``B/16`` ... ``CLIP-B/32`` ..."""
    sizes = [(name, size, patch) for name, size in _SIZES.items() for patch in _PATCHES]
    deit = [f"deit_{name}{d}_patch16_224" for name in ("tiny", "small", "base") for d in ("", "_distilled")]
    long = [f"vit_{name}_patch{patch}_224" for name, _, patch in sizes]
    others = [f"{name}-{member}" for name, family in _FAMILIES.items() for member in family.members]
    return (*long, *deit, *(f"{size.short}/{patch}" for _, size, patch in sizes), *others, *_SWINS)


def is_variant(name: str) -> bool:
    """Whether a name is a variant's or, but for a letter or a number, like one's."""
    return any(pattern.fullmatch(name) for pattern in (_LONG, _SHORT, _NEAR))


def decode_variant(name: str) -> ViTConfig | SwinConfig:
    """Return the configuration of a named variant, as :func:`find_variant` has it."""
    return find_variant(name).config


def find_variant(name: str) -> Variant:
    """Return what a name stands for.

    The timm-style names take any resolution that the patch divides (``vit_base_patch16_384``); the
    papers' short names (``B/16``, ``CLIP-B/32``) stand for 224 pixels, or for the least that their family was
    published for. A head, where a family has one, is of 1000 classes.

    Raises:
        UsageError: no variant has this name (with a suggestion).
        ConfigError: the resolution is not divisible by the patch.
    """
    if match := _OF_FAMILY.fullmatch(name):
        family = _FAMILIES[match["family"]]
        if match["member"] in family.members:
            size = _SHORT_SIZES[match["size"]].fields | {"patch_size": int(match["patch"])}
            own = family.members[match["member"]]
            return Variant(ViTConfig(**(size | dict(family.fields) | dict(own))), family.preset)
    elif name in _SWINS:
        return Variant(_SWINS[name], "swin")
    elif found := _plain(name):
        return found
    raise UsageError(
        f"unknown model {name!r}{did_you_mean(name, variant_names())}",
        hint="`vitdeploy list` shows the named variants",
    )


def _plain(name: str) -> Variant | None:
    """ViT and DeiT; None where they have no such name."""
    long, short = _LONG.fullmatch(name), _SHORT.fullmatch(name)
    match = long or short
    size = (_SIZES if long else _SHORT_SIZES).get(match["size"]) if match else None
    if match is None or size is None or int(match["patch"]) not in _PATCHES:
        return None
    deit = bool(long and long["kind"] == "deit")
    distilled = bool(long and long["distilled"])
    if distilled and not deit:
        return None
    image = int(long["image"] or 224) if long else 224
    config = ViTConfig(
        **size.fields,
        image_size=(image, image),
        patch_size=int(match["patch"]),
        distillation_token=distilled,
        position_prefix=2 if distilled else 1,
        pool="both_heads" if distilled else "cls",
    )
    return Variant(config, "deit" if deit else "inception")
