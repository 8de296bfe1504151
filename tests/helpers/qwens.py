"""Small towers of Qwen's that exercise every switch of the configuration."""

from __future__ import annotations

from typing import Any

from vitdeploy.config import QwenVisionConfig

SMALL: dict[str, Any] = {
    "image_size": (24, 40),
    "patch_size": 4,
    "width": 32,
    "depth": 3,
    "heads": 2,
    "mlp_width": 48,
    "out_width": 24,
}
RAGGED = {"image_size": (80, 112), "window": 32, "full_attention": (1,)}
"""20 x 28 patches: six windows of 64, five of 32, one of 16."""
QWEN2_5: dict[str, Any] = {"norm": "rms", "gated_mlp": True, "activation": "silu"}
QWEN3: dict[str, Any] = {"activation": "gelu_tanh", "patch_bias": True, "positions": 6, "taps": (0, 1)}
CONFIGS: dict[str, QwenVisionConfig] = {
    "qwen2": QwenVisionConfig(**SMALL),
    "qwen2_5": QwenVisionConfig(**{**SMALL, **QWEN2_5, **RAGGED}),
    "whole_windows": QwenVisionConfig(**{**SMALL, **QWEN2_5, **RAGGED, "image_size": (64, 64)}),
    "one_window": QwenVisionConfig(**{**SMALL, **QWEN2_5, **RAGGED, "image_size": (32, 24)}),
    "qwen3": QwenVisionConfig(**{**SMALL, **QWEN3}),
    "qwen3_5": QwenVisionConfig(**{**SMALL, **QWEN3, "taps": ()}),
    # What no published tower has, but the switches allow.
    "all": QwenVisionConfig(**{**SMALL, **QWEN2_5, **QWEN3, **RAGGED, "channels": 1, "temporal_patch": 3}),
    "merge_3": QwenVisionConfig(**{**SMALL, **QWEN2_5, "image_size": (48, 36), "merge": 3, "window": 24}),
}
