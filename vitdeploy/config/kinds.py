"""The kinds of configuration, and how each is written as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from vitdeploy.config.common import ModelConfig
from vitdeploy.config.qwen import QwenVisionConfig
from vitdeploy.config.swin import SwinConfig
from vitdeploy.config.vit import ViTConfig
from vitdeploy.errors import ConfigError, did_you_mean

CONFIGS: Mapping[str, type[ModelConfig]] = {
    config.kind: config for config in (ViTConfig, SwinConfig, QwenVisionConfig)
}
"""The configuration of every kind."""


def model_type(fields: Mapping[str, object]) -> tuple[type[ModelConfig], dict[str, object]]:
    """The class of a configuration that was written as JSON, and its fields without ``kind``.

    Bundles name no kind where it is ``vit``: the first ones knew no other.

    Raises:
        ConfigError: the kind is unknown.
    """
    kind = fields.get("kind", ViTConfig.kind)
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise ConfigError(f"unknown kind of model {kind!r}{did_you_mean(str(kind), CONFIGS)}")
    rest = {name: value for name, value in fields.items() if name != "kind"}
    late = rest.pop(_NORM_AFTER_POOL, None) if CONFIGS[kind] is ViTConfig else None
    if late is True:
        rest.setdefault("final_norm", "read")
    elif late not in (None, False):
        raise ConfigError(f"{_NORM_AFTER_POOL} must be true or false, not {late!r}")
    return CONFIGS[kind], rest


def model_fields(config: ModelConfig) -> dict[str, Any]:
    """A configuration as it is written as JSON; :func:`model_type` is the way back.

    Fields that bundles of 0.1.0 do not have are written where they are not what those bundles mean.
    """
    this: Any = config
    values = asdict(this)
    if not isinstance(config, ViTConfig):
        return {"kind": config.kind} | values
    usual = {field.name: field.default for field in fields(ViTConfig)}
    values = {n: v for n, v in values.items() if n not in _NEWER or v != usual[n]}
    late = config.final_norm in ("pooled", "read")
    if config.final_norm == "read":
        del values["final_norm"]
    return values | {_NORM_AFTER_POOL: late}


_NORM_AFTER_POOL = "norm_after_pool"
"""How bundles of 0.1.0 write a final norm on whatever is read, instead of on tokens."""
_NEWER = frozenset(
    (
        *("mlp_norm", "head_on", "projection", "codes", "patch_bias", "pre_norm", "rotary", "key_bias"),
        *("score_bias", "final_norm", "stem"),
    )
)
"""Fields that bundles of 0.1.0 do not have."""
