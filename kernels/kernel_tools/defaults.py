"""Write the default tables ``vitdeploy_kernels/configs/sm_*.json``: choices by static evidence, not measured.

A GEMM takes the tile that needs the least time if every program ran at its tile's share of the best rate:
few rows are spread over all multiprocessors by small tiles, many rows take the largest. What is listed here
compiles without spilling registers for its architecture, or spills a few where the compiler stops at 128 so
that two programs fit on a multiprocessor.

    python kernels/kernel_tools/defaults.py            # writes the tables
    python kernels/kernel_tools/defaults.py --check    # exits 1 if they are not what this script writes
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

KERNELS = Path(__file__).parents[1]
sys.path.insert(0, str(KERNELS))

from vitdeploy_kernels.candidates import relative_time  # noqa: E402
from vitdeploy_kernels.config import Config, Entry, Table, format_table  # noqa: E402
from vitdeploy_kernels.launch import power_of_two  # noqa: E402


@dataclass(frozen=True)
class Tile:
    """A tile of a GEMM."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Architecture:
    """What the choices depend on; multiprocessors are those of the data-centre or largest card."""

    name: str
    multiprocessors: int
    tiles: tuple[Tile, ...]
    attention: tuple[int, int, int, int]
    """Queries, keys, warps, stages."""
    activated: int
    """Columns of the widest tile that layernorm_linear finishes without spilling, activation included."""
    queries: int
    """Rows of a tile of layernorm_attention that spills little or nothing."""
    small_memory: bool
    """100 KB of shared memory."""


SMALL = (Tile(16, 64, 128, 4, 3), Tile(16, 32, 128, 4, 3), Tile(16, 16, 128, 4, 3))
"""For a few rows: what counts is how many multiprocessors read the weights."""

HOPPER = (
    Tile(128, 256, 64, 8, 3),
    Tile(128, 128, 64, 8, 3),
    Tile(64, 128, 64, 4, 4),
    Tile(64, 64, 64, 4, 6),
    Tile(64, 32, 128, 4, 6),
    *(replace(tile, stages=6) for tile in SMALL),
)
"""With 228 KB of shared memory: a program that has a multiprocessor to itself asks far ahead."""

AMPERE = (
    Tile(128, 256, 32, 8, 3),
    Tile(128, 128, 32, 8, 4),
    Tile(64, 128, 32, 4, 4),
    Tile(64, 64, 64, 4, 3),
    Tile(32, 64, 64, 4, 3),
    *SMALL,
)

ADA = AMPERE[1:]

ARCHITECTURES = (
    Architecture("sm_80", 108, AMPERE, (64, 64, 4, 3), 128, 32, False),
    Architecture("sm_89", 142, ADA, (64, 64, 4, 2), 256, 32, True),
    Architecture("sm_90", 132, HOPPER, (64, 64, 4, 2), 256, 128, False),
    Architecture("sm_100", 148, HOPPER, (64, 64, 4, 2), 128, 128, False),
    Architecture("sm_120", 170, ADA, (64, 64, 4, 2), 256, 32, True),
)

WIDTHS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
"""Widths and heads of ViT-Ti, S, B, L and H."""
TOKENS = (50, 197, 257, 577)
BATCHES = (1, 8, 64, 256)
ROWS = (1, 8, 64, 197, 788, 1576, 6304, 12608, 50432)
"""Read tokens alone, and 197 tokens of 1, 4, 8, 32, 64 and 256 images."""
CLASSES = 1000
PIXELS = (588, 768)
"""Of a patch of 14 by 14 and 16 by 16, three channels."""


def gemm(arch: Architecture, rows: int, columns: int, products: int = 1, widest: int = 256) -> Config:
    """The tile that finishes first; ``products`` of this shape are computed side by side."""

    def time(tile: Tile) -> float:
        return relative_time(rows, columns, tile.rows, tile.columns, arch.multiprocessors, products)

    fitting = [tile for tile in arch.tiles if tile.rows <= power_of_two(rows, 16) and tile.columns <= widest]
    tile = min(fitting, key=time)
    return Config(tile.rows, tile.columns, tile.depth, 8, tile.warps, tile.stages)


def layernorm_linear(arch: Architecture) -> Iterable[Entry]:
    for width in WIDTHS:
        for columns in (width, 3 * width, 4 * width, CLASSES):
            for rows in ROWS:
                yield Entry((rows, columns, width), gemm(arch, rows, columns, widest=arch.activated))


def linear_residual(arch: Architecture) -> Iterable[Entry]:
    for width in WIDTHS:
        for depth in (width, 4 * width):
            for rows in ROWS:
                yield Entry((rows, width, depth), gemm(arch, rows, width))


def patch_embed(arch: Architecture) -> Iterable[Entry]:
    """Pixels may have four bytes: fewer stages of them fit."""
    for width in WIDTHS:
        for depth in PIXELS:
            for rows in ROWS[3:]:
                config = gemm(arch, rows, width)
                yield Entry((rows, width, depth), replace(config, stages=min(config.stages, 4)))


def head_linear(arch: Architecture) -> Iterable[Entry]:
    for width, heads in WIDTHS.items():
        for columns, depth in ((width, width // heads), (width // heads, width)):
            for rows in BATCHES:
                yield Entry((rows, columns, depth), gemm(arch, rows, columns, heads))


def attention(arch: Architecture) -> Iterable[Entry]:
    queries, keys, warps, stages = arch.attention
    for head_width in (32, 64, 80, 128):
        for tokens in TOKENS:
            yield Entry((12 * 64, tokens, head_width), Config(queries, keys, 16, 1, warps, stages))


def add_layernorm(arch: Architecture) -> Iterable[Entry]:
    """Eight elements per thread, 16 bytes; narrow rows share a program."""
    for width in WIDTHS:
        block = power_of_two(width)
        rows = max(1024 // block, 1)
        yield Entry((12608, width), Config(rows, block, 16, 1, max(rows * block // 256, 1), 1))


def layernorm_attention(arch: Architecture) -> Iterable[Entry]:
    """The pair of kernels until a measurement says otherwise: every head's program reads its whole image."""
    for width, heads in WIDTHS.items():
        for tokens in (50, 197):
            yield Entry((64 * heads, tokens, width), Config(arch.queries, 64, 32, 1, 8, 2), "pair")


def absorbed_attention(arch: Architecture) -> Iterable[Entry]:
    for width in WIDTHS:
        stages = 1 if arch.small_memory and width >= 1024 else 2
        for batch in BATCHES:
            yield Entry((batch, 197, width), Config(16, 16, 16, 8, 8, stages))


CHOICES: dict[str, Callable[[Architecture], Iterable[Entry]]] = {
    "layernorm_linear": layernorm_linear,
    "linear_residual": linear_residual,
    "patch_embed": patch_embed,
    "head_linear": head_linear,
    "attention": attention,
    "add_layernorm": add_layernorm,
    "layernorm_attention": layernorm_attention,
    "absorbed_attention": absorbed_attention,
}


def table(arch: Architecture) -> Table:
    """The default table of an architecture."""
    kernels = {name: tuple(dict.fromkeys(choose(arch))) for name, choose in CHOICES.items()}
    return Table(arch.name, False, kernels, {})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table is stale")
    check = parser.parse_args().check
    stale = []
    for arch in ARCHITECTURES:
        path = KERNELS / "vitdeploy_kernels" / "configs" / f"{arch.name}.json"
        text = format_table(table(arch))
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
            if not check:
                path.write_text(text, encoding="utf-8")
    if stale:
        print(("stale: " if check else "wrote ") + ", ".join(stale))
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
