"""What a model is: frozen configurations, one class for each kind of architecture.

Nothing here imports torch; a configuration travels in a bundle's manifest.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

from vitdeploy.errors import ConfigError, UsageError, did_you_mean

Size = tuple[int, int]
"""Height, width."""

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
Pool = Literal["cls", "mean", "both_heads", "cls_mean", "probe"]
Position = Literal["learned", "sincos2d", "sincos1d", "none"]
FinalNorm = Literal["tokens", "pooled", "both", "read", "none"]
Output = str
"""What a model returns: one of ``OUTPUTS``, or ``layer_3``, the tokens behind block 3."""
OUTPUTS: tuple[Output, ...] = ("logits", "codes", "features", "embedding", "tokens")
"""Logits of classes; logits of every patch's code; the pooled vector; that vector projected, where the model
projects, and of length 1; every token."""
POOLED: frozenset[Output] = frozenset(("logits", "features", "embedding"))
"""Those that are computed of the pooled vector."""
InputKind = Literal["float", "uint8"]
Precision = Literal["fp32", "fp16", "bf16"]
Scores = Literal["softmax", "sigmoid", "none"]
"""What becomes of logits where classes are named: ``vitdeploy.scores``."""
Resample = Literal[
    "nearest", "lanczos", "bilinear", "bicubic", "box", "hamming", "bilinear_float", "bicubic_float"
]
"""Pillow's filters; ``_float`` where resized pixels are not rounded to whole numbers."""


class ModelConfig(ABC):
    """What the configuration of every architecture states; each is a frozen dataclass derived from this."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid", "allow_inf_nan": False}
    kind: ClassVar[str]
    """The architecture, as a manifest names it; :func:`model_type` finds the class by it."""

    image_size: Size
    channels: int
    classes: int
    """Columns of the logits; 0 is a model without a head."""

    def beyond_kernels(self, output: Output) -> tuple[str, ...]:
        """What ``vitdeploy_kernels`` does not compute of this model on the way to an output."""
        return (f"the structure of {self.kind!r}",)

    @property
    @abstractmethod
    def depth(self) -> int:
        """Blocks, of all stages together."""

    @property
    @abstractmethod
    def output_shapes(self) -> Mapping[Output, tuple[int, ...]]:
        """What the model can return, with the shape for one image; the first is the default."""

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The names of what the model can return, but for its layers; the first is the default."""
        return tuple(self.output_shapes)

    def output_shape(self, output: Output) -> tuple[int, ...] | None:
        """The shape of one of ``outputs`` or of a layer, for one image; None where the model has no such."""
        return self.output_shapes.get(output)

    @property
    @abstractmethod
    def summary(self) -> str:
        """Its measures, in one line."""

    @property
    def reference_bytes(self) -> int:
        """What the float64 reference holds at once for each image, at the least; 0 where nobody counted."""
        return 0

    def at_size(self, size: Size) -> Self:
        """The same model for images of another height and width.

        Raises:
            ConfigError: the model cannot be built for them.
        """
        this: Any = self
        resized: Self = replace(this, image_size=size)
        return resized


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


_LAYER = re.compile(r"layer_(0|[1-9][0-9]{0,5})")


def is_output(name: str) -> bool:
    """Whether some model returns something of this name."""
    return name in OUTPUTS or _LAYER.fullmatch(name) is not None


