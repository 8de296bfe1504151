"""The text tower of CLIP and SigLIP, which makes the head of a zero-shot classifier once, before the export.

It follows Radford et al. 2021 (https://arxiv.org/abs/2103.00020) and Zhai et al. 2023
(https://arxiv.org/abs/2303.15343). Shapes in comments: N texts, T tokens, D width, h heads, d columns of a
head, E columns of the embedding.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitdeploy.config import Activation, ViTConfig
from vitdeploy.model.reference import run_exact
from vitdeploy.model.vit import Attention, Block

Reads = Literal["end", "highest", "last"]
_AT_ONCE = 64
"""Texts of one pass."""


@dataclass(frozen=True)
class TextConfig:
    """A text tower.

    Raises:
        ConfigError: the numbers do not describe one that can be built.
    """

    vocabulary: int
    length: int
    """Rows of the position table: the most tokens of a text."""
    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: Activation
    norm_eps: float
    embedding: int
    """Columns that the token that is read is projected to."""
    projection_bias: bool
    causal: bool
    """Whether a token sees only those before it."""
    reads: Reads
    """The token whose vector is the text's: the first ``end``; the first of the highest number; the last."""
    end: int = 0

    def __post_init__(self) -> None:
        _ = self.block  # which checks its numbers

    @property
    def block(self) -> ViTConfig:
        """The measures of its blocks, which are those of a ViT."""
        return ViTConfig(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp_width=self.mlp_width,
            activation=self.activation,
            norm_eps=self.norm_eps,
        )


class CausalAttention(Attention):
    """Multi-head self-attention of each token to itself and those before it."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.queries_keys_values(x)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)  # (N, h, T, d)
        mixed: Tensor = self.proj(x.transpose(1, 2).flatten(2))  # (N, T, D)
        return mixed


class TextTower(nn.Module):
    """Tokens to the embedding of their text."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        width, attention = config.width, CausalAttention if config.causal else Attention
        self.token_embed = nn.Embedding(config.vocabulary, width)
        self.pos_embed = nn.Parameter(torch.zeros(config.length, width))
        self.blocks = nn.ModuleList(Block(config.block, attention) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.projection = nn.Linear(width, config.embedding, bias=config.projection_bias)

    def read_at(self, tokens: Tensor) -> Tensor:
        """Where the vector of each text is read, (N,) of (N, T)."""
        if self.config.reads == "last":
            return torch.full((len(tokens),), tokens.shape[1] - 1)
        wanted = tokens if self.config.reads == "highest" else (tokens == self.config.end).int()
        return wanted.argmax(dim=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T) int64 to (N, E) in float64, not normalised; one part at a time is held in float64."""
        rows = self.token_embed.weight[tokens].double()  # (N, T, D)
        x = rows + self.pos_embed[: tokens.shape[1]].double()
        for block in self.blocks:
            x = run_exact(block, x)
        read = x[torch.arange(len(x)), self.read_at(tokens)]  # (N, D)
        return run_exact(self.projection, run_exact(self.norm, read))


def text_shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every parameter, without allocating them."""
    with torch.device("meta"):
        tower = TextTower(config)
    return {name: tuple(p.shape) for name, p in tower.named_parameters()}


def build_text_tower(config: TextConfig, state: Mapping[str, Tensor]) -> TextTower:
    """The tower holding these tensors as they are: no copy, no conversion."""
    with torch.device("meta"):
        tower = TextTower(config)
    tower.load_state_dict(dict(state), assign=True)
    return tower.eval().requires_grad_(False)


@torch.inference_mode()
def embed_texts(tower: TextTower, texts: Sequence[Sequence[int]]) -> Tensor:
    """The embeddings of texts, (N, E) float64, not normalised; those of one length go together, unpadded."""
    embeddings = torch.empty(len(texts), tower.config.embedding, dtype=torch.float64)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for _, alike in itertools.groupby(order, key=lambda i: len(texts[i])):
        rows = list(alike)
        for start in range(0, len(rows), _AT_ONCE):
            some = rows[start : start + _AT_ONCE]
            embeddings[some] = tower(torch.tensor([texts[i] for i in some]))
    return embeddings
