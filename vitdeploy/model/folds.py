"""Exact rewrites that architectures share: of a block's weights, and of single layers.

What a function returns computes the same function of real numbers; nothing here rounds. A block is any
module with ``attn`` (linear layers ``q``, ``k``, ``v``, ``proj``, a ``scale`` of the scores, and ``rotated``:
whether keys are turned by their positions), ``mlp`` (``fc1``, ``fc2``) and ``scale1``, ``scale2`` (layer
scale, or None).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vitdeploy.config import Preprocess
from vitdeploy.model.deployed import DeployedMlp, Linear, Norm
from vitdeploy.model.parts import Mlp

BlockT = TypeVar("BlockT", bound=nn.Module)
Part = TypeVar("Part", bound=nn.Module)


def edited(block: BlockT) -> BlockT:
    """A copy whose modules can be changed while tensors stay shared."""
    memo = {id(tensor): tensor for tensor in block.parameters()}
    return copy.deepcopy(block, memo)


def doubled(part: Part) -> Part:
    """A copy in float64."""
    memo = {id(tensor): parameter(tensor.detach().double()) for tensor in part.parameters()}
    return copy.deepcopy(part, memo)


def parameter(value: Tensor) -> nn.Parameter:
    """A constant."""
    return nn.Parameter(value, requires_grad=False)


# Rewrites of a block's weights: the block stays a reference block.


def fold_attention_scale(block: BlockT) -> BlockT:
    """softmax(s q k') = softmax((s q) k'): the scale becomes part of the query projection."""
    block = edited(block)
    attn: Any = block.attn
    attn.q.weight = parameter(attn.q.weight * attn.scale)
    if attn.q.bias is not None:
        attn.q.bias = parameter(attn.q.bias * attn.scale)
    attn.scale = 1.0
    return block


def drop_key_bias(block: BlockT) -> BlockT:
    """q (k + b)' adds the same q b' to a whole row of scores, and softmax does not see it.

    Where keys are rotated, the bias is turned with each of them and adds something else to every score.
    """
    attn: Any = block.attn
    if attn.rotated:
        return block
    block = edited(block)
    attn = block.attn
    attn.k.register_parameter("bias", None)
    return block


def move_value_bias(block: BlockT) -> BlockT:
    """Rows of a softmax sum to one, so the value bias passes through attention into the projection's bias."""
    block = edited(block)
    attn: Any = block.attn
    if attn.v.bias is not None:
        attn.proj.bias = parameter(attn.proj.bias + attn.proj.weight @ attn.v.bias)
        attn.v.register_parameter("bias", None)
    return block


def fold_layer_scale(block: BlockT) -> BlockT:
    """Layer scale multiplies the rows of the linear layer before it (its bias too)."""
    block = edited(block)
    this: Any = block
    for linear, scale in ((this.attn.proj, this.scale1), (this.mlp.fc2, this.scale2)):
        if scale is not None:
            linear.weight = parameter(linear.weight * scale[:, None])
            linear.bias = parameter(linear.bias * scale)
    this.scale1 = this.scale2 = None
    return block


BLOCK_REWRITES: tuple[Callable[[Any], Any], ...] = (
    fold_attention_scale,
    drop_key_bias,
    move_value_bias,
    fold_layer_scale,
)


# Single layers in their deployed form.


def bias_of(linear: nn.Linear) -> Tensor | None:
    return linear.bias  # typed as if it were always there


def deployed_linear(linear: nn.Linear) -> Linear:
    return Linear(linear.weight.t(), linear.bias)


def deployed_norm(norm: nn.LayerNorm) -> Norm:
    return Norm(norm.weight, norm.bias, norm.eps)


def deployed_mlp(mlp: Mlp) -> DeployedMlp:
    parts, bias = 2 if mlp.gated else 1, bias_of(mlp.fc1)
    biases = [None] * parts if bias is None else bias.chunk(parts)
    layers = [Linear(w.t(), b) for w, b in zip(mlp.fc1.weight.chunk(parts), biases, strict=True)]
    gate, fc1 = layers[0] if mlp.gated else None, layers[-1]
    norm = None if mlp.norm is None else deployed_norm(mlp.norm)
    return DeployedMlp(fc1, deployed_linear(mlp.fc2), mlp.activation, gate=gate, norm=norm)


def merged_linear(*layers: nn.Linear) -> Linear:
    """Several layers that read the same rows, as one with the columns of all; a missing bias is zero."""
    weight = torch.cat([layer.weight.detach() for layer in layers]).t()
    biases = [bias_of(layer) for layer in layers]
    if all(bias is None for bias in biases):
        return Linear(weight, None)
    rows = [
        torch.zeros_like(layer.weight[:, 0]) if bias is None else bias
        for layer, bias in zip(layers, biases, strict=True)
    ]
    return Linear(weight, torch.cat(rows))


def normalisation(preprocess: Preprocess) -> tuple[Tensor, Tensor]:
    """Scale and shift per channel, (3) float64 each, with ``pixel_values = scale * uint8 + shift``."""
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (preprocess.mean, preprocess.std))
    return preprocess.rescale / std, -mean / std
