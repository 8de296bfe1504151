"""A module of the user's as a reference: what goes in."""

from __future__ import annotations

import copy

import torch
from torch import nn

from vitdeploy.config import Size


def input_channels(module: nn.Module, size: Size) -> int:
    """What the first convolution reads, unless the module takes an image of three channels."""
    first = next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
    if first is None or first.in_channels == 3:
        return 3
    image = torch.zeros(1, 3, *size, dtype=first.weight.dtype, device=first.weight.device)
    try:
        with torch.inference_mode():
            copy.deepcopy(module).eval()(image)
    except Exception:  # whatever the user's code raises where it is given too many channels
        return first.in_channels
    return 3
