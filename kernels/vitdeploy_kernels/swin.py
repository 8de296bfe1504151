"""What the runner runs of a Swin Transformer: its shape, and its weights folded for the fused kernels.

A stage is a ViT over windows: a window is an image whose tokens are its patches, and the batch is that of
images times windows. Tokens stay in the order in which windows want them; where that changes, and where four
neighbours become one, the weights have the order to go on with. LayerNorm's gain and shift are in the linear
layer behind it, as in :mod:`vitdeploy_kernels.vit`; rows are not centred, for merging reads four of them with
one mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vitdeploy_kernels.layernorm_linear import Folded, fold_layernorm
from vitdeploy_kernels.vit import Block, Embedding, Linear, VitShape


@dataclass(frozen=True)
class SwinShape:
    """The numbers of a Swin Transformer of the first version (Liu et al. 2021, https://arxiv.org/abs/2103.14030).

    Tuples have an entry for each stage; windows divide the maps.

    Attributes:
        image_size: height, width.
        windows: rows, columns.
        shifted: whether every second block's windows are shifted.
        eps: of the blocks' LayerNorms; of those of patches and of merging it is 1e-5.
    """

    image_size: tuple[int, int] = (224, 224)
    patch: int = 4
    channels: int = 3
    width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    windows: tuple[tuple[int, int], ...] = ((7, 7),) * 4
    shifted: tuple[bool, ...] = (True, True, True, False)
    mlp_widths: tuple[int, ...] = (384, 768, 1536, 3072)
    activation: str = "gelu"
    eps: float = 1e-5
    uint8: bool = False

    classes = 0
    """The readout is the caller's."""

    def tokens(self, stage: int) -> int:
        """Of an image."""
        height, width = (side // self.patch >> stage for side in self.image_size)
        return height * width

    @property
    def streams(self) -> tuple[tuple[int, int], ...]:
        """Tokens of an image and their columns, of every stage's residual stream."""
        stages = range(len(self.depths))
        return tuple((self.tokens(stage), self.width * 2**stage) for stage in stages)

    def count(self, stage: int) -> int:
        """Windows of an image."""
        rows, columns = self.windows[stage]
        return self.tokens(stage) // (rows * columns)

    def stage(self, stage: int) -> VitShape:
        """A stage's blocks, a window being the image."""
        return VitShape(
            image_size=self.windows[stage],
            patch=1,
            prefix=0,
            width=self.width * 2**stage,
            depth=self.depths[stage],
            heads=self.heads[stage],
            mlp_width=self.mlp_widths[stage],
            activation=self.activation,
            score_bias=True,
            eps=self.eps,
            queries=None,
            classes=0,
        )

    def image_shape(self, batch: int) -> tuple[int, int, int, int]:
        height, width = self.image_size
        if self.uint8:
            return batch, height, width, self.channels
        return batch, self.channels, height, width


@dataclass(frozen=True)
class SwinBlock:
    """A block, whose score bias is (1, h, A, columns), or (windows, h, A, columns) with the mask in it.

    Attributes:
        order: (T), which of the tokens that come stands at each place; None where they stay where they are.
    """

    block: Block
    order: Tensor | None = None


@dataclass(frozen=True)
class Merge:
    """Between two stages: which four tokens become one, (T / 4, 4), and (4 D, 2 D) behind a LayerNorm."""

    four: Tensor
    reduction: Folded


@dataclass(frozen=True)
class SwinWeights:
    """All weights but the readout's, on one device.

    Attributes:
        gain: of the LayerNorm over patches, (D) float32.
        shift: the same.
        positions: (T, D) float32, in the order of windows; None where there are none.
        order: (T), the patch at each place of the windows.
        merges: one less than there are stages.
    """

    embedding: Embedding
    gain: Tensor
    shift: Tensor
    positions: Tensor | None
    order: Tensor
    stages: tuple[tuple[SwinBlock, ...], ...]
    merges: tuple[Merge, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype


def random_swin_weights(
    shape: SwinShape, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> SwinWeights:
    """Seeded random weights and orders; on the meta device, their shapes only."""
    meta = str(device) == "meta"
    generator = None if meta else torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator, device=device) * scale

    def permutation(count: int) -> Tensor:
        return torch.empty(count, dtype=torch.long, device=device) if meta else _shuffled(count, generator)

    return build_swin_weights(shape, dtype, normal, permutation)


def _shuffled(count: int, generator: torch.Generator | None) -> Tensor:
    assert generator is not None
    return torch.randperm(count, generator=generator, device=generator.device)


def build_swin_weights(
    shape: SwinShape,
    dtype: torch.dtype,
    normal: Callable[..., Tensor],
    permutation: Callable[[int], Tensor],
) -> SwinWeights:
    """Weights whose values ``normal(*size, scale=...)`` draws, orders that ``permutation(count)`` does."""

    def folded(depth: int, columns: int) -> Folded:
        weight, gain = normal(depth, columns, scale=depth**-0.5), 1 + normal(depth, scale=0.1)
        return fold_layernorm(gain, normal(depth, scale=0.1), weight, normal(columns, scale=0.02), dtype)

    def linear(depth: int, columns: int) -> Linear:
        return Linear(normal(depth, columns, scale=0.5 * depth**-0.5).to(dtype), normal(columns, scale=0.02))

    def block(stage: int, number: int) -> SwinBlock:
        of = shape.stage(stage)
        masked = bool(number % 2) and shape.shifted[stage]
        bias = normal(shape.count(stage) if masked else 1, of.heads, of.tokens, of.bias_columns)
        return SwinBlock(
            Block(
                folded(of.width, 3 * of.width),
                linear(of.width, of.width),
                folded(of.width, of.hidden),
                linear(of.mlp_width, of.width),
                bias.to(dtype),
            ),
            permutation(shape.tokens(stage)) if number and shape.shifted[stage] else None,
        )

    pixels, tokens = shape.channels * shape.patch**2, shape.tokens(0)
    widths = [shape.stage(stage).width for stage in range(len(shape.depths))]
    return SwinWeights(
        Embedding(
            normal(pixels, shape.width, scale=pixels**-0.5).to(dtype),
            normal(tokens, shape.width, scale=0.2),
            1 / 64 if shape.uint8 else 1.0,
        ),
        1 + normal(shape.width, scale=0.1),
        normal(shape.width, scale=0.1),
        None,
        permutation(tokens),
        tuple(tuple(block(i, j) for j in range(depth)) for i, depth in enumerate(shape.depths)),
        tuple(
            Merge(permutation(shape.tokens(i)).view(-1, 4), folded(4 * width, 2 * width))
            for i, width in enumerate(widths[:-1])
        ),
    )
