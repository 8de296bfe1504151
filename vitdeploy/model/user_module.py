"""A module of the user's as a reference: what goes in, and what it computes in float64."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

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


def module_flops(module: nn.Module, channels: int, size: Size) -> int | None:
    """Of one image, a multiply-add counted as two, as PyTorch's own counter finds them in what is called.

    None where the module does not run on such an image, or computes with nothing that the counter knows.
    """
    from torch.utils.flop_counter import FlopCounterMode  # which imports Triton, too

    parameter = next(module.parameters(), torch.empty(0))
    image = torch.zeros(1, channels, *size, dtype=parameter.dtype, device=parameter.device)
    counter = FlopCounterMode(display=False)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation for a whole layer, which is not counted
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            copy.deepcopy(module).eval()(image)
    except Exception:  # whatever the user's code raises: exporting it says so
        return None
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() or None


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
