"""What configurations of all architectures have in common, and the words that travel in a manifest."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from vitdeploy.errors import UsageError

Size = tuple[int, int]
"""Height, width."""

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
Output = str
"""What a model returns: one of ``OUTPUTS``, or ``layer_3``, the tokens behind block 3."""
OUTPUTS: tuple[Output, ...] = (
    *("logits", "codes", "features", "embedding", "tokens"),
    *("image_features", "deepstack_features"),
)
"""Logits of classes; logits of every patch's code; the pooled vector; that vector projected, where the model
projects, and of length 1; every token. Of a vision-language model's tower: what its language model reads in
place of the image's tokens, and what it adds behind its first blocks."""
POOLED: frozenset[Output] = frozenset(("logits", "features", "embedding"))
"""Those that are computed of the pooled vector."""
InputKind = Literal["float", "uint8", "patches"]
"""Pixels normalised, (C, H, W); as they are, (H, W, C); or normalised and in patches, (T, columns), as the
image processor of a vision-language model gives them."""
Precision = Literal["fp32", "fp16", "bf16"]
Scores = Literal["softmax", "sigmoid", "none"]
"""What becomes of logits where classes are named: ``vitdeploy.scores``."""

_LAYER = re.compile(r"layer_(0|[1-9][0-9]{0,5})")


def size_name(size: Size) -> str:
    """``384x224``, as it is written in names, words and on the command line: height x width."""
    return f"{size[0]}x{size[1]}"


def is_output(name: str) -> bool:
    """Whether some model returns something of this name."""
    return name in OUTPUTS or _LAYER.fullmatch(name) is not None


def layer_of(output: Output) -> int | None:
    """The block whose tokens an output is; None where it is none of the layers."""
    match = _LAYER.fullmatch(output)
    return int(match[1]) if match else None


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
    def step(self) -> int:
        """Pixels: both sides of an image are multiples of it."""
        return 1

    def nearest(self, pixels: int) -> int:
        """The side of an image next to that many pixels."""
        return max(1, round(pixels / self.step)) * self.step

    @property
    @abstractmethod
    def depth(self) -> int:
        """Blocks, of all stages together."""

    @property
    def inputs(self) -> Mapping[InputKind, tuple[int, ...]]:
        """What the model can be built to read, with the shape for one image."""
        height, width = self.image_size
        return {"float": (self.channels, height, width), "uint8": (height, width, self.channels)}

    @property
    def grid_thw(self) -> tuple[int, int, int] | None:
        """Frames, rows, columns of patches, as processors of vision-language models count them; None of any
        other model."""
        return None

    @property
    @abstractmethod
    def output_shapes(self) -> Mapping[Output, tuple[int, ...]]:
        """What the model can return, with the shape for one image; the first is the default."""

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The names of what the model can return, but for its layers; the first is the default."""
        return tuple(self.output_shapes)

    @property
    def usual_outputs(self) -> tuple[Output, ...]:
        """What is returned where the user names nothing."""
        return self.outputs[:1]

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
