"""A ViT for the fused kernels with the 8-bit products of an fp8 artifact in place of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from vitdeploy.bundle.fp8_gemms import Fp8Gemm
from vitdeploy.errors import BundleError, UsageError
from vitdeploy.model.folds import BLOCK_REWRITES, doubled
from vitdeploy.model.fused import FusedModel, centre_block, check_range, fold_norms, full_block, moved
from vitdeploy.model.vit import Block, ViT
from vitdeploy_kernels import vit as kernels
from vitdeploy_kernels.fp8 import E4M3, MULTIPLE, Fp8Linear


@torch.no_grad()
def with_fp8(
    model: FusedModel, vit: ViT, gemms: Mapping[str, Fp8Gemm], device: torch.device | str
) -> FusedModel:
    """The model with these products; everything else is as it was.

    LayerNorm's gain and shift, which are folded into float weights, stay with the rows that are quantised:
    the artifact's weights are of the layer behind them.

    Args:
        model: of ``vit``, on the device.
        vit: in any float dtype.
        gemms: by site: ``blocks.3.attn.qkv``, ``attn.proj``, ``mlp.fc1`` or ``mlp.fc2`` of a block that
            computes every token.

    Raises:
        UsageError: a product that the kernels have no fp8 route for.
        BundleError: a weight of another shape than the model's.
    """
    assert isinstance(model.shape, kernels.VitShape)
    assert isinstance(model.weights, kernels.VitWeights)
    left, dtype = dict(gemms), model.weights.dtype
    parts = [cast(Block, part) for part in vit.blocks[: len(model.weights.blocks)]]
    floats = tuple(moved(_around(part, dtype), device) for part in parts)
    check_range(replace(model.weights, blocks=floats), dtype)
    blocks = []
    for index, (part, block) in enumerate(zip(parts, floats, strict=True)):
        norms: dict[str, nn.LayerNorm | None] = {
            "attn.qkv": part.norm1,
            "attn.proj": None,
            "mlp.fc1": part.norm2,
            "mlp.fc2": None,
        }
        changed = {}
        for name, norm in norms.items():
            gemm = left.pop(site := f"blocks.{index}.{name}", None)
            if gemm is None:
                continue
            field = name.rpartition(".")[2]
            if field == "fc2" and model.shape.mlp_norm:
                raise UsageError(
                    f"the kernels have no fp8 product behind the LayerNorm inside of an MLP: {site}"
                )
            plain = getattr(block, field).weight.shape
            if gemm.weight.shape != tuple(plain):
                raise BundleError(f"{site} is {gemm.weight.shape} in the artifact, not {tuple(plain)}")
            if any(size % MULTIPLE for size in plain):
                raise UsageError(
                    f"fp8 products have sizes that {MULTIPLE} divides, and {site} is {tuple(plain)}"
                )
            changed[field] = moved(_linear(gemm, norm, dtype), device)
        blocks.append(replace(block, **changed))
    if left:
        raise UsageError(f"the kernels have no fp8 route for {', '.join(sorted(left))}")
    return replace(model, weights=replace(model.weights, blocks=tuple(blocks)))


def _around(part: Block, dtype: torch.dtype) -> kernels.Block:
    """A block whose float layers fit to the artifact's.

    LayerNorm's shift is folded last: what it gives the values stays in their bias, as it does in an exported
    graph, and does not move into the projection's.
    """
    steps: tuple[Callable[[Block], Block], ...] = (*BLOCK_REWRITES, fold_norms, centre_block)
    block = doubled(part)
    for step in steps:
        block = step(block)
    return full_block(block, dtype)


def _linear(gemm: Fp8Gemm, norm: nn.LayerNorm | None, dtype: torch.dtype) -> Fp8Linear:
    """One product, with the LayerNorm before it."""
    # Columns one after the other: the transpose of contiguous rows.
    weight = torch.from_numpy(np.ascontiguousarray(gemm.weight.T)).view(E4M3).t()
    bias = torch.zeros(weight.shape[1]) if gemm.bias is None else torch.from_numpy(gemm.bias.copy())

    def of_norm(parameter: Tensor) -> Tensor:
        return (parameter.detach().double() / gemm.input_scale).float()

    return Fp8Linear(
        weight,
        bias.to(dtype),
        torch.tensor(gemm.scale),
        torch.tensor(gemm.input_scale),
        1.0 / gemm.input_scale,
        None if norm is None else of_norm(norm.weight),
        None if norm is None else of_norm(norm.bias),
    )
