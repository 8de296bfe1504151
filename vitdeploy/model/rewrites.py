"""Exact rewrites of a ViT for deployment.

Each function takes one part of the model and returns another that computes the same function of real
numbers; nothing here rounds. All run in float64, one part at a time, so that the weights are rounded
once, when :func:`deploy` puts them into the dtypes of a precision plan.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from vitdeploy.bundle.manifest import Rewrite
from vitdeploy.config import InputKind, Output, Preprocess, ViTConfig
from vitdeploy.model.deployed import (
    AbsorbedAttention,
    AbsorbedBlock,
    DeployedAttention,
    DeployedBlock,
    DeployedEmbedding,
    DeployedMlp,
    DeployedModel,
    DeployedReadout,
    HeadLinear,
    Linear,
    Norm,
)
from vitdeploy.model.precision import Part, PrecisionPlan, assign_dtypes
from vitdeploy.model.vit import Block, Embedding, Mlp, Readout, ViT


def forward_flops(config: ViTConfig) -> int:
    """FLOPs of the reference model's GEMMs and attention, per image."""
    d, t, m = config.width, config.tokens, config.mlp_width
    block = 2 * t * d * (4 * d + m * (3 if config.gated_mlp else 2)) + 4 * t * t * d
    patches = 2 * config.patches * config.channels * config.patch_size**2 * d
    heads = 2 if config.pool == "both_heads" else 1
    return config.depth * block + patches + 2 * heads * config.features * config.classes


# Rewrites of a block's weights: the block stays a reference block.


def edited(block: Block) -> Block:
    """A copy whose modules can be changed while tensors stay shared."""
    memo = {id(tensor): tensor for tensor in block.parameters()}
    return copy.deepcopy(block, memo)


def parameter(value: Tensor) -> nn.Parameter:
    """A constant."""
    return nn.Parameter(value, requires_grad=False)


def fold_attention_scale(block: Block) -> Block:
    """softmax(s q k') = softmax((s q) k'): the scale becomes part of the query projection."""
    block = edited(block)
    attn = block.attn
    attn.q.weight = parameter(attn.q.weight * attn.scale)
    if attn.q.bias is not None:
        attn.q.bias = parameter(attn.q.bias * attn.scale)
    attn.scale = 1.0
    return block


def drop_key_bias(block: Block) -> Block:
    """q (k + b)' adds the same q b' to a whole row of scores, and softmax does not see it."""
    block = edited(block)
    block.attn.k.register_parameter("bias", None)
    return block


def move_value_bias(block: Block) -> Block:
    """Rows of a softmax sum to one, so the value bias passes through attention into the projection's bias."""
    block = edited(block)
    attn = block.attn
    if attn.v.bias is not None:
        attn.proj.bias = parameter(attn.proj.bias + attn.proj.weight @ attn.v.bias)
        attn.v.register_parameter("bias", None)
    return block


def fold_layer_scale(block: Block) -> Block:
    """Layer scale multiplies the rows of the linear layer before it (its bias too)."""
    block = edited(block)
    for linear, scale in ((block.attn.proj, block.scale1), (block.mlp.fc2, block.scale2)):
        if scale is not None:
            linear.weight = parameter(linear.weight * scale[:, None])
            linear.bias = parameter(linear.bias * scale)
    block.scale1 = block.scale2 = None
    return block


# Rewrites of structure: reference parts become deployed parts.


def bias_of(linear: nn.Linear) -> Tensor | None:
    return linear.bias  # typed as if it were always there


def _linear(linear: nn.Linear) -> Linear:
    return Linear(linear.weight.t(), linear.bias)


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(norm.weight, norm.bias, norm.eps)


def _mlp(mlp: Mlp) -> DeployedMlp:
    return DeployedMlp(_linear(mlp.fc1), _linear(mlp.fc2), mlp.activation, mlp.gated)


