"""The models that are measured, their images, and what their outputs are held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from plain_vit import PlainViT
from torch import Tensor

from vitdeploy_kernels.config import Table, load_table, table_for
from vitdeploy_kernels.runner import VitRunner
from vitdeploy_kernels.tuner import MODELS
from vitdeploy_kernels.vit import VitShape, VitWeights, random_weights

REHEARSED = VitShape(image_size=(16, 16), patch=8, width=32, depth=2, heads=2, mlp_width=64, classes=10)
SHAPES = {**MODELS, "rehearsed": REHEARSED}
COMPARED = 8
"""Images of a batch that are compared with float64."""


@dataclass(frozen=True)
class Model:
    """One model on one device."""

    name: str
    shape: VitShape
    weights: VitWeights
    device: torch.device

    @classmethod
    def of(cls, name: str, rehearse: bool, dtype: torch.dtype = torch.float16) -> Model:
        """A named model on the GPU; in a rehearsal a tiny one on the CPU, whatever the name."""
        device = torch.device("cpu") if rehearse else torch.device("cuda", 0)
        shape = SHAPES["rehearsed" if rehearse else name]
        assert isinstance(shape, VitShape)
        return cls("rehearsed" if rehearse else name, shape, random_weights(shape, dtype, device), device)

    def images(self, batch: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(batch)
        return torch.randn(self.shape.image_shape(batch), generator=generator, device=self.device)

    def expected(self, images: Tensor) -> Tensor:
        """In float64, of the same rounded weights."""
        exact = PlainViT(self.shape, self.weights, sdpa=False).double().eval()
        return exact(images[:COMPARED].to(self.weights.dtype))

    def plain(self) -> PlainViT:
        """The same model as anyone would write it, with PyTorch's fused attention."""
        return PlainViT(self.shape, self.weights, sdpa=True).eval()

    def runner(self, batch: int, table: Table) -> VitRunner:
        return VitRunner(self.shape, self.weights, batches=[batch], table=table)


def table_of(path: object, device: torch.device) -> Table:
    """The table of a file; the one that is shipped for the device where none is named."""
    return load_table(str(path)) if path else table_for(device)


def parity(output: Tensor, expected: Tensor) -> dict[str, float]:
    """Worst relative error of a row, and the share of images with the same best class."""
    got = output[:COMPARED].double()
    error = (got - expected).norm(dim=1) / expected.norm(dim=1)
    agree = (got.argmax(dim=1) == expected.argmax(dim=1)).double().mean()
    return {"relative_error": float(error.max()), "same_class": float(agree)}
