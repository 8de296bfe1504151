"""The same model as the runner's, written as anyone would in PyTorch: what it is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitdeploy_kernels.layernorm_linear import Folded
from vitdeploy_kernels.vit import AbsorbedBlock, Block, Linear, VitShape, VitWeights

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """From a weight (in, out), in the weight's dtype."""
    layer = nn.Linear(*weight.shape, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.t().contiguous(), requires_grad=False)
    layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return layer


def plain(layer: Folded | Linear) -> nn.Linear:
    return linear(layer.weight, layer.bias)


def projections(block: Block | AbsorbedBlock) -> nn.Linear:
    """Queries, keys and values of a block in one layer; an absorbed block's as it was before."""
    if isinstance(block, Block):
        return plain(block.qkv)
    width = block.q.weight.shape[0]
    keys = block.key.permute(2, 0, 1).reshape(width, -1)
    values = block.value.permute(1, 0, 2).reshape(width, -1)
    bias = torch.cat([block.q.bias, torch.zeros_like(block.q.bias).repeat(2)])
    return linear(torch.cat([block.q.weight, keys, values], dim=1), bias)


class PlainBlock(nn.Module):
    """Pre-norm attention and MLP; ``sdpa`` takes scaled_dot_product_attention."""

    def __init__(self, shape: VitShape, block: Block | AbsorbedBlock, sdpa: bool) -> None:
        super().__init__()
        self.shape, self.sdpa = shape, sdpa
        dtype, device = block.proj.weight.dtype, block.proj.weight.device
        self.norm1 = nn.LayerNorm(shape.width, shape.eps, device=device, dtype=dtype)
        self.norm2 = nn.LayerNorm(shape.width, shape.eps, device=device, dtype=dtype)
        self.qkv, self.proj = projections(block), plain(block.proj)
        self.fc1, self.fc2 = plain(block.fc1), plain(block.fc2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.shape.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.sdpa:
            mixed = F.scaled_dot_product_attention(q, k, v, scale=self.shape.scale)
        else:
            mixed = (q @ k.transpose(2, 3) * self.shape.scale).softmax(dim=-1) @ v
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.fc2(ACTIVATIONS[self.shape.activation](self.fc1(self.norm2(x))))


class PlainViT(nn.Module):
    """(N, C, H, W) float32 to (N, classes); a shape with a head over the first token."""

    def __init__(self, shape: VitShape, weights: VitWeights, *, sdpa: bool) -> None:
        super().__init__()
        assert weights.last is not None
        assert weights.head is not None
        weight, tokens = weights.embedding.weight, weights.embedding.tokens.to(weights.dtype)
        self.embed = nn.Conv2d(
            shape.channels, shape.width, shape.patch, shape.patch, bias=False, device="meta"
        )
        filters = weight.t().reshape(shape.width, shape.channels, shape.patch, shape.patch)
        self.embed.weight = nn.Parameter(filters.contiguous(), requires_grad=False)
        self.register_buffer("prefix", tokens[None, : shape.prefix])
        self.register_buffer("position", tokens[None, shape.prefix :])
        blocks = (*weights.blocks, weights.last)
        self.blocks = nn.Sequential(*(PlainBlock(shape, block, sdpa) for block in blocks))
        device, dtype = weight.device, weights.dtype
        self.norm = nn.LayerNorm(shape.width, shape.eps, device=device, dtype=dtype)
        self.head = plain(weights.head)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images.to(self.embed.weight.dtype)).flatten(2).transpose(1, 2) + self.position
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], dim=1)
        return self.head(self.norm(self.blocks(x)[:, 0]))
