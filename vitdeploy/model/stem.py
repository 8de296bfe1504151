"""The reference ResNet that hybrids have before their patches, in the original's own terms.

A ResNetV2 of Kolesnikov et al. 2020 (https://arxiv.org/abs/1912.11370) as Dosovitskiy et al. 2021 use it: its
blocks normalise behind their convolutions, and weights are standardised in every forward pass.

Shapes in comments: N images, C channels, H x W the map's height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitdeploy.config import Stem


def same_padding(kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and behind an axis so that it becomes ``stride`` times as short, as TensorFlow's SAME.

    An odd one lies behind. The axis is a multiple of the stride: of a stem's maps, every one is.
    """
    total = max(kernel - stride, 0)
    return total // 2, total - total // 2


class StandardisedConv(nn.Module):
    """Convolution without a bias whose filters have mean 0 and deviation 1, padded as SAME."""

    def __init__(self, config: Stem, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.config, self.kernel, self.stride = config, kernel, stride
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, kernel, kernel))

    def standardised(self) -> Tensor:
        """The weights that are convolved with, (C out, C in, kernel, kernel)."""
        filters = self.weight.flatten(1)
        centred = filters - filters.mean(dim=1, keepdim=True)
        variance = centred.square().mean(dim=1, keepdim=True)  # of all weights there are: biased
        if self.config.weight_eps_on == "variance":
            deviation = (variance + self.config.weight_eps).sqrt()
        else:
            deviation = variance.sqrt() + self.config.weight_eps
        return (centred / deviation).reshape(self.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        sides = same_padding(self.kernel, self.stride)
        return F.conv2d(F.pad(x, (*sides, *sides)), self.standardised(), stride=self.stride)


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut, which a stage's first block projects; ReLU behind the sum."""

    def __init__(self, config: Stem, inputs: int, outputs: int, stride: int, *, first: bool) -> None:
        super().__init__()
        inner = outputs // 4
        self.downsample = StandardisedConv(config, inputs, outputs, stride=stride) if first else None
        self.downsample_norm = _group_norm(config, outputs) if first else None
        self.conv1 = StandardisedConv(config, inputs, inner)
        self.norm1 = _group_norm(config, inner)
        self.conv2 = StandardisedConv(config, inner, inner, kernel=3, stride=stride)
        self.norm2 = _group_norm(config, inner)
        self.conv3 = StandardisedConv(config, inner, outputs)
        self.norm3 = _group_norm(config, outputs)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.downsample is not None and self.downsample_norm is not None:
            shortcut = self.downsample_norm(self.downsample(x))
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return F.relu(self.norm3(self.conv3(x)) + shortcut)


class ResNetStem(nn.Module):
    """Pixels (N, C, H, W) to the last map (N, C, H / stride, W / stride)."""

    def __init__(self, config: Stem, channels: int) -> None:
        super().__init__()
        self.config = config
        self.conv = StandardisedConv(config, channels, config.width, kernel=7, stride=2)
        self.norm = _group_norm(config, config.width)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    Bottleneck(
                        config,
                        config.channels_of(stage if block else stage - 1),
                        config.channels_of(stage),
                        2 if stage and not block else 1,
                        first=not block,
                    )
                    for block in range(blocks)
                )
            )
            for stage, blocks in enumerate(config.stages)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))  # (N, C, H/2, W/2)
        sides = same_padding(3, 2)
        x = F.max_pool2d(F.pad(x, (*sides, *sides), value=-torch.inf), 3, stride=2)  # (N, C, H/4, W/4)
        for stage in self.stages:
            x = stage(x)
        return x


def _group_norm(config: Stem, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.groups, channels, eps=config.norm_eps)