def layer_of(output: Output) -> int | None:
    """The block whose tokens an output is; None where it is none of the layers."""
    match = _LAYER.fullmatch(output)
    return int(match[1]) if match else None


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

    def __post_init__(self) -> None:
        for name in ("patch_size", "channels", "width", "depth", "heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        height, width = self.image_size
        if height < 1 or width < 1 or height % self.patch_size or width % self.patch_size:
            raise ConfigError(
                f"image size {height}x{width} is not divisible by the patch size {self.patch_size}",
                hint=f"nearest that is: {self._nearest(height)}x{self._nearest(width)}",
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

    def _nearest(self, pixels: int) -> int:
        return max(1, round(pixels / self.patch_size)) * self.patch_size

    @property
    def grid(self) -> Size:
        """Patches along the height and the width."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

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
        # What the kernels keep of a token lacks its mean, which a LayerNorm takes away anyhow.
        as_it_is = layer_of(output) is not None or self.final_norm == "none"
        as_it_is |= self.final_norm == "pooled" and output == "tokens"
        late = self.final_norm in ("pooled", "read")
        as_it_is |= late and (output == "codes" or (self.pool == "probe" and output != "tokens"))
        return ("tokens without the final norm",) if as_it_is else ()

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
        return 8 * (2 * self.heads * self.tokens**2 + 2 * self.tokens * self.width)

    @property
    def summary(self) -> str:
        height, width = self.image_size
        shape = f"width {self.width}, depth {self.depth}, heads {self.heads}, patch {self.patch_size}"
        return f"{shape}, {height}x{width} pixels, {self.tokens} tokens"


CONFIGS: Mapping[str, type[ModelConfig]] = {config.kind: config for config in (ViTConfig,)}
"""The configuration of every kind."""


def model_type(fields: Mapping[str, object]) -> tuple[type[ModelConfig], dict[str, object]]:
    """The class of a configuration that was written as JSON, and its fields without ``kind``.

    Bundles name no kind where it is ``vit``: the first ones knew no other.

    Raises:
        ConfigError: the kind is unknown.
    """
    kind = fields.get("kind", ViTConfig.kind)
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise ConfigError(f"unknown kind of model {kind!r}{did_you_mean(str(kind), CONFIGS)}")
    rest = {name: value for name, value in fields.items() if name != "kind"}
    late = rest.pop(_NORM_AFTER_POOL, None) if CONFIGS[kind] is ViTConfig else None
    if late is True:
        rest.setdefault("final_norm", "read")
    elif late not in (None, False):
        raise ConfigError(f"{_NORM_AFTER_POOL} must be true or false, not {late!r}")
    return CONFIGS[kind], rest


def model_fields(config: ModelConfig) -> dict[str, Any]:
    """A configuration as it is written as JSON; :func:`model_type` is the way back.

    Fields that bundles of 0.1.0 do not have are written where they are not what those bundles mean.
    """
    this: Any = config
    values = asdict(this)
    if not isinstance(config, ViTConfig):
        return {"kind": config.kind} | values
    usual = {field.name: field.default for field in fields(ViTConfig)}
    values = {n: v for n, v in values.items() if n not in _NEWER or v != usual[n]}
    late = config.final_norm in ("pooled", "read")
    if config.final_norm == "read":
        del values["final_norm"]
    return values | {_NORM_AFTER_POOL: late}


_NORM_AFTER_POOL = "norm_after_pool"
"""How bundles of 0.1.0 write a final norm on whatever is read, instead of on tokens."""
_NEWER = frozenset(
    (
        *("mlp_norm", "head_on", "projection", "codes", "patch_bias", "pre_norm", "rotary", "key_bias"),
        *("score_bias", "final_norm"),
    )
)
"""Fields that bundles of 0.1.0 do not have."""


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes ``pixel_values``: decode, RGB or grey, resize, centre crop, rescale, normalise.

    ``mean`` and ``std`` have a number for each channel of the model: three are red, green, blue; one is grey,
    to which images are converted before they are resized. A model of other channels reads tensors only, of
    which ``rescale``, ``mean`` and ``std`` say how they are scaled.

    ``size`` is the final (height, width): what is larger after resizing is cropped around the centre,
    what is smaller is surrounded by ``pad``. ``resize`` says how the image is resized before:

    ``"exact"``           to ``resize_to`` (``size`` where that is None), whatever its shape
    ``"shortest_edge"``   the shorter side becomes ``resize_edge`` pixels, its shape is kept
    ``"cover"``           to the smallest of its shape that covers ``resize_to``
    ``"contain"``         to the largest of its shape that fits into ``resize_to``
    ``"none"``            not at all

    Raises:
        ConfigError: the settings contradict each other.
    """

    size: Size = (224, 224)
    resize: Literal["exact", "shortest_edge", "cover", "contain", "none"] = "exact"
    resize_edge: int | None = None
    resize_to: Size | None = None
    resample: Resample = "bilinear"
    crop_rounding: Literal["floor", "round"] = "floor"
    """Where the centre of an odd margin is: transformers rounds down, torchvision to even."""
    pad: tuple[int, int, int] = (0, 0, 0)
    """Red, green, blue (0-255) around an image that is smaller than ``size``."""
    rescale: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    exif: bool = False
    """Turn the image as its EXIF orientation says; only where the checkpoint's own pipeline does."""

    def __post_init__(self) -> None:
        for height, width in (self.size, self.resize_to or self.size):
            if min(height, width) < 1:
                raise ConfigError(f"preprocessing size {height}x{width} is not positive")
        if (self.resize == "shortest_edge") != (self.resize_edge is not None):
            raise ConfigError("resize_edge goes with resize='shortest_edge', and only with it")
        if self.resize_edge is not None and self.resize_edge < 1:
            raise ConfigError(f"resize_edge must be at least 1, not {self.resize_edge}")
        if self.resize_to is not None and self.resize in ("shortest_edge", "none"):
            raise ConfigError(f"resize_to does not go with resize={self.resize!r}")
        if self.resize_to is None and self.resize in ("cover", "contain"):
            raise ConfigError(f"resize={self.resize!r} needs resize_to")
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ConfigError(
                "mean and std must have a number for each channel of the model, those of std positive; they "
                f"have {len(self.mean)} and {len(self.std)}"
            )
        if {len(self.pad)} != {3} or min(self.pad) < 0 or max(self.pad) > 255:
            raise ConfigError(f"pad must be three numbers from 0 to 255, not {self.pad}")

    @property
    def channels(self) -> int:
        """Of the tensor: as many as there are means."""
        return len(self.mean)

    @property
    def takes_images(self) -> bool:
        """Whether images can become such a tensor: in grey or in red, green and blue."""
        return self.channels in (1, 3)


@dataclass(frozen=True)
class BatchRange:
    """Batch sizes an artifact serves: the least, the one to optimise for, the most."""

    min: int = 1
    opt: int = 8
    max: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise UsageError(
                f"batch sizes must rise from 1: MIN,OPT,MAX is {self.min},{self.opt},{self.max}",
                hint="for example --batch 1,8,32, or --batch 8 for a fixed batch",
            )

    @property
    def fixed(self) -> bool:
        return self.min == self.max

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(sorted({self.min, self.opt, self.max}))
