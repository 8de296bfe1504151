"""Record tiny hybrids of timm with what they compute, for tests/checkpoint/families.

    pip install timm torchvision scikit-learn && python tests/oracles/record_timm_hybrid.py

Each folder under tests/oracles/timm_hybrid is what timm itself saves for the hub, in float16, with
``answer.safetensors`` in it: at the model's own resolution and at another one (``other.``) inputs, timm's
logits, features and tokens in float64; and what timm makes of a photograph with its own transform, in
float32.
"""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

import timm
import torch
from record_timm import HERE, LABELS, answer, images, randomise
from record_timm_eva import photograph
from safetensors.torch import save_file
from timm.layers import GroupNormAct, StdConv2dSame
from timm.models import save_for_hf, vision_transformer_hybrid
from timm.models.resnetv2 import ResNetV2, create_resnetv2_stem
from torch import Tensor, nn

TINY: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "num_classes": 5}
STEM, GROUPS = 8, 2
"""Channels of timm's have 64 and 32; everything else is timm's own."""
# Name, blocks of each stage, image size, another one, what is changed.
CASES: dict[str, tuple[str, tuple[int, ...], tuple[int, int], tuple[int, int], dict[str, Any]]] = {
    "r26": ("vit_small_r26_s32_224", (2, 1, 1, 1), (64, 64), (32, 96), {}),
    "r50": ("vit_base_r50_s16_384", (1, 2, 3), (32, 48), (64, 32), {"global_pool": "avg"}),
    "root": ("vit_tiny_r_s16_p8_224", (), (64, 64), (96, 32), {}),
    "features": ("vit_base_r50_s16_224", (1, 1), (16, 16), (24, 16), {"num_classes": 0}),
}


def backbone(layers: tuple[int, ...]) -> nn.Module:
    """As ``_resnetv2`` of timm's vision_transformer_hybrid.py, in fewer channels and groups."""
    common: dict[str, Any] = {
        "stem_type": "same",
        "preact": False,
        "conv_layer": partial(StdConv2dSame, eps=1e-8),
        "norm_layer": partial(GroupNormAct, num_groups=GROUPS),
    }
    if not layers:
        return create_resnetv2_stem(3, STEM, **common)
    channels = tuple(4 * STEM * 2**stage for stage in range(len(layers)))
    return ResNetV2(layers, channels, num_classes=0, global_pool="", stem_chs=STEM, **common)


@torch.inference_mode()
def described(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    logits = answer(model, pixels)
    tokens: Tensor = model.forward_features(pixels.double())
    features: Tensor = model.forward_head(tokens, pre_logits=True)
    found = {"logits": logits} if model.num_classes else {}
    return {"pixels": pixels, **found, "features": features.contiguous(), "tokens": tokens.contiguous()}


def record(case: str, seed: int) -> None:
    name, layers, size, other, changes = CASES[case]
    vision_transformer_hybrid._resnetv2 = lambda *_, **__: backbone(layers)
    model = timm.create_model(name, img_size=size, **{**TINY, **changes})
    randomise(model, seed)
    folder = HERE / "timm_hybrid" / case
    labels = {"label_names": LABELS} if model.num_classes else {}
    save_for_hf(model.half(), folder, model_config=labels, safe_serialization=True)
    made = {"photograph": photograph(model), **described(model, images(*size))}
    # The table is interpolated in float32, as when timm loads it for another size.
    model.float().set_input_size(other)
    found = described(model, images(*other))
    save_file(made | {f"other.{key}": value for key, value in found.items()}, folder / "answer.safetensors")


def main() -> None:
    for seed, case in enumerate(CASES):
        shutil.rmtree(HERE / "timm_hybrid" / case, ignore_errors=True)
        record(case, seed)


if __name__ == "__main__":
    main()
