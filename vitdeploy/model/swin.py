"""The reference Swin Transformer of both versions: plain, exact, made to be read.

Everything a deployed artifact computes is measured against this module in float64. It follows Liu et al. 2021
(https://arxiv.org/abs/2103.14030) and, for version 2, Liu et al. 2022 (https://arxiv.org/abs/2111.09883).
Tokens stand row by row, as the map is read; windows are cut out of the map where attention needs them.

Shapes in comments: N images, C channels, H x W pixels, h x w tokens of a map, T of them together, D columns,
n windows, A tokens of a window, k heads, d columns of a head.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitdeploy.config import Output, Size, SwinConfig
from vitdeploy.model.parts import Mlp
from vitdeploy.model.reference import Reference

STEM_EPS = 1e-5
"""Of the norms of patches and of merging, whatever the blocks have."""
COSINE_EPS = 1e-12
"""The least length that a query or a key is divided by."""
_MOST_SCALE = math.log(100.0)
POSITION_WIDTH = 512
"""Columns inside the MLP of offsets."""


def windows_of(x: Tensor, window: Size) -> Tensor:
    """A map's windows, row by row: (N, h, w, D) to (N, n, A, D); both sides are whole windows."""
    rows, columns = window
    x = x.unflatten(1, (-1, rows)).unflatten(3, (-1, columns))  # (N, h/rows, rows, w/columns, columns, D)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def map_of(x: Tensor, size: Size, window: Size) -> Tensor:
    """The map of those windows again: (N, n, A, D) to (N, h, w, D)."""
    (height, width), (rows, columns) = size, window
    x = x.unflatten(2, window).unflatten(1, (height // rows, width // columns))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def offsets_of(window: Size) -> Tensor:
    """For two tokens of a window, the row of a table of offsets that is theirs: (A, A)."""
    rows, columns = window
    row, column = (
        a.flatten() for a in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    )
    down, right = row[:, None] - row, column[:, None] - column
    return (down + rows - 1) * (2 * columns - 1) + right + columns - 1


def log_offsets(window: Size, measure: Size) -> Tensor:
    """Every offset in a window on a logarithmic scale: ((2 rows - 1) (2 columns - 1), 2).

    Args:
        measure: the window whose largest offsets are 8 on the linear scale.

    In float32 in this order, as transformers and timm compute it.
    """
    axes = [
        torch.arange(1 - side, side).float() / max(own - 1, 1)
        for side, own in zip(window, measure, strict=True)
    ]
    offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1) * 8
    return torch.sign(offsets) * torch.log2(torch.abs(offsets) + 1.0) / math.log2(8)


def mask_of(size: Size, window: Size, shift: Size, value: float) -> Tensor:
    """What hides tokens of a shifted map from each other that are no neighbours: (n, A, A), 0 or value."""
    numbers = []
    for side, length, by in zip(size, window, shift, strict=True):
        place = torch.arange(side)
        wrapped = (place >= side - by).long() if by else torch.zeros_like(place)
        numbers.append((place >= side - length).long() * bool(by) + wrapped)  # 0, 1, 2 from the top
    region = (numbers[0][:, None] * 3 + numbers[1])[None, :, :, None]  # (1, h, w, 1)
    inside = windows_of(region, window)[0, :, :, 0]  # (n, A)
    return torch.where(inside[:, None] == inside[:, :, None], 0.0, value).double()


class Embedding(nn.Module):
    """Pixels to tokens: patch projection, norm, positions."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        patch, width = config.patch_size, config.width
        self.config = config
        self.patch_embed = nn.Conv2d(config.channels, width, kernel_size=patch, stride=patch)
        self.patch_norm = nn.LayerNorm(width, eps=STEM_EPS)
        self.pos_embed = nn.Parameter(torch.zeros(config.patches, width)) if config.position else None

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embed(pixel_values)  # (N, C, H, W) -> (N, D, h, w)
        x = self.patch_norm(x.flatten(2).transpose(1, 2))  # (N, T, D)
        return x if self.pos_embed is None else x + self.pos_embed


class TableBias(nn.Module):
    """Version 1: a learned bias for every offset in a window."""

    def __init__(self, config: SwinConfig, stage: int) -> None:
        super().__init__()
        self.window = config.window(stage)
        rows, columns = self.window
        self.table = nn.Parameter(torch.zeros((2 * rows - 1) * (2 * columns - 1), config.heads[stage]))

    def forward(self) -> Tensor:
        return self.table[offsets_of(self.window)].permute(2, 0, 1)  # (k, A, A)


class LogBias(nn.Module):
    """Version 2: the bias of an offset is a function of it, that of an MLP."""

    def __init__(self, config: SwinConfig, stage: int) -> None:
        super().__init__()
        self.window = config.window(stage)
        stated = config.pretrained_windows[stage] if config.pretrained_windows else (0, 0)
        self.measure = stated if min(stated) > 0 else self.window
        self.fc1 = nn.Linear(2, POSITION_WIDTH)
        self.fc2 = nn.Linear(POSITION_WIDTH, config.heads[stage], bias=False)

    def forward(self) -> Tensor:
        offsets = log_offsets(self.window, self.measure).to(self.fc1.weight)
        table = 16 * torch.sigmoid(self.fc2(F.relu(self.fc1(offsets))))  # (offsets, k)
        return table[offsets_of(self.window)].permute(2, 0, 1)  # (k, A, A)


class Attention(nn.Module):
    """Self-attention inside windows, shifted in every second block: (N, T, D) to (N, T, D)."""

    rotated = False

    def __init__(self, config: SwinConfig, stage: int, block: int) -> None:
        super().__init__()
        self.config, self.stage = config, stage
        self.window, self.shift = config.window(stage), config.shift(stage, block)
        width, self.heads = config.widths[stage], config.heads[stage]
        self.head_width = width // self.heads
        self.scale = self.head_width**-0.5
        self.q = nn.Linear(width, width, bias=config.qkv_bias)
        self.k = nn.Linear(width, width, bias=config.qkv_bias and config.version == 1)
        self.v = nn.Linear(width, width, bias=config.qkv_bias)
        self.softmax = nn.Softmax(dim=-1)
        self.proj = nn.Linear(width, width)
        self.log_scale = nn.Parameter(torch.zeros(self.heads)) if config.version == 2 else None
        self.score_bias = (LogBias if config.version == 2 else TableBias)(config, stage)

    def bias(self) -> Tensor:
        """What is added to the scores: (k, A, A), or (n, k, A, A) where windows are shifted."""
        bias: Tensor = self.score_bias()
        if self.shift == (0, 0):
            return bias
        mask = mask_of(self.config.padded(self.stage), self.window, self.shift, self.config.mask)
        return bias + mask.to(bias)[:, None]

    def scales(self) -> Tensor | None:
        """Of version 2: what the cosines of each head are multiplied by, (k, 1, 1)."""
        return None if self.log_scale is None else self.log_scale.clamp(max=_MOST_SCALE).exp()[:, None, None]

    def cut(self, x: Tensor) -> Tensor:
        """The (shifted) windows of the map, (N, T, D) to (N, n, A, D), padded with zeros to whole ones."""
        height, width = self.config.maps[self.stage]
        padded_height, padded_width = self.config.padded(self.stage)
        padding = (0, 0, 0, padded_width - width, 0, padded_height - height)
        up, left = -self.shift[0], -self.shift[1]
        x = x.unflatten(1, (height, width))  # (N, h, w, D)
        if self.config.pad_first:
            x = F.pad(x, padding).roll((up, left), (1, 2))
        else:
            x = F.pad(x.roll((up, left), (1, 2)), padding)
        return windows_of(x, self.window)

    def join(self, x: Tensor) -> Tensor:
        """The map again: (N, n, A, D) to (N, T, D)."""
        height, width = self.config.maps[self.stage]
        x = map_of(x, self.config.padded(self.stage), self.window)  # (N, h, w, D), padded
        if self.config.pad_first:
            x = x.roll(self.shift, (1, 2))[:, :height, :width]
        else:
            x = x[:, :height, :width].roll(self.shift, (1, 2))
        return x.flatten(1, 2)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(3, (self.heads, -1)).transpose(2, 3)  # (N, n, A, D) -> (N, n, k, A, d)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Three of (N, n, k, A, d) to one."""
        scales = self.scales()
        if scales is None:
            scores = q @ k.transpose(3, 4) * self.scale  # (N, n, k, A, A)
        else:
            q, k = (F.normalize(x, dim=-1, eps=COSINE_EPS) for x in (q, k))
            scores = q @ k.transpose(3, 4) * scales
        return self.softmax(scores + self.bias()) @ v

    def forward(self, x: Tensor) -> Tensor:
        x = self.cut(x)  # (N, n, A, D)
        q, k, v = (self.split_heads(linear(x)) for linear in (self.q, self.k, self.v))
        x = self.attend(q, k, v).transpose(2, 3).flatten(3)  # (N, n, A, D)
        return self.join(self.proj(x))


class FusedAttention(Attention):
    """The same function by PyTorch's fused kernels; the bias is computed once, by :meth:`fix_positions`."""

    scores: Tensor

    @torch.no_grad()
    def fix_positions(self) -> None:
        self.register_buffer("scores", super().bias(), persistent=False)

    def bias(self) -> Tensor:
        return self.scores

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scales, scale = self.scales(), self.scale
        if scales is not None:
            q, k = (F.normalize(x, dim=-1, eps=COSINE_EPS) for x in (q, k))
            q, scale = q * scales, 1.0
        # The kernels know images and heads: windows are images, or heads where they have a mask each.
        bias, windows = self.bias(), q.shape[1]
        masked = bias.dim() == 4
        q, k, v = (x.flatten(1, 2) if masked else x.flatten(0, 1) for x in (q, k, v))
        bias = bias.flatten(0, 1) if masked else bias
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        return x.unflatten(1, (windows, -1)) if masked else x.unflatten(0, (-1, windows))


class Block(nn.Module):
    """A transformer block; version 2 normalises what a branch returns (res-post-norm)."""

    scale1 = scale2 = None

    def __init__(self, config: SwinConfig, stage: int, block: int, attention: type[Attention]) -> None:
        super().__init__()
        width = config.widths[stage]
        self.post_norm = config.version == 2
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.attn = attention(config, stage, block)
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = Mlp(width, config.mlp_widths[stage], config.activation)

    def forward(self, x: Tensor) -> Tensor:
        if self.post_norm:
            x = x + self.norm1(self.attn(x))
            return x + self.norm2(self.mlp(x))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Merge(nn.Module):
    """Four neighbours become one token of twice the columns: (N, T, D) to (N, T/4, 2D)."""

    def __init__(self, config: SwinConfig, stage: int) -> None:
        super().__init__()
        width = config.widths[stage]
        self.map = config.maps[stage]
        self.post_norm = config.version == 2
        self.norm = nn.LayerNorm(2 * width if self.post_norm else 4 * width, eps=STEM_EPS)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def gather(self, x: Tensor) -> Tensor:
        """The four side by side: (N, T, D) to (N, T/4, 4D); an odd side is padded with zeros."""
        height, width = self.map
        x = F.pad(x.unflatten(1, self.map), (0, 0, 0, width % 2, 0, height % 2))  # (N, h, w, D), both even
        four = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]  # left pair first
        return torch.cat(four, dim=-1).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gather(x)
        return self.norm(self.reduction(x)) if self.post_norm else self.reduction(self.norm(x))


