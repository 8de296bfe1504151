"""transformers' ``dinov3_vit``.

Siméoni et al. 2025 (https://arxiv.org/abs/2508.10104): rotary positions on the patches, registers, layer
scale, SwiGLU in some sizes, keys without a bias. There is no table of positions: rotations are computed for
any size. The pooled vector is the CLS token behind the final norm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vitdeploy.checkpoint.families import huggingface
from vitdeploy.checkpoint.families.base import (
    Family,
    Foreign,
    Layout,
    Reading,
    Source,
    config_integer,
    config_number,
    flat,
    join_halves,
    linear,
    rename_tensors,
)
from vitdeploy.checkpoint.families.infer import heads_note, heads_of_64, infer_config
from vitdeploy.checkpoint.families.positions import PositionRule
from vitdeploy.checkpoint.refusals import OTHER_MODEL
from vitdeploy.config import Rotary, ViTConfig
from vitdeploy.errors import CheckpointError

MODEL_TYPE = "dinov3_vit"

_BODY: Layout = {
    **linear("patch_embed", "embeddings.patch_embeddings"),
    "cls_token": Source("embeddings.cls_token", flat(1)),
    "registers": Source("embeddings.register_tokens", flat(2)),
    **linear("blocks.{i}.norm1", "layer.{i}.norm1"),
    **linear("blocks.{i}.attn.q", "layer.{i}.attention.q_proj"),
    **linear("blocks.{i}.attn.k", "layer.{i}.attention.k_proj"),
    **linear("blocks.{i}.attn.v", "layer.{i}.attention.v_proj"),
    **linear("blocks.{i}.attn.proj", "layer.{i}.attention.o_proj"),
    "blocks.{i}.scale1": Source("layer.{i}.layer_scale1.lambda1"),
    **linear("blocks.{i}.norm2", "layer.{i}.norm2"),
    **linear("blocks.{i}.mlp.fc2", "layer.{i}.mlp.down_proj"),
    "blocks.{i}.scale2": Source("layer.{i}.layer_scale2.lambda1"),
    **linear("norm", "norm"),
}
_MLP: Layout = {**_BODY, **linear("blocks.{i}.mlp.fc1", "layer.{i}.mlp.up_proj")}
_SWIGLU: Layout = {**_BODY, **linear("blocks.{i}.mlp.fc1", "layer.{i}.mlp.gate_up_proj")}

_DEFAULTS: Mapping[str, object] = {
    "hidden_size": 384,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "num_register_tokens": 0,
    "layer_norm_eps": 1e-5,
    "rope_theta": 100.0,
}
"""What config.json means where it leaves these out, unlike those of the other families."""
_BIASES: Mapping[str, bool] = {
    "query_bias": True,
    "key_bias": False,
    "value_bias": True,
    "proj_bias": True,
    "mlp_bias": True,
}
_IN_MEMORY = re.compile(r"^model\.layer\.")


def _claims(foreign: Foreign) -> bool:
    if foreign.config is not None and "model_type" in foreign.config:
        return foreign.config["model_type"] == MODEL_TYPE
    return {"embeddings.patch_embeddings.weight", "embeddings.register_tokens"} <= foreign.state.keys()


def _read(foreign: Foreign, template: ViTConfig | None) -> Reading:
    renamed, originals = rename_tensors(foreign.state, lambda name: _IN_MEMORY.sub("layer.", name))
    joined = join_halves(renamed, (".gate_proj.", ".up_proj."), ".gate_up_proj.")
    state = {name: tensor for name, tensor in joined.items() if tensor.numel()}  # no register is an empty one
    given = {**_DEFAULTS, **(foreign.config or {})}
    gated = any(".gate_up_proj." in name for name in state)
    fields: dict[str, Any] = {
        "position": "none",
        "position_prefix": 0,
        "rotary": Rotary("centred", config_number(given, "rope_theta", 0)),
        "layer_scale": True,
        "norm_eps": config_number(given, "layer_norm_eps", 0),
    }
    if foreign.config is not None:
        gated = bool(given.get("use_gated_mlp", False))
        registers = config_integer(given, "num_register_tokens", 0)
        fields |= {"gated_mlp": gated, "registers": registers, **_biases(given, foreign.source)}
    layout = _SWIGLU if gated else _MLP
    notes: dict[str, str | None] = {}
    if foreign.config is None and template is None:
        sizes = [] if foreign.wanted is None else [foreign.wanted]
        config = infer_config(layout, state, foreign.source, heads=heads_of_64, sizes=sizes, **fields)
        notes = {"heads": heads_note(config)}
    else:
        described = foreign if foreign.config is None else replace(foreign, config=given)
        config = huggingface.config_of(described, template, layout, state, **fields)
    reading = huggingface.reading(
        foreign,
        config,
        model_type=MODEL_TYPE,
        layout=layout,
        state=state,
        originals=originals,
        headless=(),
        follows_processor=True,
    )
    return replace(reading, assumed={**reading.assumed, **notes})


def _biases(config: Mapping[str, object], source: str) -> dict[str, bool]:
    """The biases of queries, keys and values.

    Raises:
        CheckpointError: a bias is left out that all layers have here.
    """
    has = {name: bool(config.get(name, usual)) for name, usual in _BIASES.items()}
    queries, keys, values, *others = has.values()
    if queries != values or (keys and not queries) or not all(others):
        stated = ", ".join(f"{name} {str(value).lower()}" for name, value in has.items())
        raise CheckpointError(
            f"{source}: {stated} of config.json are not supported together", hint=OTHER_MODEL
        )
    return {"qkv_bias": queries, "key_bias": keys or not queries}


FAMILY = Family(MODEL_TYPE, _claims, _read, PositionRule())
