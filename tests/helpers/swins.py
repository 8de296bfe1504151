"""Small Swins that exercise every switch of the configuration, at maps that windows divide or not."""

from __future__ import annotations

from typing import Any

from tests.helpers.models import random_state
from vitdeploy.config import SwinConfig
from vitdeploy.model.registry import build_reference
from vitdeploy.model.swin import Swin

SMALL: dict[str, Any] = {
    "image_size": (32, 32),
    "patch_size": 2,
    "width": 16,
    "depths": (2, 3),
    "heads": (2, 4),
    "windows": ((4, 4), (4, 4)),
    "shifts": ((2, 2), (2, 2)),
    "classes": 5,
}
V2: dict[str, Any] = {"version": 2, "window_rule": "fixed", "mask": -200.0}

SWINS: dict[str, SwinConfig] = {
    "v1": SwinConfig(**SMALL),
    "not_square": SwinConfig(**SMALL | {"image_size": (32, 48)}),
    "padded": SwinConfig(**SMALL | {"image_size": (36, 52)}),
    "odd_map": SwinConfig(**SMALL | {"image_size": (34, 22)}),
    "one_window": SwinConfig(**SMALL | {"image_size": (16, 16)}),
    "no_qkv_bias": SwinConfig(**SMALL, qkv_bias=False, activation="relu", mlp_ratio=2.5),
    "positions": SwinConfig(**SMALL, position=True),
    "padded_positions": SwinConfig(**SMALL | {"image_size": (36, 32)}, position=True),
    "three_stages": SwinConfig(
        **SMALL | {"depths": (1, 2, 1), "heads": (1, 2, 4), "windows": ((4, 4),) * 3, "shifts": ((1, 1),) * 3}
    ),
    "wide": SwinConfig(**SMALL | {"width": 192}),
    "oblong_windows": SwinConfig(
        **SMALL | {"windows": ((4, 2), (2, 4)), "shifts": ((2, 1), (1, 0))}, window_rule="sides"
    ),
    "padded_late": SwinConfig(**SMALL | {"image_size": (36, 52)}, window_rule="sides", pad_first=False),
    "small_maps": SwinConfig(**SMALL | {"image_size": (12, 6)}, window_rule="sides", pad_first=False),
    "v2": SwinConfig(**SMALL, **V2),
    "v2_padded": SwinConfig(**SMALL | {"image_size": (36, 52)}, **V2, pretrained_windows=((3, 3), (0, 0))),
    "v2_small": SwinConfig(**SMALL | {"image_size": (6, 10)}, **V2),
    "v2_no_head": SwinConfig(**SMALL | {"classes": 0}, **V2, qkv_bias=False),
}


def random_swin(config: SwinConfig, seed: int = 0, spread: float = 0.3) -> Swin:
    swin = build_reference(config, random_state(config, seed, spread))
    assert isinstance(swin, Swin)
    return swin