class Stage(nn.Module):
    """Blocks on one map, and the merging behind them where a stage follows."""

    def __init__(self, config: SwinConfig, stage: int, attention: type[Attention]) -> None:
        super().__init__()
        depth, last = config.depths[stage], stage + 1 == len(config.depths)
        self.blocks = nn.ModuleList(Block(config, stage, block, attention) for block in range(depth))
        self.merge = None if last else Merge(config, stage)


class Readout(nn.Module):
    """Final LayerNorm, the mean of all tokens, and the head."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.features, eps=config.norm_eps)
        self.head = nn.Linear(config.features, config.classes) if config.classes else None

    def forward(self, x: Tensor, output: Output) -> Tensor:
        tokens: Tensor = self.norm(x)
        if output == "tokens":
            return tokens
        features = tokens.mean(dim=1)  # (N, D)
        if output == "features":
            return features
        if output == "embedding":
            return features / torch.linalg.vector_norm(features, dim=-1, keepdim=True)
        if self.head is None:
            raise ValueError("this model has no head: ask for features or tokens")
        return self.head(features)  # (N, classes)


class Swin(Reference):
    """The reference model; ``config.output_shape`` says what it can return, in which shape."""

    config: SwinConfig
    readout: Readout

    def __init__(self, config: SwinConfig, attention: type[Attention] = Attention) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.layers = nn.ModuleList(Stage(config, stage, attention) for stage in range(len(config.depths)))
        self.readout = Readout(config)

    def fix_positions(self) -> None:
        for part in self.modules():
            if isinstance(part, FusedAttention):
                part.fix_positions()

    def stages(self) -> list[tuple[str, nn.Module]]:
        """Blocks are numbered through all stages, as the outputs behind them are."""
        parts: list[tuple[str, nn.Module]] = [("embedding", self.embedding)]
        count = 0
        for number, stage in enumerate(cast("list[Stage]", self.layers)):
            for block in stage.blocks:
                parts.append((f"blocks.{count}", block))
                count += 1
            if stage.merge is not None:
                parts.append((f"layers.{number}.merge", stage.merge))
        return parts
