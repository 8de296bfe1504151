"""The deployed form of what only a Swin has: its orders of tokens, attention in windows, merging.

:mod:`vitdeploy.model.swin_rewrites` makes it from :mod:`vitdeploy.model.swin`. Tokens stay in the order in
which windows want them, window by window; a change of order is one Gather by a constant. What goes from part
to part is rows, (N T, D), so that every linear layer is one Gemm.

Shapes in comments: N images, C channels, P patch, T tokens of a map, D columns, n windows, A tokens of
a window, k heads, d columns of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitdeploy.config import POOLED, Output, Size, SwinConfig
from vitdeploy.model.deployed import (
    Add,
    DeployedMlp,
    DeployedModel,
    Linear,
    Norm,
    Normalise,
    Reorder,
    ScoreBias,
    Site,
    Softmax,
)
from vitdeploy.model.swin import COSINE_EPS
from vitdeploy.model.vit_deployed import Tokens


class TokenOrder(Reorder):
    """Tokens in another order, (N T, D) to (N, R, D); number T stands for a token of zeros."""

    def __init__(self, order: Tensor, tokens: int) -> None:
        super().__init__(order)  # (R)
        self.tokens, self.pads = tokens, int(order.max()) == tokens

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, self.tokens, x.shape[1])
        return super().forward(F.pad(x, (0, 0, 0, 1)) if self.pads else x)


def reordered(x: Tensor, reorder: TokenOrder | None) -> Tensor:
    """Rows in another order, as rows."""
    return x if reorder is None else reorder(x).reshape(-1, x.shape[1])


class Cosine(Site):
    """Queries and keys of length 1, queries times the scale of their head: (..., 2k, A, d) to the same."""

    always_fp32 = True

    def __init__(self, scales: Tensor) -> None:
        super().__init__()
        self.lengths = nn.Parameter(torch.cat([scales, torch.ones_like(scales)]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.lengths.dtype)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * (self.lengths / length.clamp(min=COSINE_EPS))  # lengths: (2k, 1, 1)


class WindowAttention(nn.Module):
    """Self-attention inside windows: rows (N T, D) to the same; how they become heads is the subclass's.

    Args:
        score_bias: (k, A, A), or (n, k, A, A) with the mask of shifted windows in it.
        cut: brings tokens that stand row by row into windows, where those need padding.
        join: the way back.
    """

    def __init__(
        self, proj: Linear, heads: int, score_bias: ScoreBias, cut: TokenOrder | None, join: TokenOrder | None
    ) -> None:
        super().__init__()
        self.heads, self.cut, self.score_bias = heads, cut, score_bias
        self.softmax = Softmax()
        self.join, self.proj = join, proj

    def split_heads(self, x: Tensor, windows: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Rows to queries (N, n, k, A, d), keys (N, n, k, d, A) and values; ``windows`` is (-1, n, A)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[1]
        # Windows that have no mask are images of their own: no n, and N n for N.
        masks, area = self.score_bias.value.shape[:-3], self.score_bias.value.shape[-1]
        q, k, v = self.split_heads(reordered(x, self.cut), (-1, *masks, area))
        scores = self.score_bias(q @ k)  # (N, n, k, A, A)
        x = self.softmax(scores).to(v.dtype) @ v
        x = x.transpose(-3, -2).reshape(-1, width)  # (N T, D)
        projected: Tensor = self.proj(reordered(x, self.join))
        return projected


class MergedWindowAttention(WindowAttention):
    """With one GEMM for queries, keys and values; ``qkv`` has columns (3, k, d)."""

    def __init__(
        self,
        qkv: Linear,
        proj: Linear,
        heads: int,
        score_bias: ScoreBias,
        cut: TokenOrder | None,
        join: TokenOrder | None,
        cosine: Cosine | None,
    ) -> None:
        super().__init__(proj, heads, score_bias, cut, join)
        self.qkv, self.cosine = qkv, cosine

    def split_heads(self, x: Tensor, windows: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        heads, width = self.heads, x.shape[1]
        x = self.qkv(x).reshape(*windows, 3 * heads, width // heads).transpose(-3, -2)
        if self.cosine is None:
            q, k, v = x.split(heads, dim=-3)
        else:
            both, v = x.split((2 * heads, heads), dim=-3)
            q, k = self.cosine(both).to(v.dtype).split(heads, dim=-3)
        return q, k.transpose(-2, -1), v


class NarrowWindowAttention(WindowAttention):
    """With a GEMM each: of many narrow rows, to take merged columns apart costs more than merging saves."""

    def __init__(
        self,
        q: Linear,
        k: Linear,
        v: Linear,
        proj: Linear,
        heads: int,
        score_bias: ScoreBias,
        cut: TokenOrder | None,
        join: TokenOrder | None,
    ) -> None:
        super().__init__(proj, heads, score_bias, cut, join)
        self.q, self.k, self.v = q, k, v

    def split_heads(self, x: Tensor, windows: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        shape = (*windows, self.heads, x.shape[1] // self.heads)
        q, k, v = (linear(x).reshape(shape) for linear in (self.q, self.k, self.v))  # (N, n, A, k, d)
        images = tuple(range(len(windows) - 1))
        token, head, column = (len(images) + place for place in range(3))
        as_keys = (*images, head, column, token)
        return q.transpose(-3, -2), k.permute(as_keys), v.transpose(-3, -2)


class DeployedMerge(nn.Module):
    """Four neighbours become one token: rows (N T, D) to (N T/4, 2D), in the order of the next stage."""

    def __init__(self, four: TokenOrder, norm: Norm, reduction: Linear, *, post_norm: bool) -> None:
        super().__init__()
        self.four, self.norm, self.reduction = four, norm, reduction
        self.post_norm = post_norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.four(x).reshape(-1, 4 * x.shape[1])  # (N T/4, 4D)
        if self.post_norm:
            return self.norm(self.reduction(x))
        return self.reduction(self.norm(x))


class DeployedSwinBlock(nn.Module):
    """A block; before it, tokens are merged, or brought into the order of its windows where they are not."""

    def __init__(
        self,
        merge: DeployedMerge | None,
        reorder: TokenOrder | None,
        norm1: Norm,
        attn: WindowAttention,
        norm2: Norm,
        mlp: DeployedMlp,
        *,
        post_norm: bool,
    ) -> None:
        super().__init__()
        self.merge, self.reorder, self.post_norm = merge, reorder, post_norm
        self.norm1, self.attn, self.add1 = norm1, attn, Add()
        self.norm2, self.mlp, self.add2 = norm2, mlp, Add()

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.merge is None else self.merge(x)
        x = reordered(x, self.reorder)
        if self.post_norm:
            x = self.add1(x, self.norm1(self.attn(x)))
            return self.add2(x, self.norm2(self.mlp(x)))
        x = self.add1(x, self.attn(self.norm1(x)))
        return self.add2(x, self.mlp(self.norm2(x)))


class DeployedPatches(nn.Module):
    """Pixels to rows (N T, D) by one GEMM, window by window: pixels are permuted for it anyhow."""

    def __init__(
        self,
        config: SwinConfig,
        window: Size,
        patch_embed: Linear,
        patch_norm: Norm,
        positions: Tokens | None,
        *,
        channels_last: bool,
    ) -> None:
        super().__init__()
        self.config, self.window, self.channels_last = config, window, channels_last
        self.patch_embed = patch_embed  # weight (C P P, D), or (P P C, D) where channels come last
        self.patch_norm, self.positions = patch_norm, positions

    def forward(self, pixel_values: Tensor) -> Tensor:
        patch, channels = self.config.patch_size, self.config.channels
        (height, width), (rows, columns) = self.config.grid, self.window
        sides = (height // rows, rows, patch, width // columns, columns, patch)
        if self.channels_last:
            # Cast first (0 to 255 are exact in every dtype): TensorRT has no other operation on uint8.
            pixel_values = pixel_values.to(self.patch_embed.weight.dtype)
            x = pixel_values.reshape(-1, *sides, channels).permute(0, 1, 4, 2, 5, 3, 6, 7)
        else:
            x = pixel_values.reshape(-1, channels, *sides).permute(0, 2, 5, 3, 6, 1, 4, 7)
        x = x.reshape(-1, channels * patch * patch)  # (N T, C P P)
        x = self.patch_norm(self.patch_embed(x))  # (N T, D)
        if self.positions is None:
            return x
        return self.positions(x.reshape(-1, height * width, x.shape[1])).reshape(-1, x.shape[1])


class Mean(Site):
    """The mean of all tokens, (N, T, D) to (N, D)."""

    always_fp32 = True

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype or x.dtype).mean(dim=1)


class DeployedSwinReadout(nn.Module):
    """Final LayerNorm, pooling and head: one tensor for each output, in their order."""

    def __init__(
        self,
        outputs: tuple[Output, ...],
        tokens: int,
        norm: Norm | None,
        rows: TokenOrder | None,
        head: Linear | None,
    ) -> None:
        super().__init__()
        self.outputs, self.tokens = outputs, tokens
        self.norm, self.rows, self.head = norm, rows, head
        self.pool = None if POOLED.isdisjoint(outputs) else Mean()
        self.normalise = Normalise() if "embedding" in outputs else None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x if self.norm is None else self.norm(x)
        maps = x.reshape(-1, self.tokens, x.shape[1])  # (N, T, D)
        results: dict[Output, Tensor] = {}
        if "tokens" in self.outputs:
            results["tokens"] = maps if self.rows is None else self.rows(x)
        if self.pool is not None:
            features = self.pool(maps)
            results["features"] = features
            if self.normalise is not None:
                results["embedding"] = self.normalise(features)
            if self.head is not None:
                results["logits"] = self.head(features)
        return tuple(results[output] for output in self.outputs)


class DeployedSwin(DeployedModel):
    """A Swin in its deployed form; the outputs behind blocks are brought back into the order of the map."""

    def __init__(
        self,
        embedding: nn.Module,
        blocks: list[DeployedSwinBlock],
        readout: nn.Module,
        outputs: tuple[Output, ...],
        rows: dict[int, TokenOrder],
    ) -> None:
        super().__init__(embedding, blocks, readout, outputs)
        self.rows = nn.ModuleDict({str(block): reorder for block, reorder in rows.items()})

    def layer(self, block: int, x: Tensor) -> Tensor:
        return self.rows[str(block)](x)
