"""What the reference models of all architectures have in common: parts that run one after the other.

A reference is plain and exact. Everything a deployed artifact computes is measured against it in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitdeploy.config import Activation, ModelConfig, Output

ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


class Reference(nn.Module, ABC):
    """A reference model: stages, and a readout that is given the name of the output beside the tokens."""

    config: ModelConfig
    readout: nn.Module

    @abstractmethod
    def stages(self) -> list[tuple[str, nn.Module]]:
        """The parts a forward pass goes through before the readout, in order, by their names here."""

    def forward(self, pixel_values: Tensor, output: Output | None = None) -> Tensor:
        """Return an output (N, ...); ``config.output_shapes`` has the shapes.

        Args:
            pixel_values: (N, C, H, W), normalised, in the parameters' dtype.
            output: one of ``config.outputs``; the first of them when omitted.
        """
        x = pixel_values
        for _, stage in self.stages():
            x = stage(x)
        result: Tensor = self.readout(x, output or self.config.outputs[0])
        return result


_GROUPS = ("embedding.", "readout.")


def public_name(name: str) -> str:
    """The name a parameter has in a bundle's weights: without the module that groups it."""
    for group in _GROUPS:
        name = name.removeprefix(group)
    return name


def state_of(model: Reference) -> dict[str, Tensor]:
    """The model's parameters under their public names."""
    return {public_name(name): parameter.detach() for name, parameter in model.named_parameters()}


@torch.inference_mode()
def forward_float64(model: Reference, pixel_values: Tensor, output: Output | None = None) -> Tensor:
    """Run the reference in float64, one part at a time, so that only one part is ever held in float64.

    Args:
        pixel_values: (N, C, H, W), any floating dtype.

    Returns:
        The output in float64.
    """

    def exact(module: nn.Module, *args: object) -> Tensor:
        parameters = {name: p.double() for name, p in module.named_parameters()}
        result: Tensor = torch.func.functional_call(module, parameters, args)
        return result

    x = pixel_values.double()
    for _, stage in model.stages():
        x = exact(stage, x)
    return exact(model.readout, x, output or model.config.outputs[0])
