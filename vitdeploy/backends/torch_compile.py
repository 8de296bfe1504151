"""PyTorch's compiler over the model: what a user gets without exporting anything."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from types import FunctionType
from typing import TYPE_CHECKING

from vitdeploy.backends.base import Availability
from vitdeploy.backends.torch import Forward, Torch
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.bundle.folder import Bundle
from vitdeploy.config import BatchRange

if TYPE_CHECKING:
    from torch import Tensor


class TorchCompile(Torch):
    """The backend. The first run of a batch of one, and of any larger one, compiles: seconds to minutes."""

    traits = replace(Torch.traits, name="torch-compile", summary="PyTorch with torch.compile, dynamic batch")

    def availability(self) -> Availability:
        return with_compiler(super().availability(), "torch.compile")

    def _forward(
        self, bundle: Bundle, precision: ArtifactPrecision, batch: BatchRange | None, device: str
    ) -> Forward:
        import torch
        import torch._dynamo

        forward = super()._forward(bundle, precision, batch, device)
        assert isinstance(forward, FunctionType)
        # The compiler limits its versions of one code object: each session brings its own.
        code, scope = forward.__code__.replace(), forward.__globals__
        copy = FunctionType(code, scope, closure=forward.__closure__)
        # Freezing packs the weights for the CPU's GEMMs; fullgraph turns a silent fallback into an error.
        compiled = torch.compile(
            copy, fullgraph=True, options={"freezing": True} if device == "cpu" else None
        )

        def run(pixels: Tensor) -> tuple[Tensor, ...]:
            if len(pixels) > 1:  # one is always compiled by itself
                torch._dynamo.mark_dynamic(pixels, 0)
            outputs: tuple[Tensor, ...] = compiled(pixels)
            return outputs

        return run


def with_compiler(pytorch: Availability, what: str) -> Availability:
    """PyTorch's availability, unless ``what`` of it misses the C++ compiler that it calls."""
    compilers = (os.environ.get("CXX"), "g++", "clang++")
    if pytorch.ok and not any(name and shutil.which(name) for name in compilers):
        return Availability(False, f"{what} needs a C++ compiler", "install g++")
    return pytorch
