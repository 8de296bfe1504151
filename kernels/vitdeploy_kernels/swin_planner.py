"""The plan of a Swin Transformer: a ViT's blocks over windows, and torch where tokens change their order."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vitdeploy_kernels import patch_embed
from vitdeploy_kernels.config import Table
from vitdeploy_kernels.planner import BlockPlanner, Plan, Readout, Step, Workspace, readout_step
from vitdeploy_kernels.swin import Merge, SwinShape, SwinWeights

STEM_EPS = 1e-5
"""Of the LayerNorms over patches and in merging."""
_GATHER = "no fused kernel moves tokens"


class SwinPlanner:
    """Builds the plan of one batch size; the arguments are those of :class:`Planner`."""

    def __init__(
        self,
        shape: SwinShape,
        weights: SwinWeights,
        batch: int,
        table: Table,
        workspace: Workspace,
        readout: Readout | None = None,
    ) -> None:
        self.shape, self.weights, self.batch, self.table = shape, weights, batch, table
        self.workspace, self.readout = workspace, readout
        self.steps: list[Step] = []
        self._place = "x"
        dtype = torch.uint8 if shape.uint8 else torch.float32
        self.image = workspace.take("image", shape.image_shape(batch), dtype)

    def build(self) -> Plan:
        """The whole forward pass."""
        stage = self._stage(0)
        stats, number = self._embed(stage), 0
        for index, blocks in enumerate(self.weights.stages):
            if index:
                merged, stage = stage, self._stage(index)
                stats = self._merge(f"blocks.{number}.merge", self.weights.merges[index - 1], merged, stage)
            for block in blocks:
                site = f"blocks.{number}"
                if block.order is not None:
                    stats = self._reorder(f"{site}.order", block.order, stage, stats)
                stats = stage.block(site, block.block, stats)
                number += 1
        output = stage.x
        if self.readout is not None:
            step, output = readout_step(self.readout, stage.x.view(self.batch, -1, stage.shape.width))
            self.steps.append(step)
        return Plan(self.batch, tuple(self.steps), self.image, output)

    def _stage(self, index: int) -> BlockPlanner:
        self._place = "x"
        count = self.batch * self.shape.count(index)
        dtype, shape = self.weights.dtype, self.shape.stage(index)
        return BlockPlanner(shape, count, dtype, self.table, self.workspace, self.steps)

    def _embed(self, stage: BlockPlanner) -> Tensor:
        weights, embedding, width = self.weights, self.weights.embedding, self.shape.width
        first, embedded = stage.x, stage.take("embedded", stage.x.shape)
        config = stage.entry("patch_embed", stage.rows, width, len(embedding.weight)).config
        launch = patch_embed.launch(
            self.image, embedding.weight, embedding.tokens, embedded, None,
            patch=self.shape.patch, prefix=0, scale=embedding.scale, config=config,
        )  # fmt: skip
        stage.launch("embedding", launch)

        def arrange() -> None:
            x = F.layer_norm(embedded.float(), (width,), weights.gain, weights.shift, STEM_EPS)
            x = x.view(self.batch, -1, width).index_select(1, weights.order)
            x = x if weights.positions is None else x + weights.positions
            first.copy_(x.view(-1, width))

        reason = "no fused kernel keeps what a LayerNorm writes, nor moves tokens"
        stage.leave("embedding.pre_norm", "LayerNorm, in the order of windows,", arrange, reason)
        return self._statistics("embedding.pre_norm.stats", stage, stage.x)

    def _statistics(self, site: str, stage: BlockPlanner, x: Tensor) -> Tensor:
        stats = stage.take("stats", (len(x), 1, 2), torch.float32)
        stage.layernorm(site, x, None, None, None, None, stats)
        return stats

    def _reorder(self, site: str, order: Tensor, stage: BlockPlanner, stats: Tensor) -> Tensor:
        """Bring rows into another order, from one of two places to the other; returns their statistics."""
        before, images, width = stage.x, self.batch, stage.shape.width
        self._place = "moved" if self._place == "x" else "x"
        after = stage.take(self._place, before.shape)
        moved = stage.take("moved.stats", stats.shape, torch.float32)

        def gather() -> None:
            after.view(images, -1, width).copy_(before.view(images, -1, width).index_select(1, order))
            held = stats.view(images, -1, *stats.shape[1:])
            moved.view(held.shape).copy_(held.index_select(1, order))

        stage.leave(site, "gather", gather, _GATHER)
        stage.x = after
        return moved

    def _merge(self, site: str, merge: Merge, stage: BlockPlanner, following: BlockPlanner) -> Tensor:
        """Four neighbours become one row of the next stage; returns the statistics of its rows."""
        rows, width = stage.x.shape
        before = stage.x
        four = stage.take("four", (rows // 4, 4 * width))

        def gather() -> None:
            tokens = before.view(self.batch, -1, width)
            four.copy_(tokens.index_select(1, merge.four.flatten()).view(-1, 4 * width))

        stage.leave(site, "gather", gather, _GATHER)
        stats = self._statistics(f"{site}.norm", stage, four)
        stage.norm_linear(f"{site}.reduction", four, stats, merge.reduction, following.x, eps=STEM_EPS)
        return self._statistics(f"{site}.stats", following, following.x)
