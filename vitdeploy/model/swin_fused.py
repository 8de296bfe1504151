"""A Swin's weights for the fused kernels: the exact rewrites of ``swin_rewrites.py``, and one more.

LayerNorm's gain and shift move into the linear layer behind it. Nothing is centred, as a ViT's residual
stream is: merging reads four tokens with one mean.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from vitdeploy.config import InputKind, Output, Preprocess, SwinConfig
from vitdeploy.errors import UsageError
from vitdeploy.model.folds import doubled, drop_key_bias, fold_attention_scale, move_value_bias
from vitdeploy.model.fused import (
    FusedModel,
    check_range,
    fold_norms,
    folded,
    full_block,
    moved,
    projection,
    readout_of,
)
from vitdeploy.model.swin import Attention, Block, Merge, Stage, Swin
from vitdeploy.model.swin_deployed import DeployedPatches
from vitdeploy.model.swin_rewrites import four_of, patches_to_gemm, places_of, read_out, stream_order
from vitdeploy_kernels import swin as kernels
from vitdeploy_kernels.vit import Block as FusedBlock


def kernel_shape(config: SwinConfig, output: Output, input_kind: InputKind) -> kernels.SwinShape:
    """The kernels' view of a configuration.

    Raises:
        UsageError: they do not compute it.
    """
    if beyond := config.beyond_kernels(output):
        raise UsageError(f"there are no fused kernels for {', '.join(beyond)}")
    stages = range(len(config.depths))
    return kernels.SwinShape(
        image_size=config.image_size,
        patch=config.patch_size,
        channels=config.channels,
        width=config.width,
        depths=config.depths,
        heads=config.heads,
        windows=tuple(config.window(stage) for stage in stages),
        shifted=tuple(config.shift(stage, 1) != (0, 0) for stage in stages),
        mlp_widths=config.mlp_widths,
        activation=config.activation,
        eps=config.norm_eps,
        uint8=input_kind == "uint8",
    )


@torch.no_grad()
def fuse(
    swin: Swin,
    dtype: torch.dtype,
    *,
    output: Output = "logits",
    input_kind: InputKind = "float",
    preprocess: Preprocess | None = None,
    device: torch.device | str = "cpu",
) -> FusedModel:
    """Rewrite, round and move a model's weights for the fused kernels; ``swin`` is not changed.

    Args:
        dtype: float16 or bfloat16.
        preprocess: needed for ``input_kind="uint8"``.

    Raises:
        UsageError: the kernels do not compute this model.
        PrecisionError: a weight does not fit into the dtype (each is named).
    """
    config = swin.config
    shape = kernel_shape(config, output, input_kind)
    if input_kind == "uint8" and preprocess is None:
        raise ValueError("uint8 input needs the preprocessing whose mean and std to fold")
    stages = cast("list[Stage]", list(swin.layers))
    order = stream_order(cast(Attention, stages[0].blocks[0].attn))
    patches = patches_to_gemm(doubled(swin.embedding), order, preprocess if input_kind == "uint8" else None)
    first, blocks, merges = order, [], []
    for number, stage in enumerate(stages):
        if number:
            then = stream_order(cast(Attention, stage.blocks[0].attn))
            merges.append(_merge(doubled(cast(Merge, stages[number - 1].merge)), order, then, dtype))
            order = then
        row = []
        for part in stage.blocks:
            block = doubled(cast(Block, part))
            then = stream_order(block.attn)
            row.append(kernels.SwinBlock(_block(block, dtype), _change(order, then)))
            order = then
        blocks.append(tuple(row))
    norm, positions = patches.patch_norm, patches.positions
    weights = kernels.SwinWeights(
        embedding=projection(*_projection(patches), dtype),
        gain=norm.weight.float(),
        shift=norm.bias.float(),
        positions=None if positions is None else positions.value.float(),
        order=first,
        stages=tuple(blocks),
        merges=tuple(merges),
    )
    check_range(weights, dtype)
    readout = readout_of(read_out(doubled(swin.readout), (output,), order), dtype, device)
    return FusedModel(shape, moved(weights, device), lambda x: readout(x.flatten(0, 1)))


def _projection(patches: DeployedPatches) -> tuple[Tensor, Tensor, bool]:
    """The patch projection, what is added to each patch (T, D), and whether pixels are uint8."""
    linear, config = patches.patch_embed, patches.config
    assert linear.bias is not None
    return linear.weight, linear.bias.expand(config.patches, -1), patches.channels_last


def _block(block: Block, dtype: torch.dtype) -> FusedBlock:
    for rewrite in (fold_norms, fold_attention_scale, drop_key_bias, move_value_bias):
        block = rewrite(block)
    return full_block(block, dtype)


def _change(now: Tensor, then: Tensor) -> Tensor | None:
    return None if torch.equal(now, then) else places_of(now, len(now))[then]


def _merge(merge: Merge, now: Tensor, then: Tensor, dtype: torch.dtype) -> kernels.Merge:
    """See :func:`vitdeploy.model.swin_rewrites.merge_by_gather`."""
    four = places_of(now, len(now))[four_of(merge)[then]]
    return kernels.Merge(four, folded(merge.norm, merge.reduction, dtype))
