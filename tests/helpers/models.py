"""Small models that exercise every switch of the configuration, with weights that leave nothing zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitdeploy.config import ModelConfig, Rotary, ViTConfig
from vitdeploy.model.registry import build_reference, expected_shapes
from vitdeploy.model.vit import ViT

SMALL: dict[str, Any] = {
    "image_size": (32, 48),
    "patch_size": 8,
    "width": 48,
    "depth": 3,
    "heads": 3,
    "mlp_width": 96,
    "classes": 10,
}

CONFIGS: dict[str, ViTConfig] = {
    "vit": ViTConfig(**SMALL),
    "no_qkv_bias": ViTConfig(**SMALL, qkv_bias=False),
    "quick_gelu": ViTConfig(**SMALL, activation="quick_gelu"),
    "gelu_tanh": ViTConfig(**SMALL, activation="gelu_tanh"),
    "distilled": ViTConfig(**SMALL, distillation_token=True, position_prefix=2, pool="both_heads"),
    "deit3": ViTConfig(**SMALL, layer_scale=True, position_prefix=0),
    "dinov2": ViTConfig(
        **SMALL, registers=4, pool="cls_mean", layer_scale=True, gated_mlp=True, activation="silu"
    ),
    "mean": ViTConfig(
        **SMALL, cls_token=False, position="sincos2d", position_prefix=0, pool="mean", final_norm="read"
    ),
    "no_position": ViTConfig(**SMALL, position="none", position_prefix=0, representation_width=20),
    "no_head": ViTConfig(**{**SMALL, "classes": 0}, registers=2),
    "clip": ViTConfig(
        **SMALL, patch_bias=False, pre_norm=True, final_norm="pooled", projection=20, activation="quick_gelu"
    ),
    "zero_shot": ViTConfig(**SMALL, projection=20, head_on="embedding"),
    "siglip": ViTConfig(
        **SMALL, cls_token=False, position_prefix=0, pool="probe", activation="gelu_tanh", head_on="embedding"
    ),
    "dinov3": ViTConfig(
        **SMALL,
        registers=4,
        position="none",
        position_prefix=0,
        rotary=Rotary("centred", 100.0),
        key_bias=False,
        layer_scale=True,
    ),
    "dinov3_timm": ViTConfig(
        **SMALL, registers=2, position="none", position_prefix=0, rotary=Rotary("centred_timm", 100.0)
    ),
    "rotary_key_bias": ViTConfig(**SMALL, rotary=Rotary("indexed", 10_000.0), pool="cls"),
    "eva02": ViTConfig(
        **SMALL,
        rotary=Rotary("indexed", 10_000.0, (16, 16)),
        key_bias=False,
        gated_mlp=True,
        activation="silu",
        mlp_norm=True,
        pool="mean",
        final_norm="pooled",
    ),
    "beit": ViTConfig(
        **SMALL,
        position="none",
        position_prefix=0,
        score_bias=True,
        key_bias=False,
        layer_scale=True,
        pool="mean",
        final_norm="pooled",
    ),
    "beit_codes": ViTConfig(**{**SMALL, "classes": 0}, codes=30, score_bias=True, key_bias=False),
    "blip": ViTConfig(**{**SMALL, "classes": 0}, final_norm="both"),
    "mean_of_unnormalised": ViTConfig(**SMALL, pool="mean", final_norm="none", pre_norm=True),
    "sincos1d": ViTConfig(**SMALL, position="sincos1d", position_prefix=0),
}


def random_state(config: ModelConfig, seed: int = 0, spread: float = 0.3) -> dict[str, Tensor]:
    """Weights in float32: norms near one, everything else normal with deviation ``spread``."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in expected_shapes(config).items():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        state[name] = torch.randn(shape, generator=generator) * spread + centre
    return state


def random_vit(config: ViTConfig, seed: int = 0, spread: float = 0.3) -> ViT:
    return build_reference(config, random_state(config, seed, spread))


def pixels(config: ModelConfig, count: int = 3, seed: int = 1) -> Tensor:
    """Normalised images, (count, C, H, W) float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, config.channels, *config.image_size), generator=generator)
