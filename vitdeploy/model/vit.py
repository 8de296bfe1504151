"""The reference Vision Transformer: plain, exact, made to be read.

Everything a deployed artifact computes is measured against this module in float64. It follows
Dosovitskiy et al. 2021 (https://arxiv.org/abs/2010.11929), with the switches that DeiT (distillation
token), DINOv2 (registers, layer scale, SwiGLU) and the field's fine-tuned variants need.

Shapes in comments: N images, C channels, H x W pixels, P patch, T tokens, D width, h heads, d columns
of a head, M columns inside the MLP.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitdeploy.config import Output, ViTConfig
from vitdeploy.model.reference import ACTIVATIONS, Reference


def sincos2d(config: ViTConfig) -> Tensor:
    """Return the fixed 2D sinusoidal position table, (patches, width), float64.

    Beyer et al. 2022, "Better plain ViT baselines for ImageNet-1k" (https://arxiv.org/abs/2205.01580).
    """
    rows, columns = config.grid
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    quarter = config.width // 4
    omega = 10_000.0 ** -(torch.arange(quarter, dtype=torch.float64) / max(quarter - 1, 1))  # (D/4)
    y, x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega  # (patches, D/4) each
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)  # (patches, D)


class Embedding(nn.Module):
    """Pixels to tokens: patch projection, prefix tokens, positions."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch_size
        self.patch_embed = nn.Conv2d(config.channels, width, kernel_size=patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(width)) if config.cls_token else None
        self.dist_token = nn.Parameter(torch.zeros(width)) if config.distillation_token else None
        self.registers = nn.Parameter(torch.zeros(config.registers, width)) if config.registers else None
        learned = config.position == "learned"
        rows = config.position_prefix + config.patches
        self.pos_embed = nn.Parameter(torch.zeros(rows, width)) if learned else None

    def prefix(self) -> Tensor:
        """The prefix tokens with their positions, (prefix tokens, D)."""
        rows = [
            t.reshape(-1, self.config.width)
            for t in (self.cls_token, self.dist_token, self.registers)
            if t is not None
        ]
        if not rows:
            return self.patch_embed.weight.new_zeros(0, self.config.width)
        tokens = torch.cat(rows)  # (prefix, D)
        if self.pos_embed is None:
            return tokens
        with_position = self.config.position_prefix
        positions = F.pad(
            self.pos_embed[:with_position], (0, 0, 0, len(tokens) - with_position)
        )  # (prefix, D)
        return tokens + positions

    def positions(self) -> Tensor | None:
        """The patches' positions, (patches, D)."""
        if self.config.position == "sincos2d":
            return sincos2d(self.config).to(self.patch_embed.weight)
        return None if self.pos_embed is None else self.pos_embed[self.config.position_prefix :]

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embed(pixel_values)  # (N, C, H, W) -> (N, D, H/P, W/P)
        x = x.flatten(2).transpose(1, 2)  # (N, patches, D)
        positions = self.positions()
        if positions is not None:
            x = x + positions
        prefix = self.prefix().expand(x.shape[0], -1, -1)  # (N, prefix, D)
        return torch.cat([prefix, x], dim=1)  # (N, T, D)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.heads, self.head_width = config.heads, config.head_width
        self.scale = config.head_width**-0.5
        self.q = nn.Linear(config.width, config.width, bias=config.qkv_bias)
        self.k = nn.Linear(config.width, config.width, bias=config.qkv_bias)
        self.v = nn.Linear(config.width, config.width, bias=config.qkv_bias)
        self.proj = nn.Linear(config.width, config.width)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, self.head_width)).transpose(1, 2)  # (N, T, D) -> (N, h, T, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split_heads(linear(x)) for linear in (self.q, self.k, self.v))
        scores = q @ k.transpose(2, 3) * self.scale  # (N, h, T, T)
        x = scores.softmax(dim=-1) @ v  # (N, h, T, d)
        return self.proj(x.transpose(1, 2).flatten(2))  # (N, T, D)


