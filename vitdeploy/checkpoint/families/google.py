"""The ``.npz`` files that the ViT paper's authors release (vit_jax), flax's layout of it.

Layers store their kernels input first; attention keeps its heads apart: query, key and value are
(D, heads, d), the output projection is (heads, d, D). flax's GELU is the tanh form. Positions interpolate as
``scipy.ndimage.zoom(order=1)`` does: linearly, from corner to corner.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from vitdeploy.checkpoint.families.base import Family, Foreign, Layout, Reading, Source, flat, rename_tensors
from vitdeploy.checkpoint.families.infer import infer_config, shape_note, what_is_open
from vitdeploy.checkpoint.families.positions import PositionRule
from vitdeploy.checkpoint.refusals import OTHER_MODEL
from vitdeploy.config import Preprocess, Size, ViTConfig
from vitdeploy.errors import CheckpointError
from vitdeploy.images.preprocess import at_size


def _transposed(kernel: Tensor) -> Tensor:
    return kernel.T if kernel.ndim == 2 else kernel  # (in, out) -> (out, in)


def _convolution(kernel: Tensor) -> Tensor:
    return kernel.permute(3, 2, 0, 1) if kernel.ndim == 4 else kernel  # (P, P, C, D) -> (D, C, P, P)


def _into_heads(kernel: Tensor) -> Tensor:
    return kernel.flatten(1).T if kernel.ndim == 3 else kernel  # (D, h, d) -> (h d, D)


def _out_of_heads(kernel: Tensor) -> Tensor:
    return kernel.flatten(0, 1).T if kernel.ndim == 3 else kernel  # (h, d, D) -> (D, h d)


def _dense(ours: str, theirs: str) -> dict[str, Source]:
    return {
        f"{ours}.weight": Source(f"{theirs}/kernel", _transposed),
        f"{ours}.bias": Source(f"{theirs}/bias"),
    }


def _norm(ours: str, theirs: str) -> dict[str, Source]:
    return {f"{ours}.weight": Source(f"{theirs}/scale"), f"{ours}.bias": Source(f"{theirs}/bias")}


def _attention() -> dict[str, Source]:
    layout = {}
    for name in ("query", "key", "value"):
        ours, theirs = f"blocks.{{i}}.attn.{name[0]}", f"{_ATTENTION}/{name}"
        layout[f"{ours}.weight"] = Source(f"{theirs}/kernel", _into_heads)
        layout[f"{ours}.bias"] = Source(f"{theirs}/bias", torch.flatten)
    layout["blocks.{i}.attn.proj.weight"] = Source(f"{_ATTENTION}/out/kernel", _out_of_heads)
    layout["blocks.{i}.attn.proj.bias"] = Source(f"{_ATTENTION}/out/bias")
    return layout


_BLOCK = "Transformer/encoderblock_{i}"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_1"
_LAYOUT: Layout = {
    "patch_embed.weight": Source("embedding/kernel", _convolution),
    "patch_embed.bias": Source("embedding/bias"),
    "cls_token": Source("cls", flat(1)),
    "pos_embed": Source("Transformer/posembed_input/pos_embedding", flat(2)),
    **_norm("blocks.{i}.norm1", f"{_BLOCK}/LayerNorm_0"),
    **_attention(),
    **_norm("blocks.{i}.norm2", f"{_BLOCK}/LayerNorm_2"),
    **_dense("blocks.{i}.mlp.fc1", f"{_BLOCK}/MlpBlock_3/Dense_0"),
    **_dense("blocks.{i}.mlp.fc2", f"{_BLOCK}/MlpBlock_3/Dense_1"),
    **_norm("norm", "Transformer/encoder_norm"),
    **_dense("representation", "pre_logits"),
    **_dense("head", "head"),
}


def _claims(foreign: Foreign) -> bool:
    return any(re.fullmatch(r"(opt/target/)?embedding/kernel", name) for name in foreign.state)


def _read(foreign: Foreign, template: ViTConfig | None) -> Reading:
    # A training checkpoint keeps the weights under opt/target/, beside the optimizer's state.
    state, originals = rename_tensors(foreign.state, lambda name: name.removeprefix("opt/target/"))
    name = f"{_ATTENTION}/query/kernel".format(i=0)
    query = state.get(name)
    if query is None or query.ndim != 3:
        actual = "missing" if query is None else f"of shape {tuple(query.shape)}"
        raise CheckpointError(
            f"{foreign.source}: {name} must be (width, heads, head width); it is {actual}", hint=OTHER_MODEL
        )
    heads, (_, sizes) = query.shape[1], what_is_open(template, foreign.wanted)
    config = infer_config(
        _LAYOUT, state, foreign.source, heads=lambda width: heads, sizes=sizes, activation="gelu_tanh"
    )

    def preprocess(size: Size | None) -> Preprocess:
        return at_size(Preprocess(), size or config.image_size)

    assumed = {"preprocess": "preprocessing is vit_jax's: resize, scale to -1 ... 1"}
    return Reading(
        config,
        _LAYOUT,
        state,
        preprocess,
        ignored={"opt/.*": None},
        notes=shape_note(config, template, foreign.wanted),
        assumed=assumed,
        originals=originals,
    )


FAMILY = Family("google", _claims, _read, PositionRule(mode="bilinear", align_corners=True))