def merge_qkv(block: Block) -> DeployedBlock:
    """Three projections of the same rows are one GEMM with three times the columns."""
    attn = block.attn
    parts = (attn.q, attn.k, attn.v)
    weight = torch.cat([p.weight.detach() for p in parts]).t()
    biases = [bias_of(p) for p in parts]
    rows = [torch.zeros_like(p.weight[:, 0]) if b is None else b for p, b in zip(parts, biases, strict=True)]
    bias = None if all(b is None for b in biases) else torch.cat(rows)
    merged = DeployedAttention(Linear(weight, bias), _linear(attn.proj), attn.heads, attn.scale)
    return DeployedBlock(_norm(block.norm1), merged, _norm(block.norm2), _mlp(block.mlp))


def absorb_last_block(block: Block, queries: int) -> AbsorbedBlock:
    """When only ``queries`` tokens are read at the end, the last block needs no keys and no values.

    q k' = (q Wk) x' per head, and p (x Wv) = (p x) Wv: the projections move from T rows to ``queries`` rows.
    The key bias cancels in the softmax; a value bias is moved first (:func:`move_value_bias`).
    """
    block = move_value_bias(block)
    attn = block.attn
    heads = (attn.heads, attn.head_width, -1)
    key = HeadLinear(attn.k.weight.reshape(heads))  # (h, d, D)
    value = HeadLinear(attn.v.weight.reshape(heads).transpose(1, 2))  # (h, D, d)
    absorbed = AbsorbedAttention(_linear(attn.q), key, value, _linear(attn.proj), attn.scale, queries)
    return AbsorbedBlock(_norm(block.norm1), absorbed, _norm(block.norm2), _mlp(block.mlp))


def patches_to_gemm(embedding: Embedding) -> DeployedEmbedding:
    """A convolution whose stride is its kernel is a GEMM over patches; all that is added is one constant."""
    bias = embedding.patch_embed.bias
    assert bias is not None
    positions = embedding.positions()
    patches = bias.expand(embedding.config.patches, -1) if positions is None else bias + positions
    tokens = torch.cat([embedding.prefix(), patches])  # (T, D)
    weight = embedding.patch_embed.weight.flatten(1).t()  # (D, C, P, P) -> (C P P, D)
    return DeployedEmbedding(Linear(weight, None), tokens, embedding.config, channels_last=False)


def fold_normalisation(embedding: DeployedEmbedding, preprocess: Preprocess) -> DeployedEmbedding:
    """((r u) - mean) / std is linear in the pixel u, so it moves into the projection: uint8 HWC goes in."""
    config = embedding.config
    scale, shift = normalisation(preprocess)
    weight = embedding.patch_embed.weight.reshape(config.channels, -1, config.width)  # (C, P P, D)
    offset = torch.einsum("cpd,c->d", weight, shift)
    weight = (weight * scale[:, None, None]).transpose(0, 1).flatten(0, 1)  # (P P C, D)
    tokens = embedding.tokens.value.clone()
    tokens[config.prefix_tokens :] += offset
    return DeployedEmbedding(Linear(weight, None), tokens, config, channels_last=True)


def normalisation(preprocess: Preprocess) -> tuple[Tensor, Tensor]:
    """Scale and shift per channel, (3) float64 each, with ``pixel_values = scale * uint8 + shift``."""
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (preprocess.mean, preprocess.std))
    return preprocess.rescale / std, -mean / std


def read_out(readout: Readout, output: Output) -> DeployedReadout:
    """Two averaged heads are one GEMM over both tokens; a head that is not asked for is left away."""
    head = None
    if output == "logits" and readout.head is not None:
        head = _linear(readout.head)
        if readout.head_dist is not None:
            weight = (
                torch.cat([readout.head.weight, readout.head_dist.weight], dim=1).t() / 2
            )  # (2 D, classes)
            head = Linear(weight, (readout.head.bias + readout.head_dist.bias) / 2)
    representation = None if readout.representation is None else _linear(readout.representation)
    return DeployedReadout(readout.config, output, _norm(readout.norm), representation, head)


def queries_read(config: ViTConfig, output: Output) -> int | None:
    """How many leading tokens the output depends on; None when it reads every token."""
    if output == "tokens" or config.pool in ("mean", "cls_mean"):
        return None
    return 2 if config.pool == "both_heads" else 1


