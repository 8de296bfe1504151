"""A module of the user's as a reference: what goes in, and what it computes in float64."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from vitdeploy.config import Size
from vitdeploy.errors import ExportError


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


def module_float64(module: nn.Module, inputs: Tensor) -> Tensor:
    """The float64 outputs of a copy of ``module``.

    Raises:
        ExportError: it does not run on such inputs, or returns no tensor.
    """
    exact = copy.deepcopy(module).eval().double()
    try:
        with torch.inference_mode():
            return only_tensor(exact(inputs.double()))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ExportError(
            f"the model does not run on a {tuple(inputs.shape)} tensor in float64: {error}",
            hint="it must take one (N, C, H, W) tensor; --image-size says which H and W",
        ) from error


def only_tensor(output: object) -> Tensor:
    """The one tensor of a module's output: itself, ``.logits``, ``["logits"]`` or a tuple's first.

    Raises:
        ExportError: there is none.
    """
    if isinstance(output, dict):
        output = output.get("logits", next(iter(output.values()), None))
    output = getattr(output, "logits", output)
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise ExportError(
            f"the model returns {type(output).__name__}, not a tensor",
            hint="wrap it in a module whose forward returns the logits",
        )
    return output
