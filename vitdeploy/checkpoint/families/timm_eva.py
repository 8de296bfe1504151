"""timm's class Eva with rotary positions: ``vit_*_dinov3*``, ``eva02_*_patch14_*`` and what is built alike.

EVA02 (Fang et al. 2023, https://arxiv.org/abs/2303.11331) has a table of positions and rotations beside it,
SwiGLU, and in its larger sizes a LayerNorm inside of that. Its pairs are neighbouring columns of a head; once
the columns are put into another order, they are halves of it. Queries and values have a bias, keys have none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitdeploy.checkpoint.families.base import (
    Family,
    Foreign,
    Layout,
    Pick,
    Reading,
    Source,
    config_number,
    config_object,
    flat,
    height_and_width,
    join_halves,
    linear,
    rename_tensors,
    sole_head,
    third,
)
from vitdeploy.checkpoint.families.infer import heads_of_64, what_is_open
from vitdeploy.checkpoint.families.positions import PositionRule
from vitdeploy.checkpoint.families.timm import (
    architecture_of,
    called,
    known_heads,
    reading_of,
    refuse,
    stated_fields,
)
from vitdeploy.checkpoint.refusals import shown
from vitdeploy.config import Rotary, ViTConfig


@dataclass(frozen=True)
class _Kind:
    """What architectures have in common that no tensor tells."""

    rotary: Rotary
    halves: bool
    """Whether the halves of a head's columns are paired, or neighbours."""
    norm_eps: float
    rope_type: str


_DINOV3 = _Kind(Rotary("centred_timm", 100.0), halves=True, norm_eps=1e-5, rope_type="dinov3")
_EVA02 = _Kind(Rotary("indexed", 10_000.0, (16, 16)), halves=False, norm_eps=1e-6, rope_type="cat")
_ARCHITECTURES: Mapping[str, _Kind] = {
    r"vit_(tiny|(small|huge)(_plus)?|base|large|7b)_patch16_dinov3(_qkvb)?": _DINOV3,
    r"vit_(small|base|large|giant)_patch16_lingbot": _DINOV3,
    r"eva02_(tiny|small|base|large)_patch14_(224|336|448)": _EVA02,
    r"vit_(mediumd?|betwixt|base)_patch16_rope_reg[14]_gap_256": _EVA02,
}
_USUAL: Mapping[str, tuple[object, ...]] = {
    "qk_norm": (False,),
    "scale_attn_inner": (False,),
    "attn_type": ("eva",),
    "num_kv_heads": (None,),
    "attn_only_layer_scale": (False,),
    "use_post_norm": (False,),
    "use_rot_pos_emb": (True,),
    "rope_grid_offset": (0,),
    "rope_grid_indexing": ("ij",),
    "norm_layer": (None, "layernorm"),
}
"""Arguments of the class, and the values of those models that are computed here."""


def kind_of(architecture: str) -> _Kind | None:
    """What an architecture is; None where it is not computed here."""
    return next((kind for names, kind in _ARCHITECTURES.items() if re.fullmatch(names, architecture)), None)


def _bare_kind(state: Mapping[str, Tensor]) -> _Kind | None:
    """What tensors without a word about them are, where their names tell."""
    first = "blocks.0."
    if "pos_embed" not in state:
        return _DINOV3 if {"cls_token", "reg_token", f"{first}gamma_1"} <= state.keys() else None
    apart = not state.keys().isdisjoint((f"{first}attn.q_bias", f"{first}attn.q_proj.weight"))
    inner, outer = (state.get(f"{first}mlp.{layer}.weight") for layer in ("fc1", "fc2"))
    packed = inner is not None and outer is not None and inner.shape[:1] == (2 * outer.shape[-1],)
    gated = packed or f"{first}mlp.fc1_g.weight" in state
    return _EVA02 if apart and gated and "cls_token" in state else None


def _claims(foreign: Foreign) -> bool:
    if "patch_embed.proj.weight" not in foreign.state:
        return False
    architecture = architecture_of(foreign.config or {})
    if architecture:
        return kind_of(architecture) is not None or "blocks.0.attn.q_proj.weight" in foreign.state
    return _bare_kind(foreign.state) is not None


