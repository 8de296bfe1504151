"""A module of the user's as a reference: what it computes in float64, whatever it returns it in."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from vitdeploy.errors import ExportError


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
            hint="it must take one (N, 3, H, W) tensor; --image-size says which H and W",
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
