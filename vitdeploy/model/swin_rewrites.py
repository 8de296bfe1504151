"""Exact rewrites of a Swin for deployment, as :mod:`vitdeploy.model.rewrites` has them for a ViT.

Each function takes one part of the model and returns another that computes the same function of real numbers.
An order of tokens is a tensor of their numbers in the map, row by row; T is the number of a row of zeros.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from vitdeploy.bundle.manifest import Rewrite
from vitdeploy.config import InputKind, Output, Preprocess, SwinConfig, layer_of
from vitdeploy.model.deployed import Linear, ScoreBias
from vitdeploy.model.folds import (
    deployed_linear,
    deployed_mlp,
    deployed_norm,
    doubled,
    drop_key_bias,
    fold_attention_scale,
    merged_linear,
    move_value_bias,
    normalisation,
)
from vitdeploy.model.precision import PrecisionPlan, assign_dtypes
from vitdeploy.model.rewrites import blocks_read
from vitdeploy.model.swin import POSITION_WIDTH, Attention, Block, Embedding, Merge, Readout, Stage, Swin
from vitdeploy.model.swin_deployed import (
    Cosine,
    DeployedMerge,
    DeployedPatches,
    DeployedSwin,
    DeployedSwinBlock,
    DeployedSwinReadout,
    MergedWindowAttention,
    NarrowWindowAttention,
    TokenOrder,
    WindowAttention,
)
from vitdeploy.model.vit_deployed import Tokens

NARROW = 384
"""Columns from which on queries, keys and values are one GEMM. Below, to split its result is dear on a CPU:
Swin-T is 2 to 5 % faster with three."""


def numbers(tokens: int) -> Tensor:
    """The tokens of a map, each with its number for its only column: (1, T, 1), counted from 1."""
    return torch.arange(1, tokens + 1).reshape(1, tokens, 1)


def order_of(attn: Attention) -> Tensor:
    """The order in which a block's windows read the map, (n A)."""
    height, width = attn.config.maps[attn.stage]
    return _numbered(attn.cut(numbers(height * width)), height * width).flatten()


def four_of(merge: Merge) -> Tensor:
    """The tokens that become one, for each token of the next map: (T/4, 4)."""
    height, width = merge.map
    return _numbered(merge.gather(numbers(height * width)), height * width)[0]


def _numbered(marked: Tensor, tokens: int) -> Tensor:
    return torch.where(marked == 0, tokens, marked - 1)


def is_padded(config: SwinConfig, stage: int) -> bool:
    return config.padded(stage) != config.maps[stage]


def is_narrow(config: SwinConfig, stage: int) -> bool:
    """Whether queries, keys and values have a GEMM each: ``NARROW`` says from where on they have not."""
    return config.version == 1 and config.widths[stage] < NARROW


def stream_order(attn: Attention) -> Tensor:
    """How tokens stand between the blocks: as windows read them, or row by row where windows need padding."""
    order = order_of(attn)
    height, width = attn.config.maps[attn.stage]
    return torch.arange(height * width) if is_padded(attn.config, attn.stage) else order


def places_of(order: Tensor, tokens: int) -> Tensor:
    """For each token, its place in an order; the row of zeros has the place behind all of them: (T + 1)."""
    places = torch.empty(tokens + 1, dtype=torch.long)
    places[order] = torch.arange(len(order))
    places[tokens] = tokens
    return places


def reorder(now: Tensor, then: Tensor) -> TokenOrder | None:
    """The change from one order of tokens to another; None where they are the same."""
    return None if torch.equal(now, then) else TokenOrder(places_of(now, len(now))[then], len(now))


def window_attention(attn: Attention) -> WindowAttention:
    """Bias and mask are one constant, and so are the scales of version 2; the exchange of tokens is a Gather.

    What pads a map has neither keys nor values once their biases are gone, and its queries are not read.
    """
    scales, cut, join = attn.scales(), None, None
    if is_padded(attn.config, attn.stage):
        height, width = attn.config.maps[attn.stage]
        order = order_of(attn)
        cut = TokenOrder(order, height * width)
        join = TokenOrder(places_of(order, height * width)[:-1], len(order))
    rest = deployed_linear(attn.proj), attn.heads, ScoreBias(attn.bias()), cut, join
    if is_narrow(attn.config, attn.stage):
        q, k, v = (deployed_linear(layer) for layer in (attn.q, attn.k, attn.v))
        return NarrowWindowAttention(q, k, v, *rest)
    cosine = None if scales is None else Cosine(scales)
    return MergedWindowAttention(merged_linear(attn.q, attn.k, attn.v), *rest, cosine)


