"""timm's architectures by name: those that its families here compute, and what tensors do not tell.

After timm 1.0.31 (``vision_transformer.py``, ``deit.py`` and what lies beside them). Many others have the
same tensor names and compute something else: only names that are known are taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from vitdeploy.config import Activation

# Names that timm gave up for tags: vit_base_patch16_224_in21k is vit_base_patch16_224.augreg_in21k today.
_TAGS = re.compile(r"_(in21k|in21ft1k|sam|dino)$")

_PLAIN = re.compile(
    "|".join(
        (
            r"vit_(tiny|small|base|large)_patch(8|16|32)_(224|384)",
            r"vit_(large|huge|giant|gigantic)_patch14_224",
            r"vit_base_patch16_224_miil|vit_small_patch16_36x1_224",
            r"vit_base_patch(16_plus_240|32_plus_256)",
            r"vit_(medium|betwixt|base|giant)_patch16_gap_\d+|vit_huge_patch1[46]_gap_\d+",
            r"vit_(wee|little|medium|mediumd|betwixt|base|so150m2?)_patch16_reg[14]_gap_\d+",
            r"vit_(base|large|so400m|giantopt)_patch(14|16|32)_siglip(_gap)?_\d+",
            r"vit_(xsmall|medium|betwixt|base|large|huge|giant|gigantic)_patch(14|16|32)(_plus)?_clip"
            r"(_quickgelu)?_\d+",
            r"vit_(small|base|large|giant)_patch14(_reg4)?_dinov2",
            r"vit_(base|large|so400m|giant)_patch14_reg1_tipsv2",
            r"deit_(tiny|small|base)(_distilled)?_patch16_(224|384)",
            r"deit3_(small|medium|base|large|huge)_patch1[46]_(224|384)",
            r"eva_large_patch14_(196|336)|flexivit_(small|base|large)|test_vit2?",
        )
    )
)
_HYBRID = re.compile(
    r"vit_(tiny_r_s16_p8|(small|base)_r26_s32|base_r50_s16|large_r50_s32)_(224|384)"
    # What timm called vit_base_r50_s16_* at first.
    r"|vit_base_resnet50_(224|384)"
)
_BEIT = re.compile(r"beit(v2)?_(base|large)_patch16_(224|384|512)(_in22k)?")
_SWIN = re.compile(
    r"swin_(tiny|small|base|large)_patch4_window(?P<first>\d+)_\d+(_in22k)?|swin_s3_(tiny|small|base)_224"
    r"|swinv2_(tiny|small|base|large)_window(?P<trained>12to)?(?P<second>\d+)_(\d+to)?\d+(_22k(ft1k)?)?"
)
_S3_WINDOWS = {"tiny": (7, 7, 14, 7), "small": (14, 14, 14, 7), "base": (7, 7, 14, 7)}
_KINDS: Mapping[str, str] = {
    r"_rope|_pe_|^eva": "rotary positions of another kind, or EVA's attention",
    r"sapiens2": "keys shared by several heads",
    r"_map_|test_vit3": "attention pooling of the patches alone",
    r"relpos": "relative positions",
    r"^beit3": "BEiT-3's norms inside its branches",
    r"_d(wee|little)_": "differential attention",
    r"pwee_|_\d+x2_": "parallel branches",
    r"_rpn_": "LayerNorm after the branches",
    r"^vit_.*(_r\d*_|_resnet)": "another ResNet before the blocks",
    r"_mci_": "convolutions before the blocks",
    r"^samvit|hiera": "attention in windows",
    r"_radio_|_intern300m_": "no LayerNorm at the end",
    r"^aimv2|test_vit4": "RMSNorm",
    r"^cait": "talking heads",
    r"^swinv2_cr": "another network of relative positions",
    r"^(qwen|deepseek)": "the attention of a language model's image encoder",
}
"""Patterns of other names, and what sets these models apart."""

_HEADS: Mapping[str, int] = {
    r"vit_base_patch16_gap_224|vit_giantopt_.*": 16,
    r"test_vit2?": 2,
}
"""Patterns of names, and their heads where they are unlike others of their width."""
_WIDTHS = {"tiny": 192, "small": 384, "base": 768, "large": 1024}
_SIZED = re.compile(r"(vit|deit3?)_(?P<size>tiny|small|base|large)(_distilled)?_patch\d+_(224|384)")
_TANH_GELU = re.compile(
    r"vit_((base_patch32|so400m_patch16|giantopt_patch16)_siglip(_gap)?_\d+"
    r"|large_patch16_siglip(_gap)?_512)"
)


def is_plain(architecture: str) -> bool:
    """Whether timm builds this name from the blocks that the family computes."""
    return _PLAIN.fullmatch(_TAGS.sub("", architecture)) is not None


def is_hybrid(architecture: str) -> bool:
    """Whether timm builds this name from a ResNetV2 and a plain ViT's blocks."""
    return _HYBRID.fullmatch(_TAGS.sub("", architecture)) is not None


def is_beit(architecture: str) -> bool:
    """Whether timm builds this name from BEiT's blocks."""
    return _BEIT.fullmatch(architecture) is not None


def is_swin(architecture: str) -> bool:
    """Whether timm builds this name from Swin's blocks, of either version."""
    return _SWIN.fullmatch(architecture) is not None


def swin_windows(architecture: str) -> int | tuple[int, ...] | None:
    """Sides of the windows of a Swin, of all stages or of each; None where the name is none of these."""
    match = _SWIN.fullmatch(architecture)
    if match is None:
        return None
    side = match["first"] or match["second"]
    return int(side) if side else _S3_WINDOWS[architecture.split("_")[2]]


def trained_windows(architecture: str) -> tuple[int, ...] | None:
    """Sides of the windows that a Swin of version 2 was trained with, where it was fine-tuned with others."""
    match = _SWIN.fullmatch(architecture)
    return (12, 12, 12, 6) if match and match["trained"] else None


def kind_of(architecture: str) -> str | None:
    """What sets an architecture apart that is not plain, where its name tells."""
    return next((kind for pattern, kind in _KINDS.items() if re.search(pattern, architecture)), None)


def heads_of(architecture: str) -> int | None:
    """The heads of a plain architecture; None where they are as usual for its width."""
    return next((heads for names, heads in _HEADS.items() if re.fullmatch(names, architecture)), None)


def width_of(architecture: str) -> int | None:
    """The width of an architecture of the paper's sizes; models built with another may bear its name, too."""
    sized = _SIZED.fullmatch(_TAGS.sub("", architecture))
    return _WIDTHS[sized["size"]] if sized else None


def activation_of(architecture: str) -> Activation | None:
    """The activation of a plain architecture; None where it is as usual."""
    if "_clip_quickgelu_" in architecture:
        return "quick_gelu"
    return "gelu_tanh" if _TANH_GELU.fullmatch(architecture) else None
