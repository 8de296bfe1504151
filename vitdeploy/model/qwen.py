"""The reference of Qwen's vision towers: plain, exact, made to be read.

It follows Qwen2-VL (https://arxiv.org/abs/2409.12191), with the switches that Qwen2.5-VL
(https://arxiv.org/abs/2502.13923: RMSNorm, a gated MLP, windows) and Qwen3-VL
(https://arxiv.org/abs/2511.21631: learned positions, deepstack) need. Patches stand in the order of Qwen's
image processor throughout (see ``QwenVisionConfig``); windows are a mask.

Shapes in comments: N images, C channels, H x W pixels, P patch, t frames of a patch, m patches of a block, T
patches, D width, h heads, d columns of a head, E columns of a feature.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitdeploy.config import Output, QwenVisionConfig
from vitdeploy.model.parts import Mlp
from vitdeploy.model.positions import rotate
from vitdeploy.model.qwen_grid import interpolated, patch_order, rotation, windows
from vitdeploy.model.reference import Reference


def patches_of(pixel_values: Tensor, config: QwenVisionConfig) -> Tensor:
    """Pixels (N, C, H, W) as the patches of Qwen's image processor, (N, T, C t P P)."""
    (rows, columns), patch = config.grid, config.patch_size
    x = pixel_values.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))  # (N, C, rows, P, columns, P)
    x = x.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (N, T, C, P, P), row by row
    x = x[:, patch_order(config).to(x.device), :, None]
    return x.expand(-1, -1, -1, config.temporal_patch, -1, -1).flatten(2)


class Embedding(nn.Module):
    """Pixels (N, C, H, W), or their patches (N, T, C t P P), to tokens (N, T, D)."""

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Linear(config.patch_columns, config.width, bias=config.patch_bias)
        table = torch.zeros(config.positions**2, config.width)
        self.pos_embed = nn.Parameter(table) if config.positions else None

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = pixel_values if pixel_values.dim() == 3 else patches_of(pixel_values, self.config)
        x: Tensor = self.patch_embed(patches)
        return x if self.pos_embed is None else x + interpolated(self.pos_embed, self.config)


class Attention(nn.Module):
    """Multi-head self-attention of rotated queries and keys, within windows where the block has them."""

    def __init__(self, config: QwenVisionConfig, windowed: bool) -> None:
        super().__init__()
        self.config, self.windowed = config, windowed
        self.heads, self.scale, self.rotated = config.heads, config.head_width**-0.5, True
        self.q, self.k, self.v, self.proj = (nn.Linear(config.width, config.width) for _ in range(4))
        self.softmax = nn.Softmax(dim=-1)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (N, T, D) -> (N, h, T, d)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, T, D) to three of (N, h, T, d)."""
        q, k, v = (self.split_heads(linear(x)) for linear in (self.q, self.k, self.v))
        turns = self.turns()
        return rotate(q, *turns), rotate(k, *turns), v

    def turns(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines by which queries and keys are rotated, (T, d) each."""
        cos, sin = rotation(self.config)
        return cos.to(self.q.weight), sin.to(self.q.weight)

    def mask(self) -> Tensor | None:
        """Which patches see each other, (T, T) bool; None where all do."""
        if not self.windowed:
            return None
        window = windows(self.config).to(self.q.weight.device)
        return window[:, None] == window[None, :]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.queries_keys_values(x)
        scores = q @ k.transpose(2, 3) * self.scale  # (N, h, T, T)
        if (mask := self.mask()) is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        x = self.softmax(scores) @ v  # (N, h, T, d)
        return self.proj(x.transpose(1, 2).flatten(2))  # (N, T, D)


class FusedAttention(Attention):
    """The same function by PyTorch's fused kernels; what positions settle is computed once."""

    cos: Tensor
    sin: Tensor
    seen: Tensor | None

    @torch.no_grad()
    def fix_positions(self) -> None:
        """Hold rotation and mask; to be called once the weights are there."""
        cos, sin = super().turns()
        for name, table in (("cos", cos), ("sin", sin), ("seen", super().mask())):
            self.register_buffer(name, table, persistent=False)

    def turns(self) -> tuple[Tensor, Tensor]:
        return self.cos, self.sin

    def mask(self) -> Tensor | None:
        return self.seen

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.queries_keys_values(x)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(), scale=self.scale)  # (N, h, T, d)
        return self.proj(x.transpose(1, 2).flatten(2))  # (N, T, D)


def norm_of(config: QwenVisionConfig, width: int) -> nn.LayerNorm | nn.RMSNorm:
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(width, eps=config.norm_eps)


class Block(nn.Module):
    """Pre-norm transformer block."""

    scale1 = scale2 = None
    """No layer scale."""

    def __init__(self, config: QwenVisionConfig, windowed: bool, attention: type[Attention]) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm_of(config, config.width), norm_of(config, config.width)
        self.attn = attention(config, windowed)
        self.mlp = Mlp(config.width, config.mlp_width, config.activation, gated=config.gated_mlp)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """The patches of a block side by side, through an MLP: (N, T, D) to (N, T / m, E).

    Args:
        late: the norm is of a block's patches together, and not of each.
    """

    def __init__(self, config: QwenVisionConfig, *, late: bool) -> None:
        super().__init__()
        self.columns, self.late = config.width * config.merged, late
        self.norm = norm_of(config, self.columns if late else config.width)
        self.fc1, self.fc2 = nn.Linear(self.columns, self.columns), nn.Linear(self.columns, config.out_width)

    def forward(self, x: Tensor) -> Tensor:
        side_by_side = (x.shape[0], -1, self.columns)
        x = self.norm(x.reshape(side_by_side)) if self.late else self.norm(x).reshape(side_by_side)
        return self.fc2(F.gelu(self.fc1(x)))


class Readout(nn.Module):
    """Features of the last tokens, and of those behind the blocks in ``config.taps``."""

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.merger = Merger(config, late=False)
        self.deepstack = nn.ModuleList(Merger(config, late=True) for _ in config.taps)

    def forward(self, x: Tensor, output: Output, *taps: Tensor) -> Tensor:
        if output == "image_features":
            return self.merger(x)  # (N, T / m, E)
        features = [merger(tap) for merger, tap in zip(self.deepstack, taps, strict=True)]
        return torch.stack(features, dim=1)  # (N, taps, T / m, E)


class QwenVision(Reference):
    """The reference model; ``config.output_shapes`` says what it can return."""

    config: QwenVisionConfig
    readout: Readout

    def __init__(self, config: QwenVisionConfig, attention: type[Attention] = Attention) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.blocks = nn.ModuleList(Block(config, config.windowed(i), attention) for i in range(config.depth))
        self.readout = Readout(config)

    def fix_positions(self) -> None:
        for part in self.modules():
            if isinstance(part, FusedAttention):
                part.fix_positions()

    def stages(self) -> list[tuple[str, nn.Module]]:
        return [("embedding", self.embedding), *((f"blocks.{i}", b) for i, b in enumerate(self.blocks))]

    def taps(self) -> tuple[str, ...]:
        return tuple(f"blocks.{i}" for i in self.config.taps)
