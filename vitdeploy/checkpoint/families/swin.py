"""transformers' ``swin`` and ``swinv2``: a classifier, a model without a head, the encoder of SimMIM.

Liu et al. 2021 (https://arxiv.org/abs/2103.14030), Liu et al. 2022 (https://arxiv.org/abs/2111.09883). In
version 1, windows follow the map that they are cut from; in version 2, the map of config.json's image size,
whatever images come in, and the mask of shifted windows is added twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitdeploy.checkpoint.families import huggingface
from vitdeploy.checkpoint.families.base import (
    Family,
    Foreign,
    Layout,
    Reading,
    Source,
    config_integer,
    config_number,
    height_and_width,
    linear,
    rename_tensors,
    sole_head,
)
from vitdeploy.checkpoint.families.positions import PositionRule
from vitdeploy.checkpoint.refusals import CORRECT, OTHER_MODEL, shown
from vitdeploy.config import SwinConfig, ViTConfig
from vitdeploy.errors import CheckpointError

V1, V2 = "swin", "swinv2"
"""Model types."""

_BLOCK = "encoder.layers.{i}.blocks.{j}"
_OURS = "layers.{i}.blocks.{j}"
_TABLE = "relative_position_bias_table"
_MLP = "continuous_position_bias_mlp"
_LAYOUT: Layout = {
    **linear("patch_embed", "embeddings.patch_embeddings.projection"),
    **linear("patch_norm", "embeddings.norm"),
    "pos_embed": Source("embeddings.position_embeddings", lambda tensor: tensor.flatten(0, -2)),
    **linear(f"{_OURS}.norm1", f"{_BLOCK}.layernorm_before"),
    **linear(f"{_OURS}.attn.q", f"{_BLOCK}.attention.self.query"),
    **linear(f"{_OURS}.attn.k", f"{_BLOCK}.attention.self.key"),
    **linear(f"{_OURS}.attn.v", f"{_BLOCK}.attention.self.value"),
    **linear(f"{_OURS}.attn.proj", f"{_BLOCK}.attention.output.dense"),
    f"{_OURS}.attn.score_bias.table": Source(f"{_BLOCK}.attention.self.{_TABLE}"),
    **linear(f"{_OURS}.attn.score_bias.fc1", f"{_BLOCK}.attention.self.{_MLP}.0"),
    f"{_OURS}.attn.score_bias.fc2.weight": Source(f"{_BLOCK}.attention.self.{_MLP}.2.weight"),
    f"{_OURS}.attn.log_scale": Source(f"{_BLOCK}.attention.self.logit_scale", Tensor.flatten),
    **linear(f"{_OURS}.norm2", f"{_BLOCK}.layernorm_after"),
    **linear(f"{_OURS}.mlp.fc1", f"{_BLOCK}.intermediate.dense"),
    **linear(f"{_OURS}.mlp.fc2", f"{_BLOCK}.output.dense"),
    **linear("layers.{i}.merge.norm", "encoder.layers.{i}.downsample.norm"),
    "layers.{i}.merge.reduction.weight": Source("encoder.layers.{i}.downsample.reduction.weight"),
    **linear("norm", "layernorm"),
    **linear("head", "classifier"),
}
# Names in the memory of transformers 5, of version 1; files have those of transformers 4.
_IN_MEMORY = (
    (re.compile(r"\.attention\.q_proj\."), ".attention.self.query."),
    (re.compile(r"\.attention\.k_proj\."), ".attention.self.key."),
    (re.compile(r"\.attention\.v_proj\."), ".attention.self.value."),
    (re.compile(r"\.attention\.o_proj\."), ".attention.output.dense."),
    (re.compile(r"\.attention\.relative_position_bias\."), ".attention.self."),
    (re.compile(r"\.mlp\.fc1\."), ".intermediate.dense."),
    (re.compile(r"\.mlp\.fc2\."), ".output.dense."),
)
_IGNORED = {
    **huggingface.IGNORED,
    r".*\.attention\.self\.relative_coords_table": None,
}


def _claims(foreign: Foreign, model_type: str) -> bool:
    sign = _MLP if model_type == V2 else _TABLE
    staged = (name for name in foreign.state if ".blocks." in name)
    return huggingface.claims(foreign, model_type, any(sign in name for name in staged))


def _read(foreign: Foreign, template: ViTConfig | None, model_type: str) -> Reading:
    if foreign.config is None:
        raise CheckpointError(
            f"{foreign.source}: there is no config.json beside a Swin's weights, which do not tell it all",
            hint="keep it in its folder",
        )
    head = sole_head(foreign.state, "classifier")

    def rename(name: str) -> str:
        layer, _, leaf = name.rpartition(".")
        if layer == head:
            return f"classifier.{leaf}"
        name = name.removeprefix(f"{model_type}.")
        for pattern, replacement in _IN_MEMORY:
            name = pattern.sub(replacement, name)
        return name

    state, originals = rename_tensors(foreign.state, rename)
    return huggingface.reading(
        foreign,
        _config(foreign.config, state, model_type),
        model_type=model_type,
        layout=_LAYOUT,
        state=state,
        originals=originals,
        headless=("classifier.", "decoder."),
        ignored=_IGNORED,
    )


def _config(config: Mapping[str, object], state: Mapping[str, Tensor], model_type: str) -> SwinConfig:
    patch = height_and_width(config.get("patch_size", 4), "patch_size")
    if patch[0] != patch[1]:
        raise CheckpointError(f"config.json: patch_size {list(patch)} is not square", hint=CORRECT)
    size = height_and_width(config.get("image_size", 224), "image_size")
    depths = _integers(config, "depths", (2, 2, 6, 2))
    window = config_integer(config, "window_size", 7)
    if model_type == V2:
        if config.get("use_absolute_embeddings"):
            raise CheckpointError(
                "config.json: use_absolute_embeddings is not supported in version 2, where transformers "
                "cannot run it either",
                hint=OTHER_MODEL,
            )
        windows = _fixed(config, size[0] // patch[0], window, depths)
    else:
        sides, shift = (window, window), (window // 2, window // 2)
        windows = {"windows": (sides,) * len(depths), "shifts": (shift,) * len(depths)}
    return SwinConfig(
        image_size=size,
        patch_size=patch[0],
        channels=config_integer(config, "num_channels", 3),
        width=config_integer(config, "embed_dim", 96),
        depths=depths,
        heads=_integers(config, "num_heads", (3, 6, 12, 24)),
        mlp_ratio=config_number(config, "mlp_ratio", 4.0),
        activation=huggingface.activation_of(config, "gelu"),
        qkv_bias=bool(config.get("qkv_bias", True)),
        position=bool(config.get("use_absolute_embeddings", False)),
        norm_eps=config_number(config, "layer_norm_eps", 1e-5),
        classes=huggingface.classes_of(config, state.get("classifier.weight")),
        **windows,
    )


def _fixed(config: Mapping[str, object], rows: int, window: int, depths: tuple[int, ...]) -> dict[str, Any]:
    """Windows of version 2: settled by the rows of each stage's map at the configured size, rounded down."""
    sides = [rows // 2**stage for stage in range(len(depths))]
    shifts = [0 if side <= window else window // 2 for side in sides]
    measures = _integers(config, "pretrained_window_sizes", (0,) * len(depths))
    return {
        "version": 2,
        "windows": tuple((min(side, window),) * 2 for side in sides),
        "shifts": tuple((shift, shift) for shift in shifts),
        "window_rule": "fixed",
        "mask": -200.0,
        "pretrained_windows": tuple((measure, measure) for measure in measures[: len(depths)]),
    }


def _integers(config: Mapping[str, object], key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value = config.get(key, default)
    if not isinstance(value, (list, tuple)) or not value or not all(type(n) is int for n in value):
        raise CheckpointError(f"config.json: {key} must be whole numbers, not {shown(value)}", hint=CORRECT)
    return tuple(value)


def _family(model_type: str) -> Family:
    return Family(
        model_type,
        lambda foreign: _claims(foreign, model_type),
        lambda foreign, template: _read(foreign, template, model_type),
        PositionRule(square_source=True),
    )


FAMILY = _family(V1)
FAMILY_V2 = _family(V2)
