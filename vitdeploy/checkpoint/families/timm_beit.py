"""timm's Beit: ``beit_*`` and ``beitv2_*``, and the authors' own files, which have the same names.

Bao et al. 2021 (https://arxiv.org/abs/2106.08254), Peng et al. 2022 (https://arxiv.org/abs/2208.06366). The
authors' files of the pre-training have its head over every patch, ``lm_head``, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vitdeploy.checkpoint.families.base import (
    Family,
    Foreign,
    Layout,
    Reading,
    Source,
    config_object,
    flat,
    linear,
    rename_tensors,
    sole_head,
    third,
)
from vitdeploy.checkpoint.families.infer import what_is_open
from vitdeploy.checkpoint.families.positions import PositionRule
from vitdeploy.checkpoint.families.timm import (
    architecture_of,
    called,
    known_heads,
    reading_of,
    refuse,
    stated_fields,
)
from vitdeploy.checkpoint.families.timm_names import is_beit
from vitdeploy.checkpoint.refusals import shown
from vitdeploy.config import Size, ViTConfig
from vitdeploy.errors import CheckpointError

_EACH = "blocks.{i}.attn.relative_position_bias_table"
_SHARED = "rel_pos_bias.relative_position_bias_table"


def _claims(foreign: Foreign) -> bool:
    tables = _EACH.format(i=0), _SHARED
    names = {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"}
    return names <= foreign.state.keys() and not foreign.state.keys().isdisjoint(tables)


def _layout(state: Mapping[str, Tensor]) -> Layout:
    parts = {
        f"blocks.{{i}}.attn.{name}.weight": Source("blocks.{i}.attn.qkv.weight", third(index))
        for index, name in enumerate("qkv")
    }
    return {
        **linear("patch_embed", "patch_embed.proj"),
        "cls_token": Source("cls_token", flat(1)),
        "pos_embed": Source("pos_embed", flat(2)),
        **linear("blocks.{i}.norm1", "blocks.{i}.norm1"),
        **parts,
        "blocks.{i}.attn.q.bias": Source("blocks.{i}.attn.q_bias"),
        "blocks.{i}.attn.v.bias": Source("blocks.{i}.attn.v_bias"),
        # A copy of a shared table for each block, as blocks have tables of their own.
        "blocks.{i}.attn.score_bias": Source(_SHARED, Tensor.clone) if _SHARED in state else Source(_EACH),
        **linear("blocks.{i}.attn.proj", "blocks.{i}.attn.proj"),
        "blocks.{i}.scale1": Source("blocks.{i}.gamma_1"),
        **linear("blocks.{i}.norm2", "blocks.{i}.norm2"),
        **linear("blocks.{i}.mlp.fc1", "blocks.{i}.mlp.fc1"),
        **linear("blocks.{i}.mlp.fc2", "blocks.{i}.mlp.fc2"),
        "blocks.{i}.scale2": Source("blocks.{i}.gamma_2"),
        **linear("norm", "fc_norm" if "fc_norm.weight" in state else "norm"),
        **linear("head", "head"),
        **linear("code_head", "lm_head"),
    }


def _read(foreign: Foreign, template: ViTConfig | None) -> Reading:
    config = foreign.config or {}
    architecture, arguments = architecture_of(config), config_object(config, "model_args")
    unsupported = [] if not architecture or is_beit(architecture) else [called(architecture)]
    if arguments.get("norm_layer") not in (None, "layernorm"):
        unsupported.append(f"norm_layer {shown(arguments['norm_layer'])}")
    refuse(foreign.source, unsupported)
    head = sole_head(foreign.state, "head")

    def rename(name: str) -> str:
        layer, _, leaf = name.rpartition(".")
        return f"head.{leaf}" if layer == head else name

    state, originals = rename_tensors(foreign.state, rename)
    # The class pools the patches where nobody says otherwise.
    fields = {"pool": "mean", **stated_fields(foreign.source, architecture, config, state)}
    heads, sizes = what_is_open(template, foreign.wanted)
    table = state.get(_SHARED, state.get(_EACH.format(i=0)))
    if table is not None and table.ndim == 2 and table.shape[1]:
        columns = table.shape[1]
        heads = known_heads(architecture, arguments) or (lambda width: columns)
        weight = state["patch_embed.proj.weight"]
        if "pos_embed" not in state and not architecture and weight.ndim == 4 and weight.shape[-1]:
            fields["image_size"] = _own_size(foreign.source, len(table), weight.shape[-1], sizes)
    if "pos_embed" not in state:
        fields |= {"position": "none", "position_prefix": 0}
    reading = reading_of(foreign, template, _layout(state), state, originals, heads=heads, **fields)
    index = r"(blocks\.\d+\.attn|rel_pos_bias)\.relative_position_index"
    return replace(
        reading,
        ignored={**reading.ignored, index: None},
        assumed={name: note for name, note in reading.assumed.items() if name != "heads"},
    )


def _own_size(source: str, rows: int, patch: int, sizes: Sequence[Size]) -> Size:
    """The image size that a table of relative positions is for: one of ``sizes``, or a square.

    Raises:
        CheckpointError: it is for none of them.
    """
    side = (math.isqrt(max(rows - 3, 0)) + 1) // 2 * patch
    for height, width in (*sizes, (side, side)):
        if (2 * (height // patch) - 1) * (2 * (width // patch) - 1) == rows - 3:
            return height, width
    raise CheckpointError(
        f"{source}: the table of relative positions has {rows} rows: of no square grid or known size",
        hint="state its image size: --image-size HxW",
    )


def stretched(offsets: Tensor, source: Size, target: Size) -> Tensor:
    """As timm resizes tables: linear between offsets that lie the wider apart the farther out they are."""
    if source == target:
        return offsets
    down, right = (_weights(2 * n - 1, 2 * m - 1) for n, m in zip(source, target, strict=True))
    grid = offsets.double().unflatten(0, (down.shape[1], right.shape[1]))  # (rows, columns, h)
    return torch.einsum("yr,xc,rch->yxh", down, right, grid).flatten(0, 1)


def _weights(source: int, target: int) -> Tensor:
    """What each of ``target`` offsets takes of each of ``source``, both odd and around 0: (target, source).

    The source's offsets are put at 0, 1, 1 + q, 1 + q + q^2, ... and their mirror images, with the q for
    which the last of them is the target's last.
    """
    steps, reach = source // 2, target // 2
    if not steps:
        return torch.ones(target, 1, dtype=torch.float64)
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if (1 - ratio**steps) / (1 - ratio) > reach else (ratio, high)
    outward = torch.cumsum(ratio ** torch.arange(steps, dtype=torch.float64), dim=0)
    places = torch.cat([-outward.flip(0), outward.new_zeros(1), outward])
    wanted = torch.arange(-reach, reach + 1, dtype=torch.float64)
    right = torch.bucketize(wanted, places).clamp(1, source - 1)
    share = ((wanted - places[right - 1]) / (places[right] - places[right - 1])).clamp(0, 1)
    weights = places.new_zeros(target, source)
    rows = torch.arange(target)
    weights[rows, right], weights[rows, right - 1] = share, 1 - share
    return weights


FAMILY = Family(
    "timm_beit", _claims, _read, PositionRule(antialias=True, dtype=torch.float32, offsets=stretched)
)
