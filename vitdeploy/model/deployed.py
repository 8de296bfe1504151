"""The deployed form of a model: the modules whose graph is the one a person would draw.

Every module computes in the dtype its parameters have and casts what reaches it; where dtypes agree,
no cast is traced. Linear weights lie as (in, out), so that a GEMM is one MatMul with a named weight.
Shapes that are known at export are constants, the batch is the -1 of a reshape: no Shape operator is
traced. ``DeployedX`` is a ViT's counterpart of ``X`` in :mod:`vitdeploy.model.vit`, and
:mod:`vitdeploy.model.rewrites` makes it from that.

Shapes in comments: N images, C channels, P patch, T tokens, Q tokens that are read at the end,
D width, h heads, d columns of a head.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitdeploy.config import Activation, Output, ViTConfig
from vitdeploy.model.reference import ACTIVATIONS


def constant(value: Tensor | None) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(value, requires_grad=False)


class Site(nn.Module):
    """A module that computes something and has a dtype of its own in a precision plan."""

    always_fp32: ClassVar[bool] = False
    """An island of every reduced precision: its sums lose too much below fp32."""
    follows_input: ClassVar[bool] = False
    """Without a dtype of its own, unless it is an island."""
    dtype: torch.dtype | None = None
    """What a site without weights computes in; None is what reaches it."""


class Linear(Site):
    """``x @ weight + bias`` with weight (in, out); over rows (R, in) that is a single Gemm operator."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.bias = constant(bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        if self.bias is None:
            return x @ self.weight
        return torch.addmm(self.bias, x, self.weight) if x.dim() == 2 else x @ self.weight + self.bias


class HeadLinear(Site):
    """One GEMM per head: ``x @ weight`` with weight (h, in, out) and x (N, h, rows, in)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.weight.dtype) @ self.weight


class Norm(Site):
    """LayerNorm over the last axis."""

    always_fp32 = True

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Add(Site):
    """A residual addition, a module of its own so that it has a name and a dtype."""

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        dtype = self.dtype or x.dtype
        return x.to(dtype) + branch.to(dtype)


class Softmax(Site):
    """Softmax over the last axis, in its own dtype when it has one."""

    follows_input = True

    def forward(self, scores: Tensor) -> Tensor:
        return scores.to(self.dtype or scores.dtype).softmax(dim=-1)


class DeployedAttention(nn.Module):
    """Self-attention with one GEMM for queries, keys and values; ``qkv`` has columns (3, h, d)."""

    def __init__(self, qkv: Linear, proj: Linear, heads: int, scale: float) -> None:
        super().__init__()
        self.qkv, self.proj = qkv, proj
        self.softmax = Softmax()
        self.heads, self.scale = heads, scale

    def forward(self, x: Tensor) -> Tensor:
        tokens, width = x.shape[1], x.shape[2]
        x = self.qkv(x).reshape(-1, tokens, 3 * self.heads, width // self.heads)  # (N, T, 3h, d)
        q, k, v = x.transpose(1, 2).split(self.heads, dim=1)  # (N, h, T, d) each
        scores = q @ k.transpose(2, 3)  # (N, h, T, T)
        if self.scale != 1:
            scores = scores * self.scale
        x = self.softmax(scores).to(v.dtype) @ v  # (N, h, T, d)
        return self.proj(x.transpose(1, 2).reshape(-1, tokens, width))  # (N, T, D)


class DeployedMlp(nn.Module):
    """Two GEMMs with an activation between them, gated where the model is."""

    def __init__(self, fc1: Linear, fc2: Linear, activation: Activation, gated: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2
        self.activation, self.gated = activation, gated

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.gated:
            gate, x = x.split(x.shape[-1] // 2, dim=-1)
            return self.fc2(ACTIVATIONS[self.activation](gate) * x)
        return self.fc2(ACTIVATIONS[self.activation](x))


class DeployedBlock(nn.Module):
    """Pre-norm block; layer scale is already part of ``attn.proj`` and ``mlp.fc2``."""

    def __init__(self, norm1: Norm, attn: nn.Module, norm2: Norm, mlp: DeployedMlp) -> None:
        super().__init__()
        self.norm1, self.attn, self.add1 = norm1, attn, Add()
        self.norm2, self.mlp, self.add2 = norm2, mlp, Add()

    def forward(self, x: Tensor) -> Tensor:
        x = self.add1(x, self.attn(self.norm1(x)))
        return self.add2(x, self.mlp(self.norm2(x)))


class AbsorbedAttention(nn.Module):
    """Attention of the first Q tokens to all tokens, without projecting keys or values.

    Only Q queries exist, so instead of K = x Wk the query is carried to the token's side, u = q Wk', and
    instead of V = x Wv the tokens are pooled first and projected afterwards. No GEMM runs over the tokens.
    """

    def __init__(
        self, q: Linear, key: HeadLinear, value: HeadLinear, proj: Linear, scale: float, queries: int
    ) -> None:
        super().__init__()
        self.q, self.key, self.value, self.proj = q, key, value, proj
        self.softmax = Softmax()
        self.scale, self.queries = scale, queries

    def forward(self, x: Tensor) -> Tensor:
        heads, columns, width = self.key.weight.shape
        x = x.to(self.key.weight.dtype)
        q = self.q(first_tokens(x, self.queries)).reshape(-1, heads, 1, columns)  # (N Q, h, 1, d)
        u = self.key(q).reshape(-1, self.queries * heads, width)  # (N, Q h, D)
        scores = u @ x.transpose(1, 2)  # (N, Q h, T)
        if self.scale != 1:
            scores = scores * self.scale
        pooled = self.softmax(scores).to(x.dtype) @ x  # (N, Q h, D)
        pooled = self.value(pooled.reshape(-1, heads, 1, width))  # (N Q, h, 1, d)
        return self.proj(pooled.reshape(-1, width))  # (N Q, D)


def first_tokens(x: Tensor, count: int) -> Tensor:
    """The rows of the first ``count`` tokens: (N, T, D) -> (N count, D)."""
    return x[:, 0] if count == 1 else x[:, :count].reshape(-1, x.shape[2])


class AbsorbedBlock(DeployedBlock):
    """The last block when only the first Q tokens are read: (N, T, D) -> (N Q, D)."""

    attn: AbsorbedAttention

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.add1(first_tokens(x, self.attn.queries), self.attn(self.norm1(x)))
        return self.add2(pooled, self.mlp(self.norm2(pooled)))


class Tokens(Site):
    """What the embedding adds to every image: prefix tokens, positions, the patch projection's bias."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value.contiguous(), requires_grad=False)  # (T, D)

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.value.dtype) + self.value


