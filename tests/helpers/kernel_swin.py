"""What the runner of Swin Transformers has to compute, in float64, from its folded weights."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from vitdeploy_kernels import reference
from vitdeploy_kernels.swin import SwinShape, SwinWeights


def tokens_of(shape: SwinShape, weights: SwinWeights, images: Tensor) -> Tensor:
    """All tokens behind the last block, in the order of its windows, (N, T, D)."""
    embedding = weights.embedding
    x = reference.patch_embed(images, embedding.weight, embedding.tokens, shape.patch, 0, embedding.scale)
    x = F.layer_norm(x, x.shape[-1:], weights.gain.double(), weights.shift.double(), 1e-5)[:, weights.order]
    x = x if weights.positions is None else x + weights.positions
    for stage, blocks in enumerate(weights.stages):
        of = shape.stage(stage)
        if stage:
            merge = weights.merges[stage - 1]
            four = x[:, merge.four].flatten(2)
            x = reference.layernorm_linear(four, merge.reduction.weight, merge.reduction.bias, 1e-5)
        for each in blocks:
            x, block = x if each.order is None else x[:, each.order], each.block
            assert block.score_bias is not None
            qkv = reference.layernorm_linear(x, block.qkv.weight, block.qkv.bias, of.eps)
            qkv = qkv.reshape(-1, of.tokens, 3 * of.width)
            mixed = reference.attention(qkv, of.heads, 1.0, block.score_bias[..., : of.tokens])
            x = reference.linear_residual(mixed.view(x.shape), block.proj.weight, block.proj.bias, x)
            hidden = reference.layernorm_linear(x, block.fc1.weight, block.fc1.bias, of.eps, of.activation)
            x = reference.linear_residual(hidden, block.fc2.weight, block.fc2.bias, x)
    return x
