"""Which layers of a deployed model may be quantised, and what they read while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vitdeploy.model.deployed import DeployedModel, HeadLinear, Linear
from vitdeploy.model.precision import sites
from vitdeploy.model.vit_deployed import AbsorbedBlock

BATCH = 4
"""Images that are computed at once: what a block makes of them fits into a cache, and into little memory."""

Look = Callable[[str, Tensor], Tensor | None]


def quantisable(model: DeployedModel) -> dict[str, Linear]:
    """The linear layers that may become 8-bit GEMMs: those of the blocks.

    The embedding is a hundredth of the work and the worst of all sites; an absorbed block reads little more
    than the tokens that are pooled; what is read out is what is compared.
    """
    return {name: linear for i in range(len(model.blocks)) for name, linear in of_block(model, i).items()}


def of_block(model: DeployedModel, number: int) -> dict[str, Linear]:
    """Those of one block."""
    block = model.blocks[number]
    if isinstance(block, AbsorbedBlock):
        return {}
    found = sites(block, f"blocks.{number}")
    return {name: site for name, site in found if isinstance(site, Linear)}


@contextmanager
def watching(layers: Mapping[str, nn.Module], look: Look) -> Iterator[None]:
    """Have ``look`` see the name of each layer and what it is about to read; it may return a replacement."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor] | None]:
        def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
            seen = look(name, args[0])
            return None if seen is None else (seen,)

        return before

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for made in hooks:
            made.remove()


@torch.no_grad()
def macs_of(model: DeployedModel, image: Tensor) -> dict[str, int]:
    """Multiplications of every GEMM with weights, by name, of one image (1, ...)."""
    gemms = {name: site for name, site in sites(model) if isinstance(site, Linear | HeadLinear)}
    counts: dict[str, int] = {}

    def count(name: str, x: Tensor) -> None:
        counts[name] = x.numel() * gemms[name].weight.shape[-1]

    with watching(gemms, count):
        model(image)
    return counts


def tensors_of(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A deployed model's outputs, one or several, as several."""
    return outputs if isinstance(outputs, tuple) else (outputs,)
