"""The ``.npz`` files that the ViT paper's authors release (vit_jax), flax's layout of it.

Layers store their kernels input first; attention keeps its heads apart: query, key and value are
(D, heads, d), the output projection is (heads, d, D). flax's GELU is the tanh form. Positions interpolate as
``scipy.ndimage.zoom(order=1)`` does: linearly, from corner to corner. Hybrids (``R26_S_32``,
``R50+ViT-B_16``) have the ResNet of vit_jax's models_resnet.py before the patches.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from vitdeploy.checkpoint.families.base import Family, Foreign, Layout, Reading, Source, flat, rename_tensors
from vitdeploy.checkpoint.families.infer import infer_config, shape_note, what_is_open
from vitdeploy.checkpoint.families.positions import PositionRule
from vitdeploy.checkpoint.refusals import OTHER_MODEL
from vitdeploy.config import Preprocess, Size, Stem, ViTConfig
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


def _filters(ours: str, theirs: str) -> dict[str, Source]:
    return {f"{ours}.weight": Source(f"{theirs}/kernel", _convolution)}


def _group_norm(ours: str, theirs: str) -> dict[str, Source]:
    # Of (C) numbers, or of (1, 1, 1, C) in elder files.
    return {name: Source(source.name, torch.flatten) for name, source in _norm(ours, theirs).items()}


def _stem() -> dict[str, Source]:
    ours, theirs = "stem.stages.{i}.{j}", "block{i}/unit{j}"
    layout = {**_filters("stem.conv", "conv_root"), **_group_norm("stem.norm", "gn_root")}
    layout |= _filters(f"{ours}.downsample", f"{theirs}/conv_proj")
    layout |= _group_norm(f"{ours}.downsample_norm", f"{theirs}/gn_proj")
    for n in (1, 2, 3):
        layout |= _filters(f"{ours}.conv{n}", f"{theirs}/conv{n}")
        layout |= _group_norm(f"{ours}.norm{n}", f"{theirs}/gn{n}")
    return layout


_STEM = Stem(norm_eps=1e-6, weight_eps=1e-5, weight_eps_on="deviation")
"""What no shape tells of the ResNets."""
_UNIT = re.compile(r"^block(\d+)/unit(\d+)/")
_BLOCK = "Transformer/encoderblock_{i}"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_1"
_LAYOUT: Layout = {
    **_stem(),
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


def _counted(name: str, by: int) -> str:
    """The name with stages and blocks counted from another number: the file counts from 1."""
    return _UNIT.sub(lambda match: f"block{int(match[1]) + by}/unit{int(match[2]) + by}/", name)


def _claims(foreign: Foreign) -> bool:
    return any(re.fullmatch(r"(opt/target/)?embedding/kernel", name) for name in foreign.state)


def _read(foreign: Foreign, template: ViTConfig | None) -> Reading:
    # A training checkpoint keeps the weights under opt/target/, beside the optimizer's state.
    state, originals = rename_tensors(
        foreign.state, lambda name: _counted(name.removeprefix("opt/target/"), by=-1)
    )
    name = f"{_ATTENTION}/query/kernel".format(i=0)
    query = state.get(name)
    if query is None or query.ndim != 3:
        actual = "missing" if query is None else f"of shape {tuple(query.shape)}"
        raise CheckpointError(
            f"{foreign.source}: {name} must be (width, heads, head width); it is {actual}", hint=OTHER_MODEL
        )
    heads, (_, sizes) = query.shape[1], what_is_open(template, foreign.wanted)
    config = infer_config(
        _LAYOUT,
        state,
        foreign.source,
        heads=lambda width: heads,
        sizes=sizes,
        stem=_STEM if "conv_root/kernel" in state else None,
        activation="gelu_tanh",
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
        spell=lambda name: _counted(name, by=1),
    )


FAMILY = Family("google", _claims, _read, PositionRule(mode="bilinear", align_corners=True))