def deployed_block(block: Block, merge: DeployedMerge | None, change: TokenOrder | None) -> DeployedSwinBlock:
    if not block.post_norm:  # of cosines, the scale is another
        block = fold_attention_scale(block)
    block = move_value_bias(drop_key_bias(block))
    return DeployedSwinBlock(
        merge,
        change,
        deployed_norm(block.norm1),
        window_attention(block.attn),
        deployed_norm(block.norm2),
        deployed_mlp(block.mlp),
        post_norm=block.post_norm,
    )


def merge_by_gather(merge: Merge, now: Tensor, then: Tensor) -> DeployedMerge:
    """The four neighbours of each next token, which come in the order of the next stage, side by side."""
    four = places_of(now, len(now))[four_of(merge)[then]]
    return DeployedMerge(
        TokenOrder(four.flatten(), len(now)),
        deployed_norm(merge.norm),
        deployed_linear(merge.reduction),
        post_norm=merge.post_norm,
    )


def patches_to_gemm(embedding: Embedding, order: Tensor, preprocess: Preprocess | None) -> DeployedPatches:
    """A convolution whose stride is its kernel is a GEMM over patches.

    Args:
        preprocess: of uint8 pixels, which come unnormalised, (N, H, W, C): ((r u) - mean) / std is linear in
            the pixel u, so it moves into the projection.
    """
    config, weight = embedding.config, embedding.patch_embed.weight
    bias = cast(Tensor, embedding.patch_embed.bias)
    if preprocess is not None:
        scale, shift = normalisation(preprocess)
        bias = bias + torch.einsum("dcpq,c->d", weight, shift)
        weight = (weight * scale[:, None, None]).permute(0, 2, 3, 1)  # (D, P, P, C)
    table = embedding.pos_embed
    return DeployedPatches(
        config,
        (1, config.grid[1]) if is_padded(config, 0) else config.window(0),
        Linear(weight.flatten(1).t(), bias),
        deployed_norm(embedding.patch_norm),
        None if table is None else Tokens(table[order]),
        channels_last=preprocess is not None,
    )


def read_out(readout: Readout, outputs: tuple[Output, ...], order: Tensor) -> DeployedSwinReadout:
    """What is not asked for is left away; tokens come back in the order of the map."""
    wanted = set(outputs)
    head = readout.head if "logits" in wanted else None
    return DeployedSwinReadout(
        outputs,
        len(order),
        deployed_norm(readout.norm) if wanted else None,
        reorder(order, torch.arange(len(order))) if "tokens" in wanted else None,
        None if head is None else deployed_linear(head),
    )


def forward_flops(config: SwinConfig) -> int:
    """FLOPs of the reference model's GEMMs and attention on the way to its first output, per image."""
    patches = 2 * config.patches * config.channels * config.patch_size**2 * config.width
    blocks = sum(_block_flops(config, stage) * depth for stage, depth in enumerate(config.depths))
    merges = sum(16 * d * d * t for d, t in zip(config.widths, _tokens(config)[1:], strict=False))
    return patches + blocks + merges + 2 * config.features * config.classes


def _tokens(config: SwinConfig) -> list[int]:
    """Of each stage."""
    return [height * width for height, width in config.maps]


def _windowed(config: SwinConfig, stage: int) -> int:
    """Tokens of a stage's windows, padding among them."""
    height, width = config.padded(stage)
    return height * width


def _block_flops(config: SwinConfig, stage: int) -> int:
    d, m, (rows, columns) = config.widths[stage], config.mlp_widths[stage], config.window(stage)
    attention = _windowed(config, stage) * (8 * d * d + 4 * rows * columns * d)
    return attention + 4 * _tokens(config)[stage] * d * m + _position_flops(config, stage)


def _position_flops(config: SwinConfig, stage: int) -> int:
    """The MLP of offsets, in each block of version 2; no image is needed for it."""
    rows, columns = config.window(stage)
    offsets = (2 * rows - 1) * (2 * columns - 1)
    return 0 if config.version == 1 else 2 * offsets * POSITION_WIDTH * (2 + config.heads[stage])


