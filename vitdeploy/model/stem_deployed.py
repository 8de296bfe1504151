"""The deployed form of the ResNet that hybrids have before their patches, and the rewrites that make it.

Shapes in comments: N images, C channels, H x W the map's height and width, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitdeploy.config import Preprocess, Size, Stem, ViTConfig
from vitdeploy.model.deployed import Add, Site
from vitdeploy.model.folds import edited, normalisation
from vitdeploy.model.stem import Bottleneck, ResNetStem, StandardisedConv, same_padding


class Conv(Site):
    """Convolution without a bias, padded as TensorFlow's SAME."""

    def __init__(self, weight: Tensor, stride: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)  # (C out, C in, kernel, kernel)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        before, behind = same_padding(self.weight.shape[-1], self.stride)
        x = x.to(self.weight.dtype)
        if before == behind:
            return F.conv2d(x, self.weight, stride=self.stride, padding=before)
        return F.conv2d(F.pad(x, (before, behind) * 2), self.weight, stride=self.stride)


class GroupNorm(Site):
    """GroupNorm of a map, whose sums run along rows first, then over the rows of a group.

    A group has 25088 values at 224 pixels. ONNX Runtime and OpenVINO add them one after the other in float32,
    in a LayerNorm as in an InstanceNorm, and where many are alike, on a plain background, every addition
    errs to the same side: 1e-5 to 5e-5 of the result. Two sums of some hundred lose a fiftieth of that. They
    are of different kinds, since OpenVINO makes one sum of two that are alike.
    """

    always_fp32 = True

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        weight, bias = norm.weight.reshape(norm.num_groups, -1), norm.bias.reshape(-1, 1, 1)
        self.weight = nn.Parameter(weight, requires_grad=False)  # (G, C / G)
        self.bias = nn.Parameter(bias, requires_grad=False)  # (C, 1, 1)
        self.eps = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        _, channels, height, width = x.shape
        groups, inside = self.weight.shape
        x = x.to(self.weight.dtype).reshape(-1, groups, inside * height, width)
        x = x - x.sum(dim=3, keepdim=True).mean(dim=2, keepdim=True) / width
        lengths = torch.linalg.vector_norm(x, dim=3)  # (N, G, C / G H)
        variance = (lengths * lengths).mean(dim=2, keepdim=True) / width  # (N, G, 1)
        gain = self.weight / (variance + self.eps).sqrt()  # (N, G, C / G)
        x = x.reshape(-1, channels, height, width)
        return x * gain.reshape(-1, channels, 1, 1) + self.bias


class Centre(Site):
    """Pixels (N, H, W, C) of any dtype less what becomes 0 once they are normalised, as (N, C, H, W)."""

    always_fp32 = True

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value, requires_grad=False)  # (C)

    def forward(self, pixels: Tensor) -> Tensor:
        # Cast first (0 to 255 are exact in every dtype): TensorRT has no other operation on uint8.
        return (pixels.to(self.value.dtype) - self.value).permute(0, 3, 1, 2)


class DeployedBottleneck(nn.Module):
    """As :class:`vitdeploy.model.stem.Bottleneck`."""

    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        self.downsample = self.downsample_norm = None
        if block.downsample is not None and block.downsample_norm is not None:
            self.downsample = standardise_weights(block.downsample)
            self.downsample_norm = GroupNorm(block.downsample_norm)
        self.conv1, self.norm1 = standardise_weights(block.conv1), GroupNorm(block.norm1)
        self.conv2, self.norm2 = standardise_weights(block.conv2), GroupNorm(block.norm2)
        self.conv3, self.norm3 = standardise_weights(block.conv3), GroupNorm(block.norm3)
        self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.downsample is not None and self.downsample_norm is not None:
            shortcut = self.downsample_norm(self.downsample(x))
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return F.relu(self.add(self.norm3(self.conv3(x)), shortcut))


class DeployedStem(nn.Module):
    """Pixels (N, C, H, W), or (N, H, W, C) where they are centred first, to the last map."""

    def __init__(self, stem: ResNetStem) -> None:
        super().__init__()
        self.centre: Centre | None = None
        self.conv, self.norm = standardise_weights(stem.conv), GroupNorm(stem.norm)
        self.stages = nn.ModuleList(
            nn.Sequential(*(DeployedBottleneck(cast(Bottleneck, block)) for block in stage.children()))
            for stage in stem.stages
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.centre is not None:
            x = self.centre(x)
        x = F.relu(self.norm(self.conv(x)))
        # A window that begins inside and ends outside of a map of even sides is what SAME pads: one behind.
        x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
        for stage in self.stages:
            x = stage(x)
        return x


def standardise_weights(conv: StandardisedConv) -> Conv:
    """What every forward pass makes of the weights is the same every time: it is made once."""
    return Conv(conv.standardised(), conv.stride)


def centre_pixels(stem: DeployedStem, preprocess: Preprocess) -> DeployedStem:
    """Take uint8 HWC pixels: r u / std - mean / std is (r / std) (u - mean / r), and only r / std moves on.

    The root pads normalised pixels with zeros. A constant moved into its bias would be added to those, too;
    what is subtracted before leaves them zeros.
    """
    stem = edited(stem)
    scale, shift = normalisation(preprocess)
    stem.centre = Centre(-shift / scale)
    stem.conv = Conv(stem.conv.weight * scale[:, None, None], stem.conv.stride)
    return stem


def _convolutions(stem: Stem, channels: int, size: Size) -> Iterator[tuple[int, int, int, int]]:
    """Inputs, outputs, kernel and positions of every convolution."""
    cells = size[0] // 2 * (size[1] // 2)
    yield channels, stem.width, 7, cells
    cells //= 4
    for stage, blocks in enumerate(stem.stages):
        outputs = stem.channels_of(stage)
        for block in range(blocks):
            inputs, before = (outputs, cells) if block else (stem.channels_of(stage - 1), cells)
            if not block:
                cells = cells // 4 if stage else cells
                yield inputs, outputs, 1, cells
            yield inputs, outputs // 4, 1, before
            yield outputs // 4, outputs // 4, 3, cells
            yield outputs // 4, outputs, 1, cells


def stem_flops(config: ViTConfig) -> int:
    """FLOPs of the stem's convolutions, per image; 0 where there is no stem."""
    if config.stem is None:
        return 0
    convolutions = _convolutions(config.stem, config.channels, config.image_size)
    return sum(2 * positions * kernel**2 * i * o for i, o, kernel, positions in convolutions)


def standardising_flops(config: ViTConfig) -> int:
    """What :func:`standardise_weights` saves of one forward pass; 0 where there is no stem."""
    if config.stem is None:
        return 0
    convolutions = _convolutions(config.stem, config.channels, config.image_size)
    # Each weight is added for the mean, less it, squared, added for the variance, and divided.
    return sum(5 * kernel**2 * i * o for i, o, kernel, _ in convolutions)
