"""From a deployed model and images to a quantised one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vitdeploy.bundle.dtypes import Quantised
from vitdeploy.model.deployed import DeployedModel, Linear
from vitdeploy.model.precision import sites as all_sites
from vitdeploy.quantisation.sites import FP8_LARGEST, INT8_LARGEST, QuantisedModel, QuantisedSite


@torch.no_grad()
def quantise(
    model: DeployedModel, pixel_values: Tensor, *, kind: Quantised, weight_bits: int = 7
) -> QuantisedModel:
    """Quantise the linear layers of a float32 model; it is left as it is.

    Args:
        pixel_values: the images to calibrate with, (K, ...), as the model reads them.
        weight_bits: of int8: 7 bits keep processors without VNNI from saturating.
    """
    model = copy.deepcopy(model)
    linears = {name: site for name, site in all_sites(model) if isinstance(site, Linear)}
    largest = _largest_inputs(model, linears, pixel_values)
    sites = {}
    for name, linear in linears.items():
        if kind == "int8":
            bound = 2 ** (weight_bits - 1) - 1
            scale = linear.weight.abs().amax(0).clamp_min(1e-12) / bound
            weight = (linear.weight / scale).round().clamp(-bound, bound).to(torch.int8)
            step = float(INT8_LARGEST)
        else:
            scale = linear.weight.abs().amax().clamp_min(1e-12) / FP8_LARGEST
            weight = (linear.weight / scale).to(torch.float8_e4m3fn)
            step = FP8_LARGEST
        sites[name] = QuantisedSite(name, kind, weight, scale, largest[name] / step, linear.bias)
        linear.weight = nn.Parameter(sites[name].dequantised, requires_grad=False)
    return QuantisedModel(model, sites, (), 1.0)


@torch.no_grad()
def simulate(quantised: QuantisedModel, pixel_values: Tensor) -> tuple[Tensor, ...]:
    """The outputs where every GEMM of a site reads what is rounded."""
    with _rounding(quantised):
        outputs = quantised.model(pixel_values)
    return outputs if isinstance(outputs, tuple) else (outputs,)


@contextmanager
def _rounding(quantised: QuantisedModel) -> Iterator[None]:
    hooks = []
    for name, module in all_sites(quantised.model):
        if (site := quantised.sites.get(name)) is not None:
            hooks.append(
                module.register_forward_pre_hook(lambda _, args, site=site: (site.rounded(args[0]),))
            )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _largest_inputs(
    model: DeployedModel, linears: dict[str, Linear], pixel_values: Tensor
) -> dict[str, float]:
    found: dict[str, float] = {}

    def watch(name: str, linear: Linear) -> torch.utils.hooks.RemovableHandle:
        def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = max(found.get(name, 1e-12), args[0].abs().max().item())

        return linear.register_forward_pre_hook(look)

    hooks = [watch(name, linear) for name, linear in linears.items()]
    try:
        for image in pixel_values.split(1):
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return found
