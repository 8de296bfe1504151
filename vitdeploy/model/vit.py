"""The reference Vision Transformer: plain, exact, made to be read.

Everything a deployed artifact computes is measured against this module in float64. It follows
Dosovitskiy et al. 2021 (https://arxiv.org/abs/2010.11929), with the switches that DeiT (distillation
token), DINOv2 and DINOv3 (registers, layer scale, SwiGLU, rotary positions), CLIP (a norm before the blocks,
a projection), SigLIP (pooling by a probe), BEiT (relative positions, codes), EVA02, BLIP and hybrids (a
ResNet before the patches: :mod:`vitdeploy.model.stem`) need.

Shapes in comments: N images, C channels, H x W pixels, P patch, T tokens, D width, h heads, d columns
of a head, M columns inside the MLP, E columns of the embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitdeploy.config import FinalNorm, Output, ViTConfig
from vitdeploy.model.parts import Mlp
from vitdeploy.model.positions import (
    relative_positions,
    rotate,
    rotation,
    score_bias_rows,
    sincos1d,
    sincos2d,
)
from vitdeploy.model.reference import Reference
from vitdeploy.model.stem import ResNetStem


class Embedding(nn.Module):
    """Pixels to tokens: a ResNet where there is one, patch projection, prefix tokens, positions."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch_size
        self.stem = ResNetStem(config.stem, config.channels) if config.stem is not None else None
        self.patch_embed = nn.Conv2d(
            config.patch_channels, width, kernel_size=patch, stride=patch, bias=config.patch_bias
        )
        self.cls_token = nn.Parameter(torch.zeros(width)) if config.cls_token else None
        self.dist_token = nn.Parameter(torch.zeros(width)) if config.distillation_token else None
        self.registers = nn.Parameter(torch.zeros(config.registers, width)) if config.registers else None
        learned = config.position == "learned"
        rows = config.position_prefix + config.patches
        self.pos_embed = nn.Parameter(torch.zeros(rows, width)) if learned else None
        self.pre_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.pre_norm else None

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
        if self.config.position == "sincos1d":
            return sincos1d(self.config).to(self.patch_embed.weight)
        return None if self.pos_embed is None else self.pos_embed[self.config.position_prefix :]

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = pixel_values if self.stem is None else self.stem(pixel_values)
        x = self.patch_embed(x)  # (N, C, H, W) -> (N, D, H/P, W/P)
        x = x.flatten(2).transpose(1, 2)  # (N, patches, D)
        positions = self.positions()
        if positions is not None:
            x = x + positions
        prefix = self.prefix().expand(x.shape[0], -1, -1)  # (N, prefix, D)
        x = torch.cat([prefix, x], dim=1)  # (N, T, D)
        return x if self.pre_norm is None else self.pre_norm(x)


