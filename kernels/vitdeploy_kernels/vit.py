"""What the runner runs: the shape of a pre-norm ViT and its weights, folded for the fused kernels.

The weights are those of the checkpoint after exact rewrites: LayerNorm's gain and shift in the linear
layer behind it, layer scale in the one before it, no key bias, the value bias in the projection's; and the
residual stream is *centred*: every layer that writes to it gives rows whose mean is zero, which LayerNorm,
its only reader, cannot see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vitdeploy_kernels.fp8 import Fp8Linear
from vitdeploy_kernels.layernorm_linear import Folded, fold_layernorm


@dataclass(frozen=True)
class VitShape:
    """The numbers of a model, a ViT (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929).

    Attributes:
        image_size: height, width.
        prefix: tokens before the patches: CLS, distillation, registers.
        pre_norm: LayerNorm on the tokens before the first block (CLIP).
        rotary: queries and keys are turned by the place of their token (DINOv3).
        score_bias: something is added to the scores of every block (BEiT).
        gated: the MLP multiplies ``activation`` of its first half with its second (SwiGLU).
        mlp_norm: LayerNorm before the MLP's second layer (EVA02).
        scale: of the attention scores; 1 where it is part of the query weights.
        queries: leading tokens the output depends on, None if it reads every token. With a number, the
            last block is the absorbed one: no keys and no values are projected.
        classes: columns of a fused head over the first token; 0 if the readout is the caller's.
    """

    image_size: tuple[int, int] = (224, 224)
    patch: int = 16
    channels: int = 3
    prefix: int = 1
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "gelu"
    pre_norm: bool = False
    rotary: bool = False
    score_bias: bool = False
    gated: bool = False
    mlp_norm: bool = False
    eps: float = 1e-6
    scale: float = 1.0
    queries: int | None = 1
    classes: int = 1000
    uint8: bool = False

    @property
    def tokens(self) -> int:
        height, width = self.image_size
        return self.prefix + (height // self.patch) * (width // self.patch)

    @property
    def streams(self) -> tuple[tuple[int, int], ...]:
        """Tokens of an image and their columns, of every residual stream."""
        return ((self.tokens, self.width),)

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def bias_columns(self) -> int:
        """Of a score bias: as many as there are tokens, and more, so that every row begins at 16 bytes."""
        return -(-self.tokens // 8) * 8

    @property
    def hidden(self) -> int:
        """Columns of the MLP's first layer."""
        return self.mlp_width * (2 if self.gated else 1)

    @property
    def full_blocks(self) -> int:
        """Blocks that compute every token."""
        return self.depth - (self.queries is not None)

    def image_shape(self, batch: int) -> tuple[int, int, int, int]:
        height, width = self.image_size
        if self.uint8:
            return batch, height, width, self.channels
        return batch, self.channels, height, width


@dataclass(frozen=True)
class Linear:
    """A linear layer: weight (in, out) in the model's dtype, bias (out) float32."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Embedding:
    """The patch projection: weight (C P P, D), or (P P C, D) for uint8 pixels; tokens (T, D) float32."""

    weight: Tensor
    tokens: Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class Block:
    """A block that computes every token; qkv has columns (3, heads, head width).

    A score bias is (1, h, T, ``VitShape.bias_columns``) in the model's dtype; columns beyond T are not read.
    """

    qkv: Folded | Fp8Linear
    proj: Linear | Fp8Linear
    fc1: Folded | Fp8Linear
    fc2: Linear | Fp8Linear
    score_bias: Tensor | None = None

    @property
    def fp8(self) -> bool:
        """Whether any of its products is of 8-bit floats, as only :class:`Fp8Planner` plans them."""
        return any(isinstance(each, Fp8Linear) for each in (self.qkv, self.proj, self.fc1, self.fc2))


@dataclass(frozen=True)
class AbsorbedBlock:
    """The last block when only the first tokens are read; key (h, d, D) and value (h, D, d).

    A score bias is (Q h, T) float32, for the queries that are read.
    """

    q: Folded
    key: Tensor
    value: Tensor
    proj: Linear
    fc1: Folded
    fc2: Linear
    score_bias: Tensor | None = None


@dataclass(frozen=True)
class VitWeights:
    """All weights of a model, on one device; head where the shape has classes.

    Attributes:
        pre_norm: the LayerNorm before the blocks as a linear layer behind a plain one, (D, D), whose rows are
            centred: the gain on the diagonal, and less its share of the mean everywhere.
        rotation: (2, T, d) float32: cosines, and sines whose first half of columns is negated.
    """

    embedding: Embedding
    blocks: tuple[Block, ...]
    last: AbsorbedBlock | None
    head: Folded | None
    pre_norm: Folded | None = None
    rotation: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype


def random_weights(
    shape: VitShape, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> VitWeights:
    """Seeded random weights, of trained models' magnitude; on the meta device, their shapes only."""
    generator = None if str(device) == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator, device=device) * scale

    return build_weights(shape, dtype, normal)


def build_weights(shape: VitShape, dtype: torch.dtype, normal: Callable[..., Tensor]) -> VitWeights:
    """Weights whose values ``normal(*size, scale=...)`` draws."""
    width, d = shape.width, shape.head_width

    def folded(columns: int) -> Folded:
        weight = normal(width, columns, scale=width**-0.5)
        gain = torch.ones(width, device=weight.device)
        bias = normal(columns, scale=0.02)
        return fold_layernorm(gain, torch.zeros_like(gain), weight, bias, dtype)

    def centred(weight: Tensor) -> Tensor:
        return weight - weight.mean(dim=-1, keepdim=True)

    def linear(depth: int) -> Linear:
        weight = centred(normal(depth, width, scale=0.5 * depth**-0.5))
        return Linear(weight.to(dtype), centred(normal(width, scale=0.02)))

    def block() -> Block:
        bias = normal(1, shape.heads, shape.tokens, shape.bias_columns) if shape.score_bias else None
        mlp = folded(shape.hidden), linear(shape.mlp_width)
        return Block(folded(3 * width), linear(width), *mlp, None if bias is None else bias.to(dtype))

    def absorbed() -> AbsorbedBlock:
        key = normal(shape.heads, d, width, scale=width**-0.5).to(dtype)
        value = normal(shape.heads, width, d, scale=width**-0.5).to(dtype)
        bias = normal((shape.queries or 0) * shape.heads, shape.tokens) if shape.score_bias else None
        mlp = folded(shape.hidden), linear(shape.mlp_width)
        return AbsorbedBlock(folded(width), key, value, linear(width), *mlp, bias)

    pixels = shape.channels * shape.patch**2
    turns = normal(shape.tokens, d) if shape.rotary else None
    embedding = Embedding(
        centred(normal(pixels, width, scale=pixels**-0.5)).to(dtype),
        centred(normal(shape.tokens, width, scale=0.2)),
        1 / 64 if shape.uint8 else 1.0,
    )
    return VitWeights(
        embedding,
        tuple(block() for _ in range(shape.full_blocks)),
        absorbed() if shape.queries is not None else None,
        folded(shape.classes) if shape.classes else None,
        folded(width) if shape.pre_norm else None,
        None if turns is None else torch.stack([turns.cos(), turns.sin()]),
    )