def applied_rewrites(
    config: SwinConfig, outputs: tuple[Output, ...], input_kind: InputKind
) -> tuple[Rewrite, ...]:
    """The rewrites :func:`deploy` applies to this configuration, with the FLOPs each saves per image."""
    blocks = config.blocks[: blocks_read(config, outputs)]
    stages = [stage for stage, _ in blocks]
    first, tokens = config.version == 1, _tokens(config)
    columns = [_windowed(config, stage) * config.widths[stage] for stage in stages]
    areas = [rows * across for rows, across in (config.window(stage) for stage in stages)]
    scores = [
        _windowed(config, stage) * area * config.heads[stage]
        for stage, area in zip(stages, areas, strict=True)
    ]
    masked = [
        count
        for count, (stage, block) in zip(scores, blocks, strict=True)
        if config.shift(stage, block) != (0, 0)
    ]
    merged = sum(not is_narrow(config, stage) for stage in stages)
    padding = sum(
        2 * (_windowed(config, stage) - tokens[stage]) * config.widths[stage] ** 2 for stage in stages
    )
    rows = [
        ("patches_to_gemm", "patch convolution: one GEMM, patches in the order of windows", 0, True),
        (
            "keep_window_order",
            "tokens stay in windows: no rolling, no cutting, a Gather where the order changes",
            0,
            True,
        ),
        ("merge_by_gather", "four neighbours by one Gather", 0, len(set(stages)) > 1),
        ("merge_qkv", f"{3 * merged} projections in {merged} GEMMs", 0, merged > 0),
        ("fold_attention_scale", "attention scale in the query weights", sum(scores), first),
        ("fix_attention_scale", "clamped and exponentiated once", 0, not first),
        ("drop_key_bias", "cancels in the softmax", sum(columns), first and config.qkv_bias),
        ("move_value_bias", "in the projection's bias", sum(columns), config.qkv_bias),
        (
            "fix_relative_positions",
            f"read out of {len(blocks)} {'tables' if first else 'MLPs'} once",
            sum(_position_flops(config, stage) for stage in stages),
            True,
        ),
        ("fix_mask", f"one constant with the positions in {len(masked)} blocks", sum(masked), bool(masked)),
        ("project_without_padding", "padding leaves before the projection", padding, padding > 0),
        (
            "fold_normalisation",
            "mean and std in the projection",
            6 * config.patches * config.width,
            input_kind == "uint8",
        ),
    ]
    return tuple(
        Rewrite(name=name, detail=text, flops_saved=saved) for name, text, saved, applies in rows if applies
    )


@torch.no_grad()
def deploy(
    swin: Swin,
    plan: PrecisionPlan,
    *,
    outputs: tuple[Output, ...] = ("logits",),
    input_kind: InputKind = "float",
    preprocess: Preprocess | None = None,
) -> DeployedSwin:
    """Return the deployed form of ``swin`` in the dtypes of ``plan``; ``swin`` is not changed.

    Args:
        preprocess: needed for ``input_kind="uint8"``, whose pixels arrive unnormalised, (N, H, W, C).

    Raises:
        PrecisionError: a weight does not fit into its dtype (each is named).
    """
    if input_kind == "uint8" and preprocess is None:
        raise ValueError("uint8 input needs the preprocessing whose mean and std to fold")
    config, wanted = swin.config, {layer_of(output) for output in outputs}
    count = blocks_read(config, outputs)
    stages = cast("list[Stage]", list(swin.layers))
    order = stream_order(cast(Attention, stages[0].blocks[0].attn))
    embedding = patches_to_gemm(doubled(swin.embedding), order, preprocess if input_kind == "uint8" else None)
    blocks: list[DeployedSwinBlock] = []
    rows: dict[int, TokenOrder] = {}
    for number, (stage, place) in enumerate(config.blocks[:count]):
        block = doubled(cast(Block, stages[stage].blocks[place]))
        then, merge, change = stream_order(block.attn), None, None
        if place == 0 and stage > 0:
            merge = merge_by_gather(doubled(cast(Merge, stages[stage - 1].merge)), order, then)
        else:
            change = reorder(order, then)
        order = then
        blocks.append(assign_dtypes(deployed_block(block, merge, change), f"blocks.{number}", plan))
        if number in wanted:
            rows[number] = TokenOrder(places_of(order, len(order))[:-1], len(order))
    read = tuple(output for output in outputs if layer_of(output) is None)
    readout = assign_dtypes(read_out(doubled(swin.readout), read, order), "readout", plan)
    result = DeployedSwin(assign_dtypes(embedding, "embedding", plan), blocks, readout, outputs, rows)
    result.output_dtype = plan.output_dtype
    return result.eval()
