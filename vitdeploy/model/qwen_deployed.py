"""The deployed form of Qwen's vision towers, and the exact rewrites that lead there from ``model.qwen``.

Where there are windows, tokens stand in the order of :class:`vitdeploy.model.qwen_grid.Groups`: one Gather
by a constant before the patch projection, one behind the merger. All that the grid settles is a constant.

Shapes in comments: N images, C channels, P patch, t frames of a patch, m patches of a block, T patches, D
width, h heads, d columns of a head, E columns of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from vitdeploy.bundle.manifest import Rewrite
from vitdeploy.config import InputKind, Output, Preprocess, QwenVisionConfig
from vitdeploy.model.architecture import Architecture
from vitdeploy.model.deployed import (
    DeployedBlock,
    DeployedMlp,
    DeployedModel,
    Linear,
    Norm,
    Reorder,
    RmsNorm,
    Site,
    Softmax,
)
from vitdeploy.model.folds import (
    BLOCK_REWRITES,
    bias_of,
    deployed_linear,
    deployed_mlp,
    deployed_norm,
    doubled,
    edited,
    normalisation,
    parameter,
)
from vitdeploy.model.precision import PrecisionPlan, assign_dtypes
from vitdeploy.model.qwen import (
    Attention,
    Block,
    Embedding,
    FusedAttention,
    Merger,
    QwenVision,
    Readout,
    patches_of,
)
from vitdeploy.model.qwen_grid import Groups, grouped, interpolated, patch_order, rotation
from vitdeploy.model.view import ModelView, qwen_view


class DeployedEmbedding(nn.Module):
    """Images, or the processor's patches, to tokens by one GEMM, whose bias may have a row for each token.

    Args:
        reorder: of patches that lie row by row, or as the processor has them; None leaves them as they come.
    """

    def __init__(
        self, patch_embed: Linear, reorder: Reorder | None, config: QwenVisionConfig, kind: InputKind
    ) -> None:
        super().__init__()
        self.patch_embed, self.reorder = patch_embed, reorder
        self.config, self.kind = config, kind

    def forward(self, pixel_values: Tensor) -> Tensor:
        (rows, columns), patch, channels = self.config.grid, self.config.patch_size, self.config.channels
        x = pixel_values.to(self.patch_embed.weight.dtype)
        if self.kind == "uint8":
            x = x.reshape(-1, rows, patch, columns, patch, channels).transpose(2, 3)
        elif self.kind == "float":
            x = x.reshape(-1, channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
        if self.kind != "patches":
            x = x.reshape(-1, rows * columns, channels * patch * patch)
        embedded: Tensor = self.patch_embed(x if self.reorder is None else self.reorder(x))
        return embedded  # (N, T, D)


class RotatePatches(Site):
    """The same as :class:`vitdeploy.model.deployed.Rotate`, written as OpenVINO knows and fuses it."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        super().__init__()
        self.cos, self.sin = parameter(cos), parameter(sin)  # (T, 1, d)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.cos.dtype)
        half = x.shape[-1] // 2
        return x * self.cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * self.sin


