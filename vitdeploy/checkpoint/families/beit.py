"""transformers' ``beit``: a classifier, a model without a head, and its pre-training's head over every patch.

Bao et al. 2021 (https://arxiv.org/abs/2106.08254), Peng et al. 2022 (https://arxiv.org/abs/2208.06366):
relative positions of their own in each block or shared by all, keys without a bias, layer scale. Classifiers
read the norm of the patches' mean, their tokens are not normalised; with ``use_mean_pooling`` false they read
CLS. What a model with ``lm_head`` returns as tokens is what that head reads.
"""

from __future__ import annotations

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
    config_number,
    linear,
)
from vitdeploy.checkpoint.families.positions import PositionRule, bilinear_offsets
from vitdeploy.checkpoint.refusals import OTHER_MODEL
from vitdeploy.config import Size, ViTConfig
from vitdeploy.errors import CheckpointError

_TABLE = "relative_position_bias.relative_position_bias_table"
_SHARED = f"encoder.{_TABLE}"
_BODY: Layout = {
    **huggingface.EMBEDDINGS,
    **huggingface.VIT_BLOCK,
    "blocks.{i}.scale1": Source("encoder.layer.{i}.lambda_1"),
    "blocks.{i}.scale2": Source("encoder.layer.{i}.lambda_2"),
    "blocks.{i}.attn.score_bias": Source(f"encoder.layer.{{i}}.attention.attention.{_TABLE}"),
    **linear("head", "classifier"),
    **linear("code_head", "lm_head"),
}


def _claims(foreign: Foreign) -> bool:
    ends = (".lambda_1", ".relative_position_bias_table")
    return huggingface.claims(foreign, "beit", any(name.endswith(ends) for name in foreign.state))


def _read(foreign: Foreign, template: ViTConfig | None) -> Reading:
    if {"beit.layernorm.weight", "layernorm.weight"} <= foreign.state.keys():
        raise CheckpointError(
            f"{foreign.source}: BEiT with lm_head and use_mean_pooling false has two final norms in a row, "
            "which is not supported",
            hint=OTHER_MODEL,
        )
    state, originals = huggingface.file_names(foreign, "beit", vit_mlp=True)
    codes = "lm_head.weight" in state
    given = foreign.config
    mean = "layernorm.weight" not in state if given is None else bool(given.get("use_mean_pooling", True))
    late = mean and not codes
    layout = {**_BODY, **linear("norm", "pooler.layernorm" if late else "layernorm")}
    if _is_shared(given, state):
        # A copy for each block, as blocks have tables of their own.
        layout["blocks.{i}.attn.score_bias"] = Source(_SHARED, Tensor.clone)
    config = huggingface.config_of(
        foreign,
        template,
        layout,
        state,
        norm_eps=1e-12,
        pool="mean" if mean or codes else "cls",
        final_norm="pooled" if late else "tokens",
        **_stated_fields(given, state),
    )
    return huggingface.reading(
        foreign,
        config,
        model_type="beit",
        layout=layout,
        state=state,
        originals=originals,
        headless=("classifier.", "lm_head.", *(("layernorm.",) if codes else ())),
    )


def _is_shared(given: Mapping[str, object] | None, state: Mapping[str, Tensor]) -> bool:
    return _SHARED in state if given is None else bool(given.get("use_shared_relative_position_bias", False))


def _stated_fields(given: Mapping[str, object] | None, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What config.json says; without one, what the tensors' shapes do not tell."""
    if given is None:
        absolute = "embeddings.position_embeddings" in state
    else:
        absolute = bool(given.get("use_absolute_position_embeddings", False))
    fields: dict[str, Any] = {} if absolute else {"position": "none", "position_prefix": 0}
    if given is None:
        return fields
    head = state.get("lm_head.weight")
    return fields | {
        "key_bias": False,
        "score_bias": _is_shared(given, state) or bool(given.get("use_relative_position_bias", False)),
        "layer_scale": config_number(given, "layer_scale_init_value", 0.1) > 0,
        "codes": head.shape[0] if head is not None and head.ndim else 0,
    }


def _swapped(offsets: Tensor, source: Size, target: Size) -> Tensor:
    """As transformers does at every size: it takes the table's rows for its columns."""
    return bilinear_offsets(offsets, (source[1], source[0]), target)


FAMILY = Family(
    "beit", _claims, _read, PositionRule(square_source=True, even_at_own_size=True, offsets=_swapped)
)
