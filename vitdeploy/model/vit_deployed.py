"""The deployed form of what only a ViT has: its embedding, its absorbed last block, its readout.

:mod:`vitdeploy.model.rewrites` makes it from :mod:`vitdeploy.model.vit`.

Shapes in comments: N images, C channels, P patch, T tokens, Q tokens that are read at the end,
D width, h heads, d columns of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitdeploy.config import POOLED, FinalNorm, Output, ViTConfig
from vitdeploy.model.deployed import (
    Add,
    DeployedBlock,
    DeployedMlp,
    HeadLinear,
    Linear,
    Norm,
    Normalise,
    Rotate,
    ScoreBias,
    Site,
    Softmax,
)
from vitdeploy.model.stem_deployed import DeployedStem


class RotatedKey(nn.Module):
    """Keys of every token, turned by its position: (N, T, D) to (N, h, T, d)."""

    def __init__(self, linear: Linear, rotate: Rotate, heads: int) -> None:
        super().__init__()
        self.linear, self.rotate, self.heads = linear, rotate, heads

    def forward(self, x: Tensor) -> Tensor:
        tokens, width = x.shape[1], x.shape[2]
        keys = self.linear(x).reshape(-1, tokens, self.heads, width // self.heads).transpose(1, 2)
        turned: Tensor = self.rotate(keys)
        return turned


class AbsorbedAttention(nn.Module):
    """Attention of the first Q tokens to all tokens, without projecting keys or values.

    Only Q queries exist, so instead of K = x Wk the query is carried to the token's side, u = q Wk', and
    instead of V = x Wv the tokens are pooled first and projected afterwards. No GEMM runs over the tokens,
    unless keys are turned by their positions: then theirs does.
    """

    def __init__(
        self,
        q: Linear,
        key: HeadLinear | RotatedKey,
        value: HeadLinear,
        proj: Linear,
        scale: float,
        queries: int,
        score_bias: ScoreBias | None = None,
    ) -> None:
        super().__init__()
        self.q, self.key, self.score_bias, self.value, self.proj = q, key, score_bias, value, proj
        self.softmax = Softmax()
        self.scale, self.queries = scale, queries

    def forward(self, x: Tensor) -> Tensor:
        heads, width, columns = self.value.weight.shape
        x = x.to(self.value.weight.dtype)
        q = self.q(first_tokens(x, self.queries))  # (N Q, D)
        if isinstance(self.key, RotatedKey):
            q = _exchanged(q.reshape(-1, self.queries, heads, columns))  # (N, h, Q, d)
            scores = _exchanged(q @ self.key(x).transpose(2, 3))  # (N, Q, h, T)
            scores = scores.reshape(-1, self.queries * heads, x.shape[1])
        else:
            u = self.key(q.reshape(-1, heads, 1, columns)).reshape(-1, self.queries * heads, width)
            scores = u @ x.transpose(1, 2)  # (N, Q h, T)
        if self.scale != 1:
            scores = scores * self.scale
        if self.score_bias is not None:
            scores = self.score_bias(scores)
        pooled = self.softmax(scores).to(x.dtype) @ x  # (N, Q h, D)
        pooled = self.value(pooled.reshape(-1, heads, 1, width))  # (N Q, h, 1, d)
        return self.proj(pooled.reshape(-1, width))  # (N Q, D)


def _exchanged(x: Tensor) -> Tensor:
    """(N, A, B, C) to (N, B, A, C); where one of them is 1, the values lie as they did."""
    _, a, b, columns = x.shape
    return x.reshape(-1, b, a, columns) if 1 in (a, b) else x.transpose(1, 2)


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

    Behind a stem, its last map takes the pixels' place, channels first whatever the stem reads. The prefix
    rows enter as rows of zeros below which the constant lies, so no token is expanded at run time.
    """

    def __init__(
        self,
        patch_embed: Linear,
        tokens: Tensor,
        config: ViTConfig,
        *,
        channels_last: bool,
        pre_norm: Norm | None = None,
        stem: DeployedStem | None = None,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.patch_embed = patch_embed  # weight (C P P, D), or (P P C, D) where channels come last
        self.tokens = Tokens(tokens)
        self.pre_norm = pre_norm
        self.config, self.channels_last = config, channels_last

    def forward(self, pixel_values: Tensor) -> Tensor:
        (rows, columns), patch, channels = (
            self.config.grid,
            self.config.patch_size,
            self.config.patch_channels,
        )
        if self.stem is not None:
            pixel_values = self.stem(pixel_values)  # (N, C, H / stride, W / stride)
        if self.channels_last:
            # Cast first (0 to 255 are exact in every dtype): TensorRT has no other operation on uint8.
            pixel_values = pixel_values.to(self.patch_embed.weight.dtype)
            x = pixel_values.reshape(-1, rows, patch, columns, patch, channels).transpose(2, 3)
        elif patch == 1:
            x = pixel_values.reshape(-1, channels, rows * columns).transpose(1, 2)
        else:
            x = pixel_values.reshape(-1, channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
        if patch > 1:
            x = x.reshape(-1, rows * columns, channels * patch * patch)  # (N, patches, C P P)
        x = self.patch_embed(x)  # (N, patches, D)
        if self.config.prefix_tokens:
            x = F.pad(x, (0, 0, self.config.prefix_tokens, 0))  # (N, T, D)
        x = self.tokens(x)
        return x if self.pre_norm is None else self.pre_norm(x)


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


class DeployedProbePool(nn.Module):
    """Pooling by a learned query: (N, T, D) to (N, D), without projecting keys or values.

    The query is a constant, so what every head looks for is one column of ``key`` (D, h); values are pooled
    first and projected afterwards.
    """

    def __init__(self, key: Linear, value: HeadLinear, proj: Linear, norm: Norm, mlp: DeployedMlp) -> None:
        super().__init__()
        self.key, self.value, self.proj, self.norm, self.mlp = key, value, proj, norm, mlp
        self.softmax, self.add = Softmax(), Add()

    def forward(self, x: Tensor) -> Tensor:
        heads, width, _ = self.value.weight.shape
        scores = self.key(x).transpose(1, 2)  # (N, h, T)
        pooled = self.softmax(scores).to(self.value.weight.dtype) @ x.to(self.value.weight.dtype)  # (N, h, D)
        x = self.proj(self.value(pooled.reshape(-1, heads, 1, width)).reshape(-1, width))  # (N, D)
        result: Tensor = self.add(x, self.mlp(self.norm(x)))
        return result


class DeployedReadout(nn.Module):
    """Final LayerNorm, pooling, projection and heads: one tensor for each output, in their order.

    An absorbed block hands over rows, the pooled tokens alone.
    """

    def __init__(
        self,
        config: ViTConfig,
        outputs: tuple[Output, ...],
        *,
        absorbed: bool,
        norm: Norm | None = None,
        probe_pool: DeployedProbePool | None = None,
        projection: Linear | None = None,
        representation: Linear | None = None,
        head: Linear | None = None,
        code_head: Linear | None = None,
    ) -> None:
        super().__init__()
        self.config, self.outputs, self.absorbed = config, outputs, absorbed
        self.norm, self.probe_pool, self.projection = norm, probe_pool, projection
        self.representation, self.head, self.code_head = representation, head, code_head
        pools = not POOLED.isdisjoint(outputs)
        self.pool = Pool(config) if pools and config.pool in ("mean", "cls_mean") else None
        embeds = "embedding" in outputs or ("logits" in outputs and config.head_on == "embedding")
        self.normalise = Normalise() if embeds else None
        self.pools = pools

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        tokens = self.normed(x, "tokens", "both")
        results: dict[Output, Tensor] = {}
        if "tokens" in self.outputs:
            results["tokens"] = self.normed(x, "read") if self.config.final_norm == "read" else tokens
        if self.code_head is not None:
            prefix = self.config.prefix_tokens
            results["codes"] = self.code_head(tokens[:, prefix:] if prefix else tokens)
        if self.pools:
            results |= self.read(self.normed(self.pooled(tokens), "pooled", "both", "read"))
        return tuple(results[output] for output in self.outputs)

    def normed(self, x: Tensor, *where: FinalNorm) -> Tensor:
        return self.norm(x) if self.norm is not None and self.config.final_norm in where else x

    def pooled(self, tokens: Tensor) -> Tensor:
        """(N, T, D), or rows (N Q, D), to (N, D); two tokens side by side where both have a head."""
        if self.probe_pool is not None:
            return self.probe_pool(tokens)
        if self.pool is not None:
            return self.pool(tokens)
        queries = 2 if self.config.pool == "both_heads" else 1
        rows = tokens if self.absorbed else first_tokens(tokens, queries)
        return rows if queries == 1 else rows.reshape(-1, queries * self.config.width)

    def read(self, pooled: Tensor) -> dict[Output, Tensor]:
        """What becomes of the pooled vector (N, features)."""
        features = pooled
        if self.config.pool == "both_heads" and self.outputs != ("logits",):
            features = pooled.reshape(-1, 2, self.config.width).mean(dim=1)
        results = {"features": features}
        if self.normalise is not None:
            projected = features if self.projection is None else self.projection(features)
            results["embedding"] = self.normalise(projected)
        if self.head is not None:
            if self.config.head_on == "embedding":
                pooled = results["embedding"]
            elif self.representation is not None:
                pooled = torch.tanh(self.representation(pooled))
            results["logits"] = self.head(pooled)
        return results