def applied_rewrites(config: ViTConfig, output: Output, input_kind: InputKind) -> tuple[Rewrite, ...]:
    """The rewrites :func:`deploy` applies to this configuration, with the FLOPs each saves per image."""
    d, t, depth = config.width, config.tokens, config.depth
    queries = queries_read(config, output)
    merged = depth - bool(queries)
    rows = [
        (
            "patches_to_gemm",
            "patch convolution, CLS row, bias and positions: one GEMM, one constant",
            d * t,
            True,
        ),
        ("merge_qkv", f"{3 * merged} projections in {merged} GEMMs", 0, merged > 0),
        ("fold_attention_scale", "attention scale in the query weights", depth * config.heads * t * t, True),
        ("drop_key_bias", "cancels in the softmax", depth * t * d, config.qkv_bias),
        ("move_value_bias", "in the projection's bias", depth * t * d, config.qkv_bias),
        ("fold_layer_scale", "in the projections before it", 2 * depth * t * d, config.layer_scale),
        (
            "absorb_last_block",
            f"{queries} of {t} tokens are read",
            _absorbed_flops(config, queries or t),
            bool(queries),
        ),
        (
            "merge_heads",
            "two heads and their mean in one GEMM",
            2 * config.classes,
            _two_heads(config, output),
        ),
        (
            "fold_normalisation",
            "mean and std in the projection",
            6 * config.patches * d,
            input_kind == "uint8",
        ),
    ]
    return tuple(
        Rewrite(name=name, detail=text, flops_saved=saved) for name, text, saved, applies in rows if applies
    )


def _two_heads(config: ViTConfig, output: Output) -> bool:
    return config.pool == "both_heads" and output == "logits" and config.classes > 0


def _absorbed_flops(config: ViTConfig, queries: int) -> int:
    d, t, m = config.width, config.tokens, config.mlp_width
    mlp = m * (3 if config.gated_mlp else 2)
    full = 2 * t * d * (4 * d + mlp) + 4 * t * t * d
    absorbed = 2 * queries * d * (4 * d + mlp) + 4 * queries * config.heads * t * d
    return full - absorbed


BLOCK_REWRITES: tuple[Callable[[Block], Block], ...] = (
    fold_attention_scale,
    drop_key_bias,
    move_value_bias,
    fold_layer_scale,
)


def doubled(part: Part) -> Part:
    """A copy in float64."""
    memo = {id(tensor): parameter(tensor.detach().double()) for tensor in part.parameters()}
    return copy.deepcopy(part, memo)


@torch.no_grad()
def deploy(
    vit: ViT,
    plan: PrecisionPlan,
    *,
    output: Output = "logits",
    input_kind: InputKind = "float",
    preprocess: Preprocess | None = None,
) -> DeployedModel:
    """Return the deployed form of ``vit`` in the dtypes of ``plan``; ``vit`` is not changed.

    Args:
        preprocess: needed for ``input_kind="uint8"``, whose pixels arrive unnormalised, (N, H, W, C).

    Raises:
        PrecisionError: a weight does not fit into its dtype (each is named).
    """
    config = vit.config
    queries = queries_read(config, output)
    embedding = patches_to_gemm(doubled(vit.embedding))
    if input_kind == "uint8":
        if preprocess is None:
            raise ValueError("uint8 input needs the preprocessing whose mean and std to fold")
        embedding = fold_normalisation(embedding, preprocess)
    assign_dtypes(embedding, "embedding", plan)
    blocks = []
    for i, part in enumerate(vit.blocks):
        block = cast(Block, doubled(part))
        for rewrite in BLOCK_REWRITES:
            block = rewrite(block)
        last = i == config.depth - 1
        deployed = absorb_last_block(block, queries) if last and queries else merge_qkv(block)
        blocks.append(assign_dtypes(deployed, f"blocks.{i}", plan))
    readout = assign_dtypes(read_out(doubled(vit.readout), output), "readout", plan)
    result = DeployedModel(embedding, blocks, readout)
    result.output_dtype = plan.output_dtype
    return result.eval()