class FusedAttention(Attention):
    """The same function by PyTorch's fused kernels, which never hold the scores of all pairs of tokens."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split_heads(linear(x)) for linear in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)  # (N, h, T, d)
        return self.proj(x.transpose(1, 2).flatten(2))  # (N, T, D)


class Mlp(nn.Module):
    """Two linear layers with an activation between them, gated (SwiGLU) where the model is."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.gated = config.gated_mlp
        self.activation = config.activation
        self.fc1 = nn.Linear(config.width, config.mlp_width * (2 if self.gated else 1))
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)  # (N, T, D) -> (N, T, M), or 2M when gated
        if self.gated:
            gate, x = x.chunk(2, dim=-1)  # (N, T, M) each
            return self.fc2(ACTIVATIONS[self.activation](gate) * x)  # (N, T, D)
        return self.fc2(ACTIVATIONS[self.activation](x))  # (N, T, D)


class Block(nn.Module):
    """Pre-norm transformer block, with layer scale (Touvron et al. 2021, https://arxiv.org/abs/2103.17239)."""

    def __init__(self, config: ViTConfig, attention: type[Attention] = Attention) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = attention(config)
        self.scale1 = nn.Parameter(torch.ones(config.width)) if config.layer_scale else None
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config)
        self.scale2 = nn.Parameter(torch.ones(config.width)) if config.layer_scale else None

    def forward(self, x: Tensor) -> Tensor:
        branch = self.attn(self.norm1(x))
        x = x + (branch if self.scale1 is None else branch * self.scale1)
        branch = self.mlp(self.norm2(x))
        return x + (branch if self.scale2 is None else branch * self.scale2)


class Readout(nn.Module):
    """Final LayerNorm, pooling, and the head or heads."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        inner = config.representation_width
        self.representation = nn.Linear(config.features, inner) if inner else None
        self.head = nn.Linear(inner or config.features, config.classes) if config.classes else None
        both = config.classes and config.pool == "both_heads"
        self.head_dist = nn.Linear(inner or config.features, config.classes) if both else None

    def pool(self, x: Tensor) -> Tensor:
        """Tokens (N, T, D) to one vector (N, features); the distillation token is the caller's."""
        patches = x[:, self.config.prefix_tokens :]  # (N, patches, D)
        if self.config.pool == "mean":
            return patches.mean(dim=1)
        if self.config.pool == "cls_mean":
            return torch.cat([x[:, 0], patches.mean(dim=1)], dim=1)  # (N, 2D)
        return x[:, 0]

    def represent(self, x: Tensor) -> Tensor:
        return x if self.representation is None else torch.tanh(self.representation(x))  # (N, features or R)

    def forward(self, x: Tensor, output: Output) -> Tensor:
        late = self.config.norm_after_pool
        tokens = x if late and output != "tokens" else self.norm(x)
        if output == "tokens":
            return tokens
        pooled = self.norm(self.pool(x)) if late else self.pool(tokens)
        if output == "features":
            return (pooled + tokens[:, 1]) / 2 if self.config.pool == "both_heads" else pooled
        if self.head is None:
            raise ValueError("this model has no head: ask for features or tokens")
        logits = self.head(self.represent(pooled))  # (N, classes)
        if self.head_dist is not None:
            logits = (logits + self.head_dist(self.represent(tokens[:, 1]))) / 2
        return logits


class ViT(Reference):
    """The reference model: logits (N, classes), features (N, features) or tokens (N, T, D)."""

    config: ViTConfig
    readout: Readout

    def __init__(self, config: ViTConfig, attention: type[Attention] = Attention) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.depth))
        self.readout = Readout(config)

    def stages(self) -> list[tuple[str, nn.Module]]:
        return [("embedding", self.embedding), *((f"blocks.{i}", b) for i, b in enumerate(self.blocks))]
