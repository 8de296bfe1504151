"""The configurations that a tuner tries: few, the most promising first, none that could not be launched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import product

from vitdeploy_kernels.absorbed import column_block
from vitdeploy_kernels.config import Config
from vitdeploy_kernels.launch import power_of_two, tiles
from vitdeploy_kernels.occupancy import LIMITS
from vitdeploy_kernels.specs import Spec

REGISTERS = 128
"""The most accumulators per thread: the rest of 255 registers is needed for everything else."""
BEST_INTENSITY = 128 * 256 / (128 + 256)
"""Products per element read of the largest tile, whose rate counts as 1."""


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


def candidates(
    spec: Spec, capability: tuple[int, int], multiprocessors: int, limit: int = 12
) -> tuple[Config, ...]:
    """At most ``limit`` configurations, the most promising first.

    Args:
        spec: what is tuned.
        capability: of the GPU.
        multiprocessors: of the GPU.
        limit: each costs a compilation.
    """
    known = [each for each in LIMITS if each <= capability]
    memory = LIMITS[max(known)].shared_per_program
    found = [
        config
        for config in SPACES[spec.kernel](spec, capability, multiprocessors)
        if shared_memory(spec, config) <= memory
    ]
    return tuple(dict.fromkeys(found))[:limit]


def shared_memory(spec: Spec, config: Config) -> int:
    """Bytes of shared memory that a program will hardly exceed: the buffers of its pipeline."""
    if spec.kernel == "add_layernorm":
        return 0
    if spec.kernel == "attention":
        width = power_of_two(spec.shape[2], 16)
        return 2 * width * (config.block_m + 2 * config.stages * config.block_n)
    if spec.kernel == "layernorm_attention":
        width = power_of_two(spec.shape[2] // spec.number("heads"), 16)
        tokens = power_of_two(spec.shape[1], 16)
        step = config.block_k * (config.block_m + width)
        return 2 * (2 * tokens * width + config.stages * step)
    if spec.kernel == "absorbed_attention":
        block = column_block(spec.shape[2])
        width = tiles(spec.shape[2], block) * block
        waiting = config.block_n * config.stages if config.stages > 1 else 0
        return 2 * width * max(config.block_m, waiting) + 2 * config.block_n * (width + block) + 2048
    pixel = 4 if spec.kernel == "patch_embed" and not spec.number("nhwc") else 2
    step = config.block_k * (pixel * config.block_m + 2 * config.block_n)
    return config.stages * step


def _gemm(spec: Spec, capability: tuple[int, int], multiprocessors: int) -> Iterable[Config]:
    """The six best tiles by :func:`relative_time`, each with two pipelines."""
    rows, columns, _ = spec.shape
    products = spec.number("heads") if spec.kernel == "head_linear" else 1
    heights = [m for m in (16, 32, 64, 128, 256) if m <= power_of_two(rows, 16)]
    widths = [n for n in (16, 32, 64, 128, 256) if n <= power_of_two(columns, 16)]
    fitting = [(m, n) for m, n in product(heights, widths) if m * n <= REGISTERS * 32 * 8]

    def time(tile: tuple[int, int]) -> float:
        return relative_time(rows, columns, *tile, multiprocessors, products)

    large_memory = LIMITS[max(each for each in LIMITS if each <= capability)].shared > 128 * 1024
    best = sorted(fitting, key=time)[:6]
    for variant in (0, 1):
        for m, n in best:
            few = m * n < 64 * 64
            deep = (128, 64) if few else (64, 32) if large_memory else (32, 64)
            stages = (3, 4) if capability >= (9, 0) or few else (4, 2)
            warps = 8 if m * n >= 128 * 128 else 4
            yield Config(m, n, deep[variant], 8, warps, stages[variant])
        if variant == 0:
            yield from (Config(m, n, 64, 8, 4, 3) for m, n in best if m * n == 128 * 128)


def _attention(spec: Spec, capability: tuple[int, int], multiprocessors: int) -> Iterable[Config]:
    shapes = ((64, 64, 4), (128, 64, 8), (128, 64, 4), (64, 32, 4), (128, 128, 8), (64, 128, 4), (32, 64, 2))
    for stages in (2, 3):
        for queries, keys, warps in shapes:
            yield Config(queries, keys, 16, 1, warps, stages)


def _add_layernorm(spec: Spec, capability: tuple[int, int], multiprocessors: int) -> Iterable[Config]:
    """8, 16 or 4 elements per thread, and one to sixteen rows per program."""
    block = power_of_two(spec.shape[1])
    for each in (8, 16, 4):
        for rows in (1, 2, 4, 8, 16):
            warps = rows * block // (32 * each)
            if 1 <= warps <= 16:
                yield Config(rows, block, 16, 1, warps, 1)


def _layernorm_attention(spec: Spec, capability: tuple[int, int], multiprocessors: int) -> Iterable[Config]:
    for (queries, warps), depth, stages in product(((128, 8), (32, 8), (64, 8)), (32, 64), (1, 2)):
        yield Config(queries, 64, depth, 1, warps, stages)


def _absorbed_attention(spec: Spec, capability: tuple[int, int], multiprocessors: int) -> Iterable[Config]:
    rows = 16 if spec.number("rows") <= 16 else 32
    for tokens, warps, stages in product((16, 32, 64), (8, 4), (2, 3, 1)):
        yield Config(rows, tokens, 16, warps, warps, stages)


SPACES: Mapping[str, Callable[[Spec, tuple[int, int], int], Iterable[Config]]] = {
    "layernorm_linear": _gemm,
    "linear_residual": _gemm,
    "patch_embed": _gemm,
    "head_linear": _gemm,
    "attention": _attention,
    "add_layernorm": _add_layernorm,
    "layernorm_attention": _layernorm_attention,
    "absorbed_attention": _absorbed_attention,
}
"""The search space of each kernel, before what does not fit is left out."""