class GroupedAttention(nn.Module):
    """Self-attention within windows, without a mask: one batched attention for the windows of each size.

    Queries, keys and values are GEMMs of their own, and heads stay behind patches until they are multiplied:
    nothing has to be copied to be rotated, or to be cut into windows.

    Args:
        sizes: how many windows there are of each number of patches, (count, patches).
    """

    def __init__(
        self,
        projections: Sequence[Linear],
        proj: Linear,
        heads: int,
        rotate: RotatePatches,
        sizes: Sequence[tuple[int, int]],
    ) -> None:
        super().__init__()
        self.q, self.k, self.v = projections
        self.rotate, self.proj = rotate, proj
        self.softmax = Softmax()
        self.heads, self.sizes = heads, sizes

    def forward(self, x: Tensor) -> Tensor:
        rows = (-1, x.shape[1], self.heads, x.shape[2] // self.heads)
        q, k, v = (linear(x).reshape(rows) for linear in (self.q, self.k, self.v))  # (N, T, h, d) each
        lengths = [count * size for count, size in self.sizes]
        whole = (self.rotate(q), self.rotate(k), v)
        parts = zip(*(x.split(lengths, dim=1) for x in whole), strict=True) if len(lengths) > 1 else [whole]
        done = [
            self.attend(part, size).reshape(-1, length, x.shape[2])
            for part, (_, size), length in zip(parts, self.sizes, lengths, strict=True)
        ]
        return self.proj(torch.cat(done, dim=1) if len(done) > 1 else done[0])  # (N, T, D)

    def attend(self, part: Sequence[Tensor], size: int) -> Tensor:
        """Within windows of one size: three of (N, count size, h, d) to (N count, size, h, d)."""
        q, k, v = (x.reshape(-1, size, *x.shape[2:]).transpose(1, 2) for x in part)  # (N count, h, size, d)
        return (self.softmax(q @ k.transpose(2, 3)).to(v.dtype) @ v).transpose(1, 2)


class DeployedMerger(nn.Module):
    """The patches of a block side by side, through an MLP: (N, T, D) to (N, T / m, E)."""

    def __init__(self, norm: Norm | RmsNorm, mlp: DeployedMlp, rows: int, late: bool) -> None:
        super().__init__()
        self.norm, self.mlp = norm, mlp
        self.rows, self.late = rows, late

    def forward(self, x: Tensor) -> Tensor:
        side_by_side = (-1, self.rows, self.mlp.fc1.weight.shape[0])
        x = self.norm(x.reshape(side_by_side)) if self.late else self.norm(x).reshape(side_by_side)
        merged: Tensor = self.mlp(x)
        return merged


class DeployedReadout(nn.Module):
    """The outputs that are asked for, blocks back in the processor's order."""

    def __init__(
        self,
        outputs: tuple[Output, ...],
        merger: DeployedMerger | None,
        deepstack: list[DeployedMerger],
        reorder: Reorder | None,
    ) -> None:
        super().__init__()
        self.outputs, self.merger, self.deepstack = outputs, merger, nn.ModuleList(deepstack)
        self.reorder = reorder

    def forward(self, x: Tensor, *taps: Tensor) -> tuple[Tensor, ...]:
        results: dict[Output, Tensor] = {}
        if self.merger is not None:
            results["image_features"] = self.ordered(self.merger(x))
        if self.deepstack:
            features = [merger(tap) for merger, tap in zip(self.deepstack, taps, strict=True)]
            results["deepstack_features"] = torch.stack([self.ordered(x) for x in features], dim=1)
        return tuple(results[output] for output in self.outputs)

    def ordered(self, x: Tensor) -> Tensor:
        return x if self.reorder is None else self.reorder(x)

    def at(self, config: QwenVisionConfig, groups: Groups | None) -> DeployedReadout:
        """The same layers for the grid of ``config``."""

        def resized(merger: DeployedMerger) -> DeployedMerger:
            return DeployedMerger(merger.norm, merger.mlp, config.feature_rows, merger.late)

        return DeployedReadout(
            self.outputs,
            None if self.merger is None else resized(self.merger),
            [resized(cast(DeployedMerger, merger)) for merger in self.deepstack],
            None if groups is None else Reorder(groups.back),
        )


# --- rewrites ----------------------------------------------------------------------------------------------


def patches_to_gemm(
    embedding: Embedding, groups: Groups | None, kind: InputKind, preprocess: Preprocess | None
) -> DeployedEmbedding:
    """The patch convolution as a GEMM: over one frame of a still, with mean and std folded for uint8 images.

    Both frames of a still are the same, so the kernel is summed over them. The processor's patches may differ
    in their frames, and the kernel stays whole. ((r u) - mean) / std is linear in the pixel u. Positions, the
    bias and what the mean adds are one row for each patch.
    """
    config, weight = embedding.config, embedding.patch_embed.weight
    patch = config.patch_size**2
    kernel = weight.reshape(config.width, config.channels, config.temporal_patch, patch)
    added = bias_of(embedding.patch_embed)
    if kind != "patches":
        kernel = kernel.sum(2, keepdim=True)  # (D, C, 1, P P)
    if kind == "uint8":
        if preprocess is None:
            raise ValueError("uint8 input needs the preprocessing whose mean and std to fold")
        scale, shift = normalisation(preprocess)
        offset = torch.einsum("dctp,c->d", kernel, shift)
        added = offset if added is None else added + offset
        kernel = (kernel * scale[:, None, None]).movedim(1, 3)  # (D, 1, P P, C)
    order = torch.arange(config.patches) if groups is None else groups.patches(config.merged)
    if embedding.pos_embed is not None:
        positions = interpolated(embedding.pos_embed, config)[order]  # (T, D)
        added = positions if added is None else positions + added
    projection = Linear(kernel.flatten(1).t(), added)
    if kind != "patches":
        order = patch_order(config)[order]
    as_it_is = torch.equal(order, torch.arange(config.patches))
    return DeployedEmbedding(projection, None if as_it_is else Reorder(order), config, kind)


def fold_rms_weights(block: Block) -> Block:
    """An RMSNorm's weight multiplies the columns of the linear layers that read what it gives."""
    if isinstance(block.norm1, nn.LayerNorm):
        return block
    block = edited(block)
    attn, mlp = block.attn, block.mlp
    for norm, readers in ((block.norm1, (attn.q, attn.k, attn.v)), (block.norm2, (mlp.fc1,))):
        for linear in readers:
            linear.weight = parameter(linear.weight * norm.weight)
        norm.weight = parameter(torch.ones_like(norm.weight))
    return block


def weightless(norm: nn.LayerNorm | nn.RMSNorm, eps: float) -> Norm | RmsNorm:
    """The deployed form; the weight of an RMSNorm is elsewhere already."""
    return deployed_norm(norm) if isinstance(norm, nn.LayerNorm) else RmsNorm(eps)


def group_windows(
    projections: Sequence[Linear],
    proj: Linear,
    config: QwenVisionConfig,
    groups: Groups | None,
    *,
    windowed: bool,
) -> GroupedAttention:
    """Attention within windows without a mask, since those of equal size lie together.

    Args:
        projections: of queries, keys and values.
        windowed: whether the block has windows; else it has one, of all patches.
    """
    cos, sin = rotation(config)
    if groups is not None:
        order = groups.patches(config.merged)
        cos, sin = cos[order], sin[order]
    sizes = groups.sizes if groups is not None and windowed else ((1, config.patches),)
    return GroupedAttention(projections, proj, config.heads, RotatePatches(cos[:, None], sin[:, None]), sizes)


def deployed_block(block: Block, config: QwenVisionConfig, groups: Groups | None) -> DeployedBlock:
    attn = block.attn
    *projections, proj = (deployed_linear(linear) for linear in (attn.q, attn.k, attn.v, attn.proj))
    attention = group_windows(projections, proj, config, groups, windowed=attn.windowed)
    norm1, norm2 = (weightless(norm, config.norm_eps) for norm in (block.norm1, block.norm2))
    return DeployedBlock(norm1, attention, norm2, deployed_mlp(block.mlp))


def merge(merger: Merger, config: QwenVisionConfig) -> DeployedMerger:
    """The merger, an RMSNorm's weight in the layer behind it."""
    fc1, norm = merger.fc1, merger.norm
    weight = fc1.weight
    if not isinstance(norm, nn.LayerNorm):
        weight = weight * norm.weight.repeat(weight.shape[1] // len(norm.weight))
    mlp = DeployedMlp(Linear(weight.t(), fc1.bias), deployed_linear(merger.fc2), "gelu")
    return DeployedMerger(weightless(norm, config.norm_eps), mlp, config.feature_rows, merger.late)


def read_out(
    readout: Readout, config: QwenVisionConfig, groups: Groups | None, outputs: tuple[Output, ...]
) -> DeployedReadout:
    """Mergers of the outputs that are asked for, and the order of the windows undone."""
    deepstack = [cast(Merger, merger) for merger in readout.deepstack if "deepstack_features" in outputs]
    return DeployedReadout(
        outputs,
        merge(readout.merger, config) if "image_features" in outputs else None,
        [merge(merger, config) for merger in deepstack],
        None if groups is None else Reorder(groups.back),
    )


class QwenArchitecture(Architecture[QwenVisionConfig, QwenVision]):
    """Qwen2-VL's, Qwen2.5-VL's and Qwen3-VL's vision towers."""

    def reference(self, config: QwenVisionConfig, *, fused_attention: bool = False) -> QwenVision:
        return QwenVision(config, FusedAttention if fused_attention else Attention)

    def forward_flops(self, config: QwenVisionConfig) -> int:
        """Windows are counted as windows, however the reference masks them."""
        t, d, hidden = config.patches, config.width, config.width * config.merged
        mlp = config.mlp_width * (3 if config.gated_mlp else 2)
        mergers = 2 * config.feature_rows * hidden * (hidden + config.out_width) * (1 + len(config.taps))
        scores = sum(_scores(config, block) for block in range(config.depth))
        return 2 * t * d * (config.patch_columns + config.depth * (4 * d + mlp)) + 4 * d * scores + mergers

    def applied_rewrites(
        self, config: QwenVisionConfig, outputs: tuple[Output, ...], input_kind: InputKind
    ) -> tuple[Rewrite, ...]:
        t, d, depth = config.patches, config.width, blocks_read(config, outputs)
        groups, stills = grouped(config), input_kind != "patches"
        windowed = sum(config.windowed(block) for block in range(depth)) if groups else 0
        sizes = " and ".join(f"{count} of {size} patches" for count, size in groups.sizes) if groups else ""
        scores = config.heads * sum(_scores(config, block) for block in range(depth))
        columns = config.patch_columns - config.patch_columns // config.temporal_patch
        rows = [
            ("patches_to_gemm", "patch convolution, bias and positions: one GEMM", d * t, True),
            (
                "sum_temporal_kernel",
                f"the {config.temporal_patch} frames of a still are one",
                2 * t * d * columns,
                stills and columns > 0,
            ),
            ("group_windows", f"windows of {windowed} blocks without a mask: {sizes}", 0, windowed > 0),
            ("fold_attention_scale", "attention scale in the query weights", scores, True),
            ("move_value_bias", "in the projection's bias", depth * t * d, True),
            ("fold_rms_weights", "in the layers behind them", 2 * depth * t * d, config.norm == "rms"),
            ("fix_rotation", "sines and cosines of every patch are constants", 0, True),
            ("fix_positions", "the table is interpolated once", 6 * t * d, config.positions > 0),
            ("fold_normalisation", "mean and std in the projection", 6 * t * d, input_kind == "uint8"),
        ]
        return tuple(
            Rewrite(name=name, detail=text, flops_saved=saved)
            for name, text, saved, applies in rows
            if applies
        )

    def patches(self, config: QwenVisionConfig, pixel_values: Tensor) -> Tensor:
        return patches_of(pixel_values, config)

    def view(self, reference: QwenVision) -> ModelView:
        return qwen_view(reference)

    @torch.no_grad()
    def deploy(
        self,
        reference: QwenVision,
        plan: PrecisionPlan,
        *,
        outputs: tuple[Output, ...],
        input_kind: InputKind,
        preprocess: Preprocess | None,
    ) -> DeployedModel:
        config, groups = reference.config, grouped(reference.config)
        blocks = []
        for i, part in enumerate(reference.blocks[: blocks_read(config, outputs)]):
            block = cast(Block, doubled(part))
            for rewrite in (*BLOCK_REWRITES, fold_rms_weights):
                block = rewrite(block)
            blocks.append(assign_dtypes(deployed_block(block, config, groups), f"blocks.{i}", plan))
        readout = read_out(doubled(reference.readout), config, groups, outputs)
        embedding = patches_to_gemm(doubled(reference.embedding), groups, input_kind, preprocess)
        return _together(embedding, blocks, readout, config, plan)

    @torch.no_grad()
    def redeploy(
        self,
        reference: QwenVision,
        like: DeployedModel,
        plan: PrecisionPlan,
        *,
        outputs: tuple[Output, ...],
        input_kind: InputKind,
        preprocess: Preprocess | None,
    ) -> DeployedModel:
        config, groups = reference.config, grouped(reference.config)
        blocks = []
        for i, same in enumerate(like.blocks):
            block: Any = same
            old = block.attn
            attn = group_windows((old.q, old.k, old.v), old.proj, config, groups, windowed=config.windowed(i))
            again = DeployedBlock(block.norm1, attn, block.norm2, block.mlp)
            blocks.append(assign_dtypes(again, f"blocks.{i}", plan))
        readout = cast(DeployedReadout, like.readout).at(config, groups)
        embedding = patches_to_gemm(doubled(reference.embedding), groups, input_kind, preprocess)
        return _together(embedding, blocks, readout, config, plan)


def _together(
    embedding: DeployedEmbedding,
    blocks: list[DeployedBlock],
    readout: DeployedReadout,
    config: QwenVisionConfig,
    plan: PrecisionPlan,
) -> DeployedModel:
    model = DeployedModel(
        assign_dtypes(embedding, "embedding", plan),
        blocks,
        assign_dtypes(readout, "readout", plan),
        readout.outputs,
        config.taps if "deepstack_features" in readout.outputs else (),
    )
    model.output_dtype = plan.output_dtype
    return model.eval()


def blocks_read(config: QwenVisionConfig, outputs: tuple[Output, ...]) -> int:
    """How many blocks the outputs depend on: all of them, unless only deepstack features are asked for."""
    return config.depth if "image_features" in outputs else config.taps[-1] + 1


def _scores(config: QwenVisionConfig, block: int) -> int:
    """Pairs of patches that see each other in a block."""
    groups = grouped(config) if config.windowed(block) else None
    return config.patches**2 if groups is None else sum(count * size**2 for count, size in groups.sizes)
