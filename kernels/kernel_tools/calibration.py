"""Published measurements that the cost model is held against, each with where it stands.

Nothing here was measured by this project. What a source calls its GPU is taken as it says; where its clocks
are not known, one kernel is compared with another of the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from kernel_tools.cost import CODE, H200, LOOP, MEMORY, SOFTMAX, Chip, Work, terms
from vitdeploy_kernels.launch import tiles

BAND = 0.15
"""How far the model may be from any of these, as a share of it."""
CUBLAS = 0.9
"""Assumed share of the matrix ceiling in cuBLAS's loop: 716 TFLOP/s at 4096 cubed of 795 at 8192 cubed, on an
H100 (https://github.com/pranjalssh/fast.cu, README)."""

H100 = replace(H200, name="NVIDIA H100 SXM", bandwidth=3.35e12 * MEMORY)
"""The H200's processor with less memory: the data sheet's 3.35 TB/s, of which a copy reaches what it can."""
H100_PCIE = Chip("NVIDIA H100 PCIe", 114, 756e12 * 788 / 989.5, 1.97e12, 6.9e12, clock=1.395e9)
"""The data sheet's 756 TFLOP/s, of which as much is reached as on an H200; memory, L2 cache: gpu-benches; the
clock under load: https://chipsandcheese.com/p/nvidias-h100-funny-l2-and-tons-of-bandwidth."""


@dataclass(frozen=True)
class Published:
    """One measurement.

    Attributes:
        what: was measured, on what.
        source: its address.
        value: as published, or the quotient of two published values.
        unit: of the value.
        predict: what the model says, in the same unit.
    """

    what: str
    source: str
    value: float
    unit: str
    predict: Callable[[], float]

    @property
    def off(self) -> float:
        """How much more the model says, as a share of what was measured."""
        return self.predict() / self.value - 1


def gemm(rows: int, columns: int, depth: int) -> Work:
    """A plain product with tiles of 128 x 256 x 64, eight warps, three stages, float16."""
    code, warps, elements = CODE["layernorm_linear"], 8, 128
    return Work(
        2 * rows * columns * depth,
        2 * (rows * depth + depth * columns + rows * columns),
        tiles(rows, 128) * tiles(columns, 256),
        tiles(depth, 64),
        step_flops=2 * 128 * 256 * 64,
        step_bytes=2 * 64 * (128 + 256),
        before=warps * code.before,
        after=round(warps * (code.fixed + code.element * elements)),
        ahead=2,
    )


def attention(groups: int, tokens: int) -> Work:
    """Triton's tutorial: tiles of 128 queries and 64 keys of 64 columns, four warps, three stages."""
    code, warps, scores = CODE["attention"], 4, 128 * 64
    return Work(
        4 * groups * tokens**2 * 64,
        8 * groups * tokens * 64,
        groups * tiles(tokens, 128),
        tiles(tokens, 64),
        step_flops=4 * scores * 64,
        step_bytes=4 * 64 * 64,
        step_instructions=round(SOFTMAX * scores / 32),
        step_specials=scores,
        before=warps * code.before,
        after=warps * code.fixed,
        ahead=2,
        resident=2,
    )


def rate(work: Work, chip: Chip, loop: float, apart: bool) -> float:
    """TFLOP/s, without the gap to the next kernel."""
    told = terms(work, chip, loop=loop, apart=apart)
    return work.flops / (told.seconds - told.gap) / 1e12


def of_cublas(work: Work, loop: float, apart: bool) -> float:
    """Share of cuBLAS's rate."""
    return rate(work, H100, loop, apart) / rate(work, H100, CUBLAS, False)


ADDITION = Work(0, 12 * 1024, 8, 1, step_bytes=1024, before=4 * 40, after=4 * 20, resident=16)
"""Of 1024 float32 numbers, from the L2 cache."""
SHORT, MEDIUM = gemm(8192, 8192, 512), gemm(65536, 1024, 1024)

PUBLISHED = (
    Published(
        "plain Triton product, 8192×8192×512, H100, to cuBLAS",
        "https://github.com/triton-lang/triton/pull/5726",
        217.548 / 285.369,
        "share",
        lambda: of_cublas(SHORT, LOOP, True),
    ),
    Published(
        "persistent Triton product with descriptors, 8192×8192×512, H100, to cuBLAS",
        "https://github.com/triton-lang/triton/pull/5726",
        262.312 / 285.369,
        "share",
        lambda: of_cublas(SHORT, LOOP, False),
    ),
    Published(
        "Triton product with specialised warps, 65536×1024×1024, H100, to cuBLAS",
        "https://github.com/facebookexperimental/triton/pull/1038",
        502.335 / 583.318,
        "share",
        lambda: of_cublas(MEDIUM, CUBLAS, True),
    ),
    Published(
        "the same, persistent, to cuBLAS",
        "https://github.com/facebookexperimental/triton/pull/1038",
        564.311 / 584.429,
        "share",
        lambda: of_cublas(MEDIUM, CUBLAS, False),
    ),
    Published(
        "cuBLAS, 4096 cubed, H100",
        "https://github.com/pranjalssh/fast.cu",
        716.0,
        "TFLOP/s",
        lambda: rate(gemm(4096, 4096, 4096), H100, CUBLAS, False),
    ),
    Published(
        "cuBLAS, 8192 cubed, H100",
        "https://github.com/pranjalssh/fast.cu",
        795.0,
        "TFLOP/s",
        lambda: rate(gemm(8192, 8192, 8192), H100, CUBLAS, False),
    ),
    Published(
        "cuBLAS, 2048×4096×4096, H100",
        "https://github.com/triton-lang/triton/issues/2339",
        613.742,
        "TFLOP/s",
        lambda: rate(gemm(2048, 4096, 4096), H100, CUBLAS, False),
    ),
    Published(
        "cuBLAS, 2048×8192×8192, H100",
        "https://github.com/triton-lang/triton/issues/2339",
        721.601,
        "TFLOP/s",
        lambda: rate(gemm(2048, 8192, 8192), H100, CUBLAS, False),
    ),
    Published(
        "Triton attention, 512 heads, 1024 tokens, 64 columns, H100 PCIe",
        "https://github.com/Dao-AILab/flash-attention/issues/1777",
        230.0,
        "TFLOP/s",
        lambda: rate(attention(512, 1024), H100_PCIE, LOOP, True),
    ),
    Published(
        "addition of 1024 numbers in a graph of 2000 nodes",
        "https://github.com/pytorch/pytorch/issues/161104",
        1.2,
        "µs",
        lambda: 1e6 * terms(ADDITION, replace(H200, memory_trip=H200.cache_trip)).seconds,
    ),
    Published(
        "reading 4.9 GB, H200",
        "https://github.com/te42kyfo/gpu-benches",
        3.888,
        "TB/s",
        lambda: 4.9e9 / terms(Work(0, 4_900_000_000, 10**5, 1, resident=8), H200).memory / 1e12,
    ),
)
