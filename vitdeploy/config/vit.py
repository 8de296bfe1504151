"""The plain Vision Transformer and its kin: one configuration with switches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vitdeploy.config.common import Activation, ModelConfig, Output, Size, layer_of
from vitdeploy.config.stem import Stem
from vitdeploy.errors import ConfigError

Pool = Literal["cls", "mean", "both_heads", "cls_mean", "probe"]
Position = Literal["learned", "sincos2d", "sincos1d", "none"]
FinalNorm = Literal["tokens", "pooled", "both", "read", "none"]


@dataclass(frozen=True)
class Rotary:
    """Rotation of queries and keys by the place of their patch (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    Prefix tokens are not rotated. Column ``c`` of a head is paired with column ``c + head_width / 2``; of the
    pairs, the first half turns by the row, the second by the column.

    Raises:
        ConfigError: the numbers make no rotation.
    """

    coordinates: Literal["centred", "centred_timm", "indexed"]
    """Patch centres from -1 to 1, in full turns (DINOv3), as transformers or as timm rounds them; or their
    number in the grid, in radians (EVA02)."""
    base: float
    grid: Size | None = None
    """Of indexed coordinates: the rows and columns that any other grid is stretched to."""

    def __post_init__(self) -> None:
        if self.base <= 1 or (self.grid is not None and min(self.grid) < 1):
            raise ConfigError(f"a rotation by base {self.base} over a grid {self.grid} is none")
        if self.grid is not None and self.coordinates != "indexed":
            raise ConfigError("a rotation's grid goes with indexed coordinates")


@dataclass(frozen=True)
class ViTConfig(ModelConfig):
    """A Vision Transformer (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929) or one of its kin.

    Tokens stand in the order CLS, distillation, registers, patches. The position table has
    ``position_prefix`` rows for the first prefix tokens, then one row per patch, row-major; prefix
    tokens beyond ``position_prefix`` have no position.

    Raises:
        ConfigError: the numbers do not describe a model that can be built.
    """

    kind = "vit"

    image_size: Size = (224, 224)
    patch_size: int = 16
    """Along one side, in pixels; behind a stem, in cells of its map."""
    channels: int = 3
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    """Columns between the two MLP layers (after the gate, for a gated MLP)."""
    activation: Activation = "gelu"
    gated_mlp: bool = False
    """SwiGLU (Shazeer 2020): ``fc1`` has 2 x ``mlp_width`` rows, the gate's half first."""
    mlp_norm: bool = False
    """LayerNorm between the gate and ``fc2``."""
    classes: int = 1000
    """Columns of the logits; 0 is a model without a head."""
    head_on: Literal["features", "embedding"] = "features"
    """What the head reads; the embedding where the head is one of texts' embeddings (zero-shot)."""
    projection: int = 0
    """Columns that the embedding is projected to, without a bias; 0 is no projection."""
    codes: int = 0
    """Columns of a head over every patch (masked image modelling); 0 is none."""
    patch_bias: bool = True
    pre_norm: bool = False
    """LayerNorm on the tokens before the first block."""
    cls_token: bool = True
    distillation_token: bool = False
    registers: int = 0
    position: Position = "learned"
    position_prefix: int = 1
    rotary: Rotary | None = None
    qkv_bias: bool = True
    key_bias: bool = True
    """Whether keys have a bias where queries and values have one."""
    score_bias: bool = False
    """A learned bias on the scores of every block, by head and relative position (BEiT)."""
    layer_scale: bool = False
    norm_eps: float = 1e-6
    pool: Pool = "cls"
    """``probe`` is attention of a learned query to all tokens, and an MLP behind it (SigLIP)."""
    final_norm: FinalNorm = "tokens"
    """What the final LayerNorm works on: every token; the pooled vector, while tokens stay as they are; every
    token and the pooled vector again; whichever of them is returned; or nothing, and there is none."""
    representation_width: int = 0
    """Columns of a tanh layer between pooling and head (the paper's pre-training head); 0 is none."""
    stem: Stem | None = None
    """A ResNet before the patches (hybrids)."""

    def __post_init__(self) -> None:
        for name in ("patch_size", "channels", "width", "depth", "heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        height, width = self.image_size
        if height < 1 or width < 1 or height % self.step or width % self.step:
            what = "the patch size" if self.stem is None else "the ResNet's stride times the patch size,"
            raise ConfigError(
                f"image size {height}x{width} is not divisible by {what} {self.step}",
                hint=f"nearest that is: {self.nearest(height)}x{self.nearest(width)}",
            )
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} is not divisible by {self.heads} heads")
        if self.position == "sincos2d" and self.width % 4:
            raise ConfigError(f"2D sinusoidal positions need a width divisible by 4, not {self.width}")
        if self.position == "sincos1d" and self.width % 2:
            raise ConfigError(f"1D sinusoidal positions need an even width, not {self.width}")
        if self.rotary is not None and self.head_width % 4:
            raise ConfigError(f"rotary positions need heads of 4n columns, not of {self.head_width}")
        if self.score_bias and self.prefix_tokens > 1:
            raise ConfigError(f"relative positions go with one prefix token, not {self.prefix_tokens}")
        if self.position != "learned" and self.position_prefix:
            raise ConfigError("only a learned position table has rows for prefix tokens (position_prefix)")
        if self.position_prefix > self.prefix_tokens:
            raise ConfigError(
                f"position_prefix is {self.position_prefix}, but there are {self.prefix_tokens} prefix tokens"
            )
        if self.pool in ("cls", "cls_mean") and not self.cls_token:
            raise ConfigError(f"pooling by {self.pool!r} needs a CLS token")
        if self.pool == "both_heads" and not (self.cls_token and self.distillation_token):
            raise ConfigError("pooling by 'both_heads' needs a CLS and a distillation token")
        if self.pool == "both_heads" and self.representation_width:
            raise ConfigError("a representation layer does not go with pooling by 'both_heads'")
        if self.pool == "both_heads" and (self.final_norm != "tokens" or self.head_on != "features"):
            raise ConfigError(
                "pooling by 'both_heads' goes with a final norm on tokens and heads on features"
            )
        if self.head_on == "embedding" and self.representation_width:
            raise ConfigError("a representation layer does not go with a head on the embedding")

    @property
    def step(self) -> int:
        """Pixels along one side of a patch."""
        return self.patch_size * (1 if self.stem is None else self.stem.stride)

    @property
    def patch_channels(self) -> int:
        """Channels of what is cut into patches."""
        return self.channels if self.stem is None else self.stem.channels

    @property
    def grid(self) -> Size:
        """Patches along the height and the width."""
        return self.image_size[0] // self.step, self.image_size[1] // self.step

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def prefix_tokens(self) -> int:
        """CLS, distillation and register tokens together."""
        return int(self.cls_token) + int(self.distillation_token) + self.registers

    @property
    def tokens(self) -> int:
        return self.prefix_tokens + self.patches

    @property
    def head_width(self) -> int:
        """Columns of one attention head."""
        return self.width // self.heads

    @property
    def features(self) -> int:
        """Columns of the pooled vector."""
        return self.width * (2 if self.pool == "cls_mean" else 1)

    def beyond_kernels(self, output: Output) -> tuple[str, ...]:
        stem = () if self.stem is None else (f"{self.stem.summary} before the patches",)
        # What the kernels keep of a token lacks its mean, which a LayerNorm takes away anyhow.
        as_it_is = layer_of(output) is not None or self.final_norm == "none"
        as_it_is |= self.final_norm == "pooled" and output == "tokens"
        late = self.final_norm in ("pooled", "read")
        as_it_is |= late and (output == "codes" or (self.pool == "probe" and output != "tokens"))
        return (*stem, "tokens without the final norm") if as_it_is else stem

    @property
    def embedding(self) -> int:
        """Columns of the embedding."""
        return self.projection or self.features

    @property
    def output_shapes(self) -> Mapping[Output, tuple[int, ...]]:
        shapes: dict[Output, tuple[int, ...]] = {"logits": (self.classes,)} if self.classes else {}
        if self.codes:
            shapes["codes"] = (self.patches, self.codes)
        pooled = {"embedding": (self.embedding,), "features": (self.features,)}
        # A model that projects was trained for its embedding.
        order: tuple[Output, ...] = (
            ("embedding", "features") if self.projection else ("features", "embedding")
        )
        return {**shapes, **{name: pooled[name] for name in order}, "tokens": (self.tokens, self.width)}

    def output_shape(self, output: Output) -> tuple[int, ...] | None:
        layer = layer_of(output)
        if layer is not None:
            return (self.tokens, self.width) if layer < self.depth else None
        return self.output_shapes.get(output)

    @property
    def reference_bytes(self) -> int:
        # Attention holds the scores of all pairs of tokens twice: before the softmax and behind it.
        blocks = 2 * self.heads * self.tokens**2 + 2 * self.tokens * self.width
        if self.stem is None:
            return 8 * blocks
        # The largest maps are those behind the root and of the first stage; a norm reads one and writes one.
        map_behind_root = self.stem.width * (self.image_size[0] // 2) * (self.image_size[1] // 2)
        return 8 * max(blocks, 2 * map_behind_root)

    @property
    def summary(self) -> str:
        height, width = self.image_size
        shape = f"width {self.width}, depth {self.depth}, heads {self.heads}, patch {self.step}"
        if self.stem is not None:
            shape += f" behind {self.stem.summary}"
        return f"{shape}, {height}x{width} pixels, {self.tokens} tokens"
