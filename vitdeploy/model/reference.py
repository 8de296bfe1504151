"""What the reference models of all architectures have in common: parts that run one after the other.

A reference is plain and exact. Everything a deployed artifact computes is measured against it in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitdeploy.config import Activation, ModelConfig, Output, layer_of

ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


class Reference(nn.Module, ABC):
    """A reference model: stages, and a readout that is given the tokens, the name of the output, and what
    :meth:`taps` name."""

    config: ModelConfig
    readout: nn.Module

    @abstractmethod
    def stages(self) -> list[tuple[str, nn.Module]]:
        """The parts a forward pass goes through before the readout, in order, by their names here."""

    def taps(self) -> tuple[str, ...]:
        """The stages behind which the readout is given the tokens, too, in their order."""
        return ()

    def fix_positions(self) -> None:
        """Compute once what forward passes need of positions, where attention is fused; weights are there."""

    def forward(self, pixel_values: Tensor, output: Output | None = None) -> Tensor:
        """Return an output (N, ...); ``config.output_shape`` has its shape.

        Args:
            pixel_values: (N, C, H, W), normalised, in the parameters' dtype.
            output: one of ``config.outputs``, the first of them when omitted; or a layer.
        """
        wanted = output or self.config.outputs[0]
        return outputs_of(self, pixel_values, (wanted,))[wanted]


_GROUPS = ("embedding.", "readout.")


def public_name(name: str) -> str:
    """The name a parameter has in a bundle's weights: without the module that groups it."""
    for group in _GROUPS:
        name = name.removeprefix(group)
    return name


def state_of(model: Reference) -> dict[str, Tensor]:
    """The model's parameters under their public names."""
    return {public_name(name): parameter.detach() for name, parameter in model.named_parameters()}


def outputs_of(model: Reference, pixel_values: Tensor, outputs: Sequence[Output]) -> dict[Output, Tensor]:
    """Several outputs of one forward pass, in the parameters' dtype; else as ``Reference.forward``."""
    return _run(model, pixel_values, outputs, _as_it_is)


@torch.inference_mode()
def outputs_float64(
    model: Reference, pixel_values: Tensor, outputs: Sequence[Output]
) -> dict[Output, Tensor]:
    """Run the reference in float64, one part at a time, so that only one part is ever held in float64.

    Args:
        pixel_values: (N, C, H, W), any floating dtype.

    Returns:
        Each output in float64.
    """
    return _run(model, pixel_values.double(), outputs, run_exact)


def forward_float64(model: Reference, pixel_values: Tensor, output: Output | None = None) -> Tensor:
    """One output of :func:`outputs_float64`, the model's first when none is named."""
    wanted = output or model.config.outputs[0]
    return outputs_float64(model, pixel_values, (wanted,))[wanted]


def _run(
    model: Reference, x: Tensor, outputs: Sequence[Output], call: Callable[..., Tensor]
) -> dict[Output, Tensor]:
    results, tapped, taps = {}, [], model.taps()
    for name, stage in model.stages():
        x = call(stage, x)
        if name in taps:
            tapped.append(x)
        for output in outputs:
            if (layer := layer_of(output)) is not None and name == f"blocks.{layer}":
                results[output] = x
        if len(results) == len(set(outputs)):
            return results
    rest = [output for output in outputs if output not in results]
    return results | {output: call(model.readout, x, output, *tapped) for output in rest}


def _as_it_is(module: nn.Module, *args: object) -> Tensor:
    result: Tensor = module(*args)
    return result


def run_exact(module: nn.Module, *args: object) -> Tensor:
    """Run a module with its parameters in float64, which it does not keep."""
    parameters = {name: p.double() for name, p in module.named_parameters()}
    result: Tensor = torch.func.functional_call(module, parameters, args)
    return result