class DeployedEmbedding(nn.Module):
    """Pixels to tokens by one GEMM; prefix tokens, positions and bias are one constant (T, D).

    The prefix rows enter as rows of zeros below which the constant lies, so no token is expanded at run time.
    """

    def __init__(
        self, patch_embed: Linear, tokens: Tensor, config: ViTConfig, *, channels_last: bool
    ) -> None:
        super().__init__()
        self.patch_embed = patch_embed  # weight (C P P, D), or (P P C, D) where channels come last
        self.tokens = Tokens(tokens)
        self.config, self.channels_last = config, channels_last

    def forward(self, pixel_values: Tensor) -> Tensor:
        (rows, columns), patch, channels = self.config.grid, self.config.patch_size, self.config.channels
        if self.channels_last:
            # Cast first (0 to 255 are exact in every dtype): TensorRT has no other operation on uint8.
            pixel_values = pixel_values.to(self.patch_embed.weight.dtype)
            x = pixel_values.reshape(-1, rows, patch, columns, patch, channels).transpose(2, 3)
        else:
            x = pixel_values.reshape(-1, channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(-1, rows * columns, channels * patch * patch)  # (N, patches, C P P)
        x = self.patch_embed(x)  # (N, patches, D)
        if self.config.prefix_tokens:
            x = F.pad(x, (0, 0, self.config.prefix_tokens, 0))  # (N, T, D)
        return self.tokens(x)


class Pool(Site):
    """Tokens to one vector, for the ways of pooling that read every token."""

    always_fp32 = True

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.prefix, self.both = config.prefix_tokens, config.pool == "cls_mean"

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype or x.dtype)
        mean = (x[:, self.prefix :] if self.prefix else x).mean(dim=1)  # (N, D)
        return torch.cat([x[:, 0], mean], dim=1) if self.both else mean


class DeployedReadout(nn.Module):
    """Final LayerNorm, pooling and head. An absorbed block hands over rows, the pooled tokens alone."""

    def __init__(
        self,
        config: ViTConfig,
        output: Output,
        norm: Norm,
        representation: Linear | None,
        head: Linear | None,
    ) -> None:
        super().__init__()
        self.config, self.output = config, output
        self.norm, self.representation, self.head = norm, representation, head
        self.pool = Pool(config) if config.pool in ("mean", "cls_mean") and output != "tokens" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.output == "tokens":
            return self.norm(x)
        if self.pool is None:
            x = self.norm(x)  # (N Q, D)
            if self.config.pool == "both_heads":
                x = x.reshape(-1, 2, self.config.width)
                x = x.mean(dim=1) if self.output == "features" else x.flatten(1)  # (N, D), or (N, 2 D)
        else:
            x = self.norm(self.pool(x)) if self.config.norm_after_pool else self.pool(self.norm(x))
        if self.representation is not None and self.output == "logits":
            x = torch.tanh(self.representation(x))
        return x if self.head is None else self.head(x)


class DeployedModel(nn.Module):
    """A model in its deployed form: pixels in, one output, float32 out whatever runs inside.

    The batch is every tensor's first axis, and no part computes with its size (see ``exporter.graph.trace``).
    """

    def __init__(self, embedding: nn.Module, blocks: Iterable[nn.Module], readout: nn.Module) -> None:
        super().__init__()
        self.embedding, self.blocks, self.readout = embedding, nn.ModuleList(blocks), readout
        self.output_dtype = torch.float32

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.embedding(pixel_values)
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.readout(x)
        return result.to(self.output_dtype)
