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

from vitdeploy.config import POOLED, Activation, FinalNorm, Output, ViTConfig, layer_of
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


class Rotate(Site):
    """Rotary positions: pairs of columns (c, c + d / 2) turned by the angle of their token."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        super().__init__()
        half = sin.shape[1] // 2
        self.cos = nn.Parameter(cos, requires_grad=False)  # (T, d)
        self.sin = nn.Parameter(torch.cat([-sin[:, :half], sin[:, half:]], dim=1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.cos.dtype)
        a, b = x.split(x.shape[-1] // 2, dim=-1)
        return x * self.cos + torch.cat([b, a], dim=-1) * self.sin


class ScoreBias(Site):
    """What relative positions add to the scores: one constant, of any shape that broadcasts over images."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value.contiguous(), requires_grad=False)

    def forward(self, scores: Tensor) -> Tensor:
        return scores.to(self.value.dtype) + self.value


class DeployedAttention(nn.Module):
    """Self-attention with one GEMM for queries, keys and values; ``qkv`` has columns (3, h, d)."""

    def __init__(
        self,
        qkv: Linear,
        proj: Linear,
        heads: int,
        scale: float,
        rotate: Rotate | None = None,
        score_bias: ScoreBias | None = None,
    ) -> None:
        super().__init__()
        self.qkv, self.rotate, self.score_bias, self.proj = qkv, rotate, score_bias, proj
        self.softmax = Softmax()
        self.heads, self.scale = heads, scale

    def forward(self, x: Tensor) -> Tensor:
        tokens, width = x.shape[1], x.shape[2]
        x = self.qkv(x).reshape(-1, tokens, 3 * self.heads, width // self.heads)  # (N, T, 3h, d)
        x = x.transpose(1, 2)
        if self.rotate is None:
            q, k, v = x.split(self.heads, dim=1)  # (N, h, T, d) each
        else:
            both, v = x.split((2 * self.heads, self.heads), dim=1)
            q, k = self.rotate(both).split(self.heads, dim=1)
        scores = q @ k.transpose(2, 3)  # (N, h, T, T)
        if self.scale != 1:
            scores = scores * self.scale
        if self.score_bias is not None:
            scores = self.score_bias(scores)
        x = self.softmax(scores).to(v.dtype) @ v  # (N, h, T, d)
        return self.proj(x.transpose(1, 2).reshape(-1, tokens, width))  # (N, T, D)


class DeployedMlp(nn.Module):
    """Two GEMMs with an activation between them, gated where the model is."""

    def __init__(
        self, fc1: Linear, fc2: Linear, activation: Activation, gated: bool, norm: Norm | None = None
    ) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = fc1, norm, fc2
        self.activation, self.gated = activation, gated

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.gated:
            gate, x = x.split(x.shape[-1] // 2, dim=-1)
            x = ACTIVATIONS[self.activation](gate) * x
        else:
            x = ACTIVATIONS[self.activation](x)
        return self.fc2(x if self.norm is None else self.norm(x))


class DeployedBlock(nn.Module):
    """Pre-norm block; layer scale is already part of ``attn.proj`` and ``mlp.fc2``."""

    def __init__(self, norm1: Norm, attn: nn.Module, norm2: Norm, mlp: DeployedMlp) -> None:
        super().__init__()
        self.norm1, self.attn, self.add1 = norm1, attn, Add()
        self.norm2, self.mlp, self.add2 = norm2, mlp, Add()

    def forward(self, x: Tensor) -> Tensor:
        x = self.add1(x, self.attn(self.norm1(x)))
        return self.add2(x, self.mlp(self.norm2(x)))


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

    The prefix rows enter as rows of zeros below which the constant lies, so no token is expanded at run time.
    """

    def __init__(
        self,
        patch_embed: Linear,
        tokens: Tensor,
        config: ViTConfig,
        *,
        channels_last: bool,
        pre_norm: Norm | None = None,
    ) -> None:
        super().__init__()
        self.patch_embed = patch_embed  # weight (C P P, D), or (P P C, D) where channels come last
        self.tokens = Tokens(tokens)
        self.pre_norm = pre_norm
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


class Normalise(Site):
    """Vectors to length 1."""

    always_fp32 = True

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype or x.dtype)
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


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


class DeployedModel(nn.Module):
    """A model in its deployed form: pixels in, float32 out whatever runs inside.

    One output is a tensor, several are a tuple of them in the order of ``outputs``. The batch is every
    tensor's first axis, and no part computes with its size (see ``exporter.graph.trace``).

    Args:
        readout: returns a tuple, of a tensor for each of its own ``outputs``; layers are taken before it.
    """

    def __init__(
        self,
        embedding: nn.Module,
        blocks: Iterable[nn.Module],
        readout: nn.Module,
        outputs: tuple[Output, ...],
    ) -> None:
        super().__init__()
        self.embedding, self.blocks, self.readout = embedding, nn.ModuleList(blocks), readout
        self.outputs = outputs
        self.output_dtype = torch.float32

    def forward(self, pixel_values: Tensor) -> Tensor | tuple[Tensor, ...]:
        layers = {layer_of(output): output for output in self.outputs}
        results: dict[Output, Tensor] = {}
        x = self.embedding(pixel_values)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in layers:
                results[layers[i]] = x
        rest = [output for output in self.outputs if output not in results]
        if rest:
            results |= dict(zip(rest, self.readout(x), strict=True))
        tensors = tuple(results[output].to(self.output_dtype) for output in self.outputs)
        return tensors[0] if len(tensors) == 1 else tensors
