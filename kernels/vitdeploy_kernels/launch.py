"""A kernel launch as data: the same launch is run, captured, or compiled for a GPU that is not here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

Constant: TypeAlias = int | float | bool | str | None


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel.

    Attributes:
        kernel: what ``@triton.jit`` made.
        grid: programs along each axis.
        arguments: what the kernel is given at run time, by parameter name. Meta tensors will do for a
            launch that is only compiled.
        constants: the kernel's ``tl.constexpr`` parameters by name; a pointer that is None is one too.
        warps: of 32 threads, per program.
        stages: depth of the software pipeline.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Tensor | int | float]
    constants: Mapping[str, Constant]
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    @property
    def options(self) -> dict[str, int | bool]:
        """Of the compiler. Fused multiply-add is asked for because its default changes with Triton 3.10."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Queue the launch on the current stream of its tensors' device (compiling it the first time)."""
        device = next(value.device for value in self.arguments.values() if isinstance(value, Tensor))
        parameters = {**self.arguments, **self.constants, **self.options}
        if device.type == "cuda":
            with torch.cuda.device(device):
                self.kernel[self.grid](**parameters)
        else:
            self.kernel[self.grid](**parameters)


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``size`` and at least ``least``."""
    return max(1 << max(size - 1, 0).bit_length(), least)


def tiles(size: int, block: int) -> int:
    """How many blocks cover ``size``."""
    return -(-size // block)
