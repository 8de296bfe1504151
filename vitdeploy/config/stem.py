"""What some Vision Transformers have before their patches: a ResNet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vitdeploy.errors import ConfigError

_MOST_STAGES, _MOST_BLOCKS = 8, 999


@dataclass(frozen=True)
class Stem:
    """A ResNet whose last map is cut into patches (Dosovitskiy et al. 2021, section 3.1).

    Its weights are standardised (Qiao et al. 2019, https://arxiv.org/abs/1903.10520), its normalisation is
    GroupNorm, it pads as TensorFlow's SAME does. The root, a convolution of 7 x 7 and a max pooling, makes
    the map a quarter as high and wide; every stage but the first halves it again.

    Raises:
        ConfigError: the numbers make no ResNet.
    """

    stages: tuple[int, ...] = ()
    """Bottleneck blocks of each stage; without a stage there is the root alone."""
    width: int = 64
    """Channels behind the root; the first stage writes four times as many, every other twice its input's."""
    groups: int = 32
    """Of every GroupNorm."""
    norm_eps: float = 1e-5
    weight_eps: float = 1e-8
    weight_eps_on: Literal["variance", "deviation"] = "variance"
    """What ``weight_eps`` is added to: the variance of a filter's weights (timm) or its root (Google)."""

    def __post_init__(self) -> None:
        if len(self.stages) > _MOST_STAGES or not all(0 < n <= _MOST_BLOCKS for n in self.stages):
            raise ConfigError(
                f"a ResNet has at most {_MOST_STAGES} stages of 1 to {_MOST_BLOCKS} blocks, not {self.stages}"
            )
        if min(self.width, self.groups) < 1 or self.width % self.groups:
            raise ConfigError(f"{self.width} channels of a ResNet are not divisible by {self.groups} groups")

    @property
    def stride(self) -> int:
        """Pixels along one side of a cell of the last map."""
        return 4 << max(0, len(self.stages) - 1)

    @property
    def channels(self) -> int:
        """Of the last map."""
        return self.channels_of(len(self.stages) - 1)

    def channels_of(self, stage: int) -> int:
        """What a stage writes; the root, where the stage is -1."""
        return self.width if stage < 0 else 4 * self.width << stage

    @property
    def summary(self) -> str:
        blocks = "+".join(map(str, self.stages))
        return f"a ResNet of {blocks} blocks" if self.stages else "a ResNet's root"
