"""The vision towers of transformers' ``qwen2_vl``, ``qwen2_5_vl``, ``qwen3_vl`` and their kin.

They are read alone, or out of the whole model, of which nothing else is read.

Qwen3-VL's tower serves the mixture of experts, too, and without deepstack Qwen3.5. Positions are computed, or
interpolated from the table as it is, for any size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitdeploy.checkpoint.families.base import (
    Family,
    Foreign,
    Layout,
    Reading,
    Source,
    config_integer,
    config_number,
    config_object,
    join_halves,
    linear,
    merged_qkv,
    rename_tensors,
)
from vitdeploy.checkpoint.families.huggingface import activation_of
from vitdeploy.checkpoint.families.positions import PositionRule
from vitdeploy.checkpoint.refusals import CORRECT, shown
from vitdeploy.config import Preprocess, QwenVisionConfig, Size, ViTConfig
from vitdeploy.errors import CheckpointError
from vitdeploy.images.preprocess import at_size, from_huggingface

_DEFAULT_SIDE = 448
"""Pixels: four windows of Qwen2.5-VL, 16 features of 28 pixels or 14 of 32."""
_PREFIX = "visual."
_PARTS = (_PREFIX, f"model.{_PREFIX}")
_BODY: Layout = {
    "patch_embed.weight": Source("patch_embed.proj.weight", lambda tensor: tensor.flatten(1)),
    "patch_embed.bias": Source("patch_embed.proj.bias"),
    "pos_embed": Source("pos_embed.weight"),
    **linear("blocks.{i}.norm1", "blocks.{i}.norm1"),
    **merged_qkv("blocks.{i}.attn.qkv.weight", "blocks.{i}.attn.qkv.bias"),
    **linear("blocks.{i}.attn.proj", "blocks.{i}.attn.proj"),
    **linear("blocks.{i}.norm2", "blocks.{i}.norm2"),
}


def _layout(mlp: tuple[str, str], merger: tuple[str, str, str]) -> Layout:
    """Names of a generation: of the MLP's two layers, and of the merger's norm and layers."""
    norm, fc1, fc2 = merger
    layers: Layout = {
        **linear("blocks.{i}.mlp.fc1", f"blocks.{{i}}.mlp.{mlp[0]}"),
        **linear("blocks.{i}.mlp.fc2", f"blocks.{{i}}.mlp.{mlp[1]}"),
    }
    mergers: Layout = {
        name: source
        for ours, theirs in (("merger", "merger"), ("deepstack.{i}", "deepstack_merger_list.{i}"))
        for part, layer in (("norm", norm), ("fc1", fc1), ("fc2", fc2))
        for name, source in linear(f"{ours}.{part}", f"{theirs}.{layer}").items()
    }
    return {**_BODY, **layers, **mergers}


@dataclass(frozen=True)
class _Generation:
    layout: Layout
    defaults: Mapping[str, Any]
    """What config.json means where it leaves these out."""
    fields: Mapping[str, Any]
    """What all of its towers have."""
    processor: Mapping[str, Any]
    """What its processors have where no file says it."""


_OLD_MERGER = ("ln_q", "mlp.0", "mlp.2")
_QWEN2 = _Generation(
    _layout(("fc1", "fc2"), _OLD_MERGER),
    {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "hidden_act": "quick_gelu", "patch_size": 14},
    {},
    {},
)
_QWEN2_5 = _Generation(
    _layout(("gate_up_proj", "down_proj"), _OLD_MERGER),
    {
        "depth": 32,
        "hidden_size": 3584,
        "intermediate_size": 3420,
        "hidden_act": "silu",
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": (7, 15, 23, 31),
    },
    {"gated_mlp": True, "norm": "rms"},
    {},
)
_QWEN3 = _Generation(
    _layout(("linear_fc1", "linear_fc2"), ("norm", "linear_fc1", "linear_fc2")),
    {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "hidden_act": "gelu_pytorch_tanh",
        "patch_size": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": (8, 16, 24),
    },
    {"patch_bias": True},
    {"image_mean": 0.5, "image_std": 0.5},
)
_QWEN3_5 = _Generation(
    _QWEN3.layout, {**_QWEN3.defaults, "deepstack_visual_indexes": ()}, _QWEN3.fields, _QWEN3.processor
)
_GENERATIONS: Mapping[str, _Generation] = {
    "qwen2_vl": _QWEN2,
    "qwen2_5_vl": _QWEN2_5,
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": _QWEN3_5,
}
"""By the model type of the whole; that of a tower alone may end in ``_vision``."""
MODEL_TYPES = tuple(_GENERATIONS)


def part_of(config: Mapping[str, object] | None) -> tuple[str, ...]:
    """What the names begin with that are read of a whole model; none where a checkpoint is read as it is."""
    return _PARTS if config is not None and config.get("model_type") in MODEL_TYPES else ()


def _kind(config: Mapping[str, object] | None) -> str:
    return str((config or {}).get("model_type")).removesuffix("_vision")


def _claims(foreign: Foreign) -> bool:
    """Those that are not read, too: to refuse them by name."""
    if foreign.config is None or "model_type" not in foreign.config:
        names = [name.removeprefix(_PREFIX) for name in foreign.state]
        return "merger.ln_q.weight" in names or "merger.linear_fc1.weight" in names
    return _kind(foreign.config).startswith("qwen")


def _read(foreign: Foreign, template: ViTConfig | None) -> Reading:
    given = foreign.config or {}
    if "model_type" not in given:
        raise CheckpointError(
            f"{foreign.source}: there is no config.json beside the weights of this vision tower of Qwen's",
            hint="keep it in its folder: no tensor tells its heads and windows",
        )
    if (kind := _kind(given)) not in _GENERATIONS:
        raise CheckpointError(
            f"{foreign.source}: model_type {shown(given.get('model_type'))} in config.json has no vision "
            "tower that is supported",
            hint=f"of Qwen's, these are read: {', '.join(MODEL_TYPES)}",
        )
    generation = _GENERATIONS[kind]
    tower = {**generation.defaults, **(config_object(given, "vision_config") or given)}
    config = _config(tower, generation)
    base = _preprocess(foreign, config, generation)
    height, width = config.image_size
    said = [
        f"images are resized to the bundle's size ({height}x{width} unless you name another), not by the "
        "processor's smart_resize, which gives every image a size of its own"
    ]
    if config.window and height % config.window:
        said.append(f"{config.window} pixels are a window: multiples of it run fastest")
    assumed: dict[str, str | None] = {}
    if foreign.processor is None:
        assumed["preprocess"] = (
            "no preprocessor_config.json: mean and std are those of the published checkpoints"
        )
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in foreign.state) else ""
    state, originals = rename_tensors(foreign.state, lambda name: name.removeprefix(prefix))
    return Reading(
        config=config,
        layout=generation.layout,
        state=join_halves(state, (".gate_proj.", ".up_proj."), ".gate_up_proj."),
        preprocess=lambda size: base if size in (None, base.size) else at_size(base, size),
        notes=tuple(said),
        assumed=assumed,
        originals=originals,
        spell=lambda name: f"{prefix}{name}",
    )


def _config(tower: Mapping[str, object], generation: _Generation) -> QwenVisionConfig:
    """The configuration of a ``vision_config``.

    Raises:
        CheckpointError: a value is wrong, or not supported.
    """

    def number(key: str, default: int) -> int:
        return config_integer(tower, key, default)

    of_qwen2 = "embed_dim" in generation.defaults
    width = number("embed_dim" if of_qwen2 else "hidden_size", 0)
    patch, merge = number("patch_size", 0), number("spatial_merge_size", 2)
    table = number("num_position_embeddings", 0)
    block = max(1, patch * merge)
    side = max(1, round(_DEFAULT_SIDE / block)) * block
    fields = {
        **generation.fields,
        "image_size": (side, side),
        "patch_size": patch,
        "temporal_patch": number("temporal_patch_size", 2),
        "merge": merge,
        "channels": number("in_channels", 3),
        "width": width,
        "depth": number("depth", 0),
        "heads": number("num_heads", 16),
        "mlp_width": int(width * config_number(tower, "mlp_ratio", 4))
        if of_qwen2
        else number("intermediate_size", 0),
        "activation": activation_of(tower, ""),
        "positions": int(table**0.5),
        "rotary_base": _rotary_base(tower),
        "window": number("window_size", 0),
        "full_attention": _blocks(tower, "fullatt_block_indexes"),
        "taps": _blocks(tower, "deepstack_visual_indexes"),
        "out_width": number("hidden_size" if of_qwen2 else "out_hidden_size", 3584),
    }
    return QwenVisionConfig(**fields)


def _rotary_base(tower: Mapping[str, object]) -> float:
    rotary = config_object(tower, "rope_parameters")
    if rotary.get("rope_type", "axial") != "axial":
        raise CheckpointError(
            f"config.json: rope_type {shown(rotary['rope_type'])} is not supported", hint="supported: axial"
        )
    return config_number(rotary, "rope_theta", 10_000)


def _blocks(tower: Mapping[str, object], key: str) -> tuple[int, ...]:
    value = tower.get(key) or ()
    if not isinstance(value, (list, tuple)) or not all(type(block) is int for block in value):
        raise CheckpointError(
            f"config.json: {key} must be numbers of blocks, not {shown(value)}", hint=CORRECT
        )
    return tuple(value)


_GEOMETRY = ("size", "min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size")
"""What a processor says of smart_resize and of patches, whose sizes config.json tells."""


def _preprocess(foreign: Foreign, config: QwenVisionConfig, generation: _Generation) -> Preprocess:
    """To the model's size, whatever an image's shape: bicubic, unless the processor says otherwise."""
    given: Mapping[str, object] = foreign.processor or generation.processor
    height, width = config.image_size
    size: Size | dict[str, int] = {"height": height, "width": width}
    settings = {key: value for key, value in given.items() if key not in _GEOMETRY} | {"size": size}
    return from_huggingface(settings, "qwen2_vl", config.channels)


FAMILY = Family("qwen_vl", _claims, _read, PositionRule())