def _layout(state: Mapping[str, Tensor], interleaved: int | None) -> Layout:
    """Where our parameters lie.

    Args:
        interleaved: the heads, where neighbouring columns of a head are paired; None where halves are.
    """
    apart = "blocks.0.attn.q_proj.weight" in state
    attention = {}
    for index, name in enumerate("qkv"):
        order: Pick = _halves(interleaved) if interleaved and name != "v" else lambda tensor: tensor
        weight, bias = (
            (f"{name}_proj.weight", f"{name}_proj.bias") if apart else ("qkv.weight", f"{name}_bias")
        )
        pick = order if apart else _then(third(index), order)
        attention[f"blocks.{{i}}.attn.{name}.weight"] = Source(f"blocks.{{i}}.attn.{weight}", pick)
        attention[f"blocks.{{i}}.attn.{name}.bias"] = Source(f"blocks.{{i}}.attn.{bias}", order)
    return {
        **linear("patch_embed", "patch_embed.proj"),
        "cls_token": Source("cls_token", flat(1)),
        "registers": Source("reg_token", flat(2)),
        "pos_embed": Source("pos_embed", flat(2)),
        **linear("blocks.{i}.norm1", "blocks.{i}.norm1"),
        **attention,
        **linear("blocks.{i}.attn.proj", "blocks.{i}.attn.proj"),
        "blocks.{i}.scale1": Source("blocks.{i}.gamma_1"),
        **linear("blocks.{i}.norm2", "blocks.{i}.norm2"),
        **linear("blocks.{i}.mlp.fc1", "blocks.{i}.mlp.fc1"),
        **linear("blocks.{i}.mlp.norm", "blocks.{i}.mlp.norm"),
        **linear("blocks.{i}.mlp.fc2", "blocks.{i}.mlp.fc2"),
        "blocks.{i}.scale2": Source("blocks.{i}.gamma_2"),
        **linear("norm", "fc_norm" if "fc_norm.weight" in state else "norm"),
        **linear("head", "head"),
    }


def _then(first: Pick, second: Pick) -> Pick:
    return lambda tensor: second(first(tensor))


def _halves(heads: int) -> Pick:
    """Rows of each head in the order 0, 2, 4, ..., 1, 3, 5, ...: pairs of neighbours become pairs of halves.

    Queries and keys are put into the same order, so that their products stay what they are.
    """

    def pick(tensor: Tensor) -> Tensor:
        if not tensor.ndim or tensor.shape[0] % (2 * heads):
            return tensor
        pairs = torch.unflatten(tensor, 0, (heads, -1, 2))
        return pairs.transpose(1, 2).flatten(0, 2)

    return pick


def _read(foreign: Foreign, template: ViTConfig | None) -> Reading:
    config = foreign.config or {}
    architecture, arguments = architecture_of(config), config_object(config, "model_args")
    kind = kind_of(architecture) if architecture else _bare_kind(foreign.state)
    refuse(foreign.source, _unsupported(architecture, arguments, kind))
    assert kind is not None
    head = sole_head(foreign.state, "head")
    named, originals = rename_tensors(
        foreign.state,
        lambda name: f"head.{name.rpartition('.')[2]}" if name.rpartition(".")[0] == head else name,
    )
    state = join_halves(named, (".fc1_g.", ".fc1_x."), ".fc1.")
    fields = stated_fields(foreign.source, architecture, config, state, kind.norm_eps)
    fields["rotary"] = _rotary(kind, arguments)
    if "pos_embed" not in state:
        fields |= {"position": "none", "position_prefix": 0}
    pooled = "pool" in fields
    heads = _heads(foreign.heads, known_heads(architecture, arguments), template)
    reading = reading_of(
        foreign,
        template,
        _layout(state, None),
        state,
        originals,
        heads=heads,
        **{"pool": "mean", **fields},
    )
    if not pooled:
        note = "the file does not tell the pooling: the mean of the patches, timm's default, is taken"
        reading = replace(reading, notes=(*reading.notes, note))
    if arguments.get("rope_rotate_half", kind.halves):
        return reading
    assert isinstance(reading.config, ViTConfig)
    return replace(reading, layout=_layout(state, reading.config.heads))


def _unsupported(architecture: str, arguments: Mapping[str, object], kind: _Kind | None) -> list[str]:
    if kind is None:
        return [called(architecture)]
    usual = {**_USUAL, "rope_type": (kind.rope_type,)}
    return [
        f"{key} {shown(arguments[key])}"
        for key, values in usual.items()
        if key in arguments and arguments[key] not in values
    ]


def _rotary(kind: _Kind, arguments: Mapping[str, object]) -> Rotary:
    rotary = replace(kind.rotary, base=config_number(arguments, "rope_temperature", kind.rotary.base))
    if rotary.coordinates != "indexed" or "ref_feat_shape" not in arguments:
        return rotary
    shape = arguments["ref_feat_shape"]
    return replace(rotary, grid=None if shape is None else height_and_width(shape, "ref_feat_shape"))


def _heads(
    said: int | None, known: Callable[[int], int] | None, template: ViTConfig | None
) -> Callable[[int], int]:
    """The user's heads, where they fit: columns are put into the order of those that the model will have."""
    otherwise = known or (heads_of_64 if template is None else what_is_open(template, None)[0])
    return lambda width: said if said and width % (4 * said) == 0 else otherwise(width)


FAMILY = Family("timm_eva", _claims, _read, PositionRule(antialias=True, dtype=torch.float32))