class Attention(nn.Module):
    """Multi-head self-attention; queries and keys are rotated, scores have a bias, where the model is so."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.heads, self.head_width = config.heads, config.head_width
        self.scale = config.head_width**-0.5
        self.rotated = config.rotary is not None
        self.q = nn.Linear(config.width, config.width, bias=config.qkv_bias)
        self.k = nn.Linear(config.width, config.width, bias=config.qkv_bias and config.key_bias)
        self.v = nn.Linear(config.width, config.width, bias=config.qkv_bias)
        self.softmax = nn.Softmax(dim=-1)
        self.proj = nn.Linear(config.width, config.width)
        table = torch.zeros(score_bias_rows(config), config.heads)
        self.score_bias = nn.Parameter(table) if config.score_bias else None

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, self.head_width)).transpose(1, 2)  # (N, T, D) -> (N, h, T, d)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, T, D) to three of (N, h, T, d)."""
        q, k, v = (self.split_heads(linear(x)) for linear in (self.q, self.k, self.v))
        if (turns := self.turns()) is not None:
            q, k = rotate(q, *turns), rotate(k, *turns)
        return q, k, v

    def turns(self) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines by which queries and keys are rotated, (T, d) each."""
        if self.config.rotary is None:
            return None
        cos, sin = rotation(self.config)
        return cos.to(self.q.weight), sin.to(self.q.weight)

    def bias(self) -> Tensor | None:
        """What is added to the scores, (h, T, T)."""
        return None if self.score_bias is None else relative_positions(self.score_bias, self.config)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.queries_keys_values(x)
        scores = q @ k.transpose(2, 3) * self.scale  # (N, h, T, T)
        bias = self.bias()
        if bias is not None:
            scores = scores + bias
        x = self.softmax(scores) @ v  # (N, h, T, d)
        return self.proj(x.transpose(1, 2).flatten(2))  # (N, T, D)


class FusedAttention(Attention):
    """The same function by PyTorch's fused kernels, which never hold the scores of all pairs of tokens.

    What positions add is computed once, by :meth:`fix_positions`, and not in every call.
    """

    cos: Tensor | None
    sin: Tensor | None
    scores: Tensor | None

    @torch.no_grad()
    def fix_positions(self) -> None:
        """Hold the rotation and the score bias of the weights that are there; to be called once they are."""
        cos, sin = super().turns() or (None, None)
        for name, table in (("cos", cos), ("sin", sin), ("scores", super().bias())):
            self.register_buffer(name, table, persistent=False)

    def turns(self) -> tuple[Tensor, Tensor] | None:
        return None if self.cos is None or self.sin is None else (self.cos, self.sin)

    def bias(self) -> Tensor | None:
        return self.scores

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.queries_keys_values(x)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(), scale=self.scale)  # (N, h, T, d)
        return self.proj(x.transpose(1, 2).flatten(2))  # (N, T, D)


class Block(nn.Module):
    """Pre-norm transformer block, with layer scale (Touvron et al. 2021, https://arxiv.org/abs/2103.17239)."""

    def __init__(self, config: ViTConfig, attention: type[Attention] = Attention) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = attention(config)
        self.scale1 = nn.Parameter(torch.ones(config.width)) if config.layer_scale else None
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(
            config.width,
            config.mlp_width,
            config.activation,
            gated=config.gated_mlp,
            norm_eps=config.norm_eps if config.mlp_norm else None,
        )
        self.scale2 = nn.Parameter(torch.ones(config.width)) if config.layer_scale else None

    def forward(self, x: Tensor) -> Tensor:
        branch = self.attn(self.norm1(x))
        x = x + (branch if self.scale1 is None else branch * self.scale1)
        branch = self.mlp(self.norm2(x))
        return x + (branch if self.scale2 is None else branch * self.scale2)


class ProbePool(nn.Module):
    """Pooling by a learned query (Lee et al. 2019, https://arxiv.org/abs/1810.00825): (N, T, D) to (N, D)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads, self.scale = config.heads, config.head_width**-0.5
        self.probe = nn.Parameter(torch.zeros(width))
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.softmax = nn.Softmax(dim=-1)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = Mlp(width, config.mlp_width, config.activation)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(self.probe).unflatten(0, (self.heads, 1, -1))  # (h, 1, d)
        k, v = (linear(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for linear in (self.k, self.v))
        scores = q @ k.transpose(2, 3) * self.scale  # (N, h, 1, T)
        x = self.proj((self.softmax(scores) @ v).flatten(1))  # (N, D)
        return x + self.mlp(self.norm(x))


class Readout(nn.Module):
    """Final LayerNorm, pooling, projection, and the heads."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        features, classes = config.features, config.classes
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps) if config.final_norm != "none" else None
        self.probe_pool = ProbePool(config) if config.pool == "probe" else None
        self.projection = nn.Linear(features, config.projection, bias=False) if config.projection else None
        inner = config.representation_width
        self.representation = nn.Linear(features, inner) if inner else None
        reads = inner or (config.embedding if config.head_on == "embedding" else features)
        self.head = nn.Linear(reads, classes) if classes else None
        both = classes and config.pool == "both_heads"
        self.head_dist = nn.Linear(reads, classes) if both else None
        self.code_head = nn.Linear(config.width, config.codes) if config.codes else None

    def pool(self, x: Tensor) -> Tensor:
        """Tokens (N, T, D) to one vector (N, features); the distillation token is the caller's."""
        if self.probe_pool is not None:
            pooled: Tensor = self.probe_pool(x)
            return pooled
        patches = x[:, self.config.prefix_tokens :]  # (N, patches, D)
        if self.config.pool == "mean":
            return patches.mean(dim=1)
        if self.config.pool == "cls_mean":
            return torch.cat([x[:, 0], patches.mean(dim=1)], dim=1)  # (N, 2D)
        return x[:, 0]

    def normed(self, x: Tensor, *where: FinalNorm) -> Tensor:
        """Through the final LayerNorm, if it works there."""
        return self.norm(x) if self.norm is not None and self.config.final_norm in where else x

    def represent(self, x: Tensor) -> Tensor:
        return x if self.representation is None else torch.tanh(self.representation(x))  # (N, features or R)

    def embed(self, features: Tensor) -> Tensor:
        """(N, features) to (N, E), of length 1."""
        x = features if self.projection is None else self.projection(features)
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)

    def forward(self, x: Tensor, output: Output) -> Tensor:
        if output == "tokens":
            return self.normed(x, "tokens", "both", "read")
        tokens = self.normed(x, "tokens", "both")
        if output == "codes":
            if self.code_head is None:
                raise ValueError("this model has no codes: ask for features or tokens")
            return self.code_head(tokens[:, self.config.prefix_tokens :])  # (N, patches, codes)
        pooled = self.normed(self.pool(tokens), "pooled", "both", "read")
        if self.config.pool == "both_heads" and output != "logits":
            pooled = (pooled + tokens[:, 1]) / 2
        if output == "features":
            return pooled
        if output == "embedding":
            return self.embed(pooled)
        if self.head is None:
            raise ValueError("this model has no head: ask for features or tokens")
        if self.config.head_on == "embedding":
            return self.head(self.embed(pooled))
        logits = self.head(self.represent(pooled))  # (N, classes)
        if self.head_dist is not None:
            logits = (logits + self.head_dist(self.represent(tokens[:, 1]))) / 2
        return logits


class ViT(Reference):
    """The reference model; ``config.output_shape`` says what it can return, in which shape."""

    config: ViTConfig
    readout: Readout

    def __init__(self, config: ViTConfig, attention: type[Attention] = Attention) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.depth))
        self.readout = Readout(config)

    def fix_positions(self) -> None:
        for block in self.modules():
            if isinstance(block, FusedAttention):
                block.fix_positions()

    def stages(self) -> list[tuple[str, nn.Module]]:
        return [("embedding", self.embedding), *((f"blocks.{i}", b) for i, b in enumerate(self.blocks))]
