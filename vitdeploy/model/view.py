"""Where in an image the tokens of a reference model lie, and which of its weights can be looked at.

Each architecture says it of itself (``Architecture.view``), so that whoever draws attention over an image
needs to know none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from vitdeploy.config import Size, ViTConfig
from vitdeploy.model import qwen, swin, vit
from vitdeploy.model.qwen_grid import interpolated, patch_order

NOWHERE = -1
"""The place of a token that is no part of the image: a prefix token, or what pads a window."""


@dataclass(frozen=True, eq=False)
class BlockView:
    """One block: its attention, and where its tokens lie."""

    heads: int
    softmax: nn.Module
    """What gives the weights of attention: (N, h, A, A), or (N, n, h, A, A) where windows are groups."""
    places: Tensor
    """For the tokens of each group, their number in ``grid``, row by row, or NOWHERE: (n, A) int64."""
    tokens: Tensor
    """The same for the tokens behind the block, (T) int64."""
    grid: Size
    """Rows and columns of tokens."""
    step: int
    """Pixels from one token to its neighbour."""


@dataclass(frozen=True, eq=False)
class ModelView:
    """A reference model as an image is seen by it."""

    blocks: tuple[BlockView, ...]
    reads: Tensor | None
    """The share of each last token in the pooled vector, (T) float64; None where blocks have maps of their
    own, and where a probe reads."""
    probe: nn.Module | None = None
    """The softmax of pooling by a probe: (N, h, 1, T)."""
    prefix: tuple[str, ...] = ()
    """What the first tokens are, where they are no patches."""
    filters: Tensor | None = None
    """Of the first projection, (filters, C, rows, columns)."""
    positions: Tensor | None = None
    """The learned or fixed position of every patch, row by row, (patches, D)."""

    @property
    def whole(self) -> bool:
        """Whether every block's tokens are those of the others, each seeing the image as one group."""
        return self.reads is not None or self.probe is not None


def vit_view(model: vit.ViT) -> ModelView:
    config, embedding = model.config, model.embedding
    tokens = torch.arange(config.tokens) - config.prefix_tokens
    tokens = tokens.clamp(min=NOWHERE)
    blocks = tuple(
        BlockView(
            config.heads, cast(vit.Block, block).attn.softmax, tokens[None], tokens, config.grid, config.step
        )
        for block in model.blocks
    )
    pool, stem = model.readout.probe_pool, embedding.stem
    positions = embedding.positions()
    registers = tuple(f"register {number}" for number in range(1, config.registers + 1))
    named = (("CLS", config.cls_token), ("distillation", config.distillation_token))
    return ModelView(
        blocks,
        reads=_vit_reads(config),
        probe=None if pool is None else pool.softmax,
        prefix=(*(name for name, there in named if there), *registers),
        filters=embedding.patch_embed.weight if stem is None else stem.conv.standardised(),
        positions=None if positions is None else positions.detach(),
    )


def _vit_reads(config: ViTConfig) -> Tensor | None:
    """As ``vit.Readout.pool`` pools; two heads are averaged, and of two vectors side by side each is half."""
    shares = torch.zeros(config.tokens, dtype=torch.float64)
    if config.pool == "probe":
        return None
    if config.pool in ("mean", "cls_mean"):
        shares[config.prefix_tokens :] = 1 / config.patches
    if config.pool == "cls_mean":
        shares /= 2
        shares[0] = 1 / 2
    if config.pool == "cls":
        shares[0] = 1
    if config.pool == "both_heads":
        shares[:2] = 1 / 2
    return shares


def swin_view(model: swin.Swin) -> ModelView:
    config = model.config
    blocks = []
    for number, stage in enumerate(cast("list[swin.Stage]", list(model.layers))):
        rows, columns = grid = config.maps[number]
        tokens = torch.arange(rows * columns)
        for block in stage.blocks:
            attention = cast(swin.Block, block).attn
            # Padding is zeros, so places are counted from one on their way.
            places = attention.cut((tokens + 1)[None, :, None])[0, :, :, 0] - 1  # (n, A)
            step = config.patch_size * 2**number
            blocks.append(BlockView(attention.heads, attention.softmax, places, tokens, grid, step))
    return ModelView(
        tuple(blocks),
        reads=None,
        filters=model.embedding.patch_embed.weight,
        positions=model.embedding.pos_embed,
    )


def qwen_view(model: qwen.QwenVision) -> ModelView:
    config, embedding = model.config, model.embedding
    order, patch = patch_order(config), config.patch_size
    blocks = tuple(
        BlockView(config.heads, cast(qwen.Block, block).attn.softmax, order[None], order, config.grid, patch)
        for block in model.blocks
    )
    filters = embedding.patch_embed.weight.unflatten(1, (config.channels, -1, patch, patch))
    table = embedding.pos_embed
    return ModelView(
        blocks,
        reads=torch.full((config.patches,), 1 / config.patches, dtype=torch.float64),
        filters=filters.mean(dim=2),  # of a still, all frames are alike
        positions=None if table is None else interpolated(table, config)[order.argsort()],
    )
