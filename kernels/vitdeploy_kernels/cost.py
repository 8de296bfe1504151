"""A plain model of what a launch takes; it orders candidates, chooses defaults and predicts numbers.

Its constants are assumptions, and it knows nothing of caches: read what it says as an expectation to hold
a measurement against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vitdeploy_kernels.launch import Launch, tiles
from vitdeploy_kernels.specs import Spec, flops, size, spec_of

EFFICIENCY = 0.85
"""Assumed share of the measured ceilings that a kernel reaches while it runs."""
GAP = 1.5e-6
"""Assumed seconds from the end of one kernel to the first instruction that counts of the next, in a graph."""
FILL = 1e-6
"""Assumed seconds from a program's first load to its first product, and from its last to the end."""
STEP = 0.15e-6
"""Assumed seconds that one step of a program's loop takes at least, however small its tile."""
BEST_INTENSITY = 128 * 256 / (128 + 256)
"""Products per element read of the largest tile, whose rate counts as 1."""


@dataclass(frozen=True)
class Chip:
    """A GPU and its two ceilings, both measured.

    Attributes:
        flops: per second, of a large float16 matrix product.
        bandwidth: bytes per second, of a large copy, read and written bytes counted.
    """

    name: str
    multiprocessors: int
    flops: float
    bandwidth: float


H200 = Chip("NVIDIA H200", 132, 788e12, 4.3e12)


@dataclass(frozen=True)
class Work:
    """What a launch must do.

    Attributes:
        flops: of its products.
        size: bytes that it must move.
        programs: of its grid.
        steps: of each program's loop, one after the other.
    """

    flops: int
    size: int
    programs: int
    steps: int


def work(launch: Launch) -> Work:
    """Of a launch, whose tensors may be meta tensors."""
    spec = spec_of(launch)
    return Work(flops(spec), size(launch), math.prod(launch.grid), _steps(spec, launch))


def _steps(spec: Spec, launch: Launch) -> int:
    """Tiles of keys, with two products each, or tiles of a product's depth."""

    def block(name: str) -> int:
        return int(launch.constants[name] or 1)

    if spec.kernel == "add_layernorm":
        return 1
    if spec.kernel in ("attention", "absorbed_attention"):
        return 2 * tiles(spec.shape[1], block("BLOCK_N"))
    if spec.kernel == "layernorm_attention":
        return 3 * tiles(spec.shape[2], block("BLOCK_K")) + 2
    return tiles(spec.shape[2], block("BLOCK_K"))


def floor(work: Work, chip: Chip) -> float:
    """Seconds that no version of the kernel beats: the larger of the two roofline terms."""
    return max(work.flops / chip.flops, work.size / chip.bandwidth)


def predict(work: Work, chip: Chip) -> float:
    """Seconds expected: the largest of three terms, and the gap to the next kernel.

    The terms are the two of the roofline over the efficiency, products in whole waves; and the steps of
    one program, which is what counts if there is little to do. A wave is one program on every
    multiprocessor: one that holds two computes each at half the rate, so that only the last, partly
    filled wave costs more than its share.
    """
    waves = tiles(work.programs, chip.multiprocessors) * chip.multiprocessors / work.programs
    products = work.flops / (chip.flops * EFFICIENCY) * waves
    memory = work.size / (chip.bandwidth * EFFICIENCY)
    return max(products, memory, FILL + work.steps * STEP) + GAP


def tile_share(block_m: int, block_n: int) -> float:
    """Estimated rate of a tile of a GEMM as a share of the largest one's: how often what it reads is used."""
    intensity = block_m * block_n / (block_m + block_n)
    return float(min(intensity / BEST_INTENSITY, 1.0) ** 0.8)


def relative_time(
    rows: int, columns: int, block_m: int, block_n: int, multiprocessors: int, products: int = 1
) -> float:
    """Relative time of a GEMM with these tiles: whole waves, each at its tile's rate.

    ``products`` of these are computed side by side.
    """
    programs = products * tiles(rows, block_m) * tiles(columns, block_n)
    return tiles(programs, multiprocessors) * block_m * block_n / tile_share(block_m, block_n)
