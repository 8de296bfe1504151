"""A model of what a launch takes.

What it says is a prediction, to be held against a measurement. A program is followed through its life (start,
loop, what comes after the product), programs through the waves in which a multiprocessor takes them, and the
launch ends with the gap to the next one. Its constants come from published measurements, each named where it
stands; :data:`kernel_tools.calibration.PUBLISHED` has the numbers that the whole is held against.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vitdeploy_kernels.launch import Launch, power_of_two, tiles
from vitdeploy_kernels.occupancy import LIMITS, PARTITIONS, programs_per_multiprocessor
from vitdeploy_kernels.specs import Spec, flops, size, spec_of

LOOP = 0.85
"""Assumed share of the matrix ceiling in a loop with copies through pointers and one product under way."""
ISSUE = 0.8
"""Assumed share of the issue slots that code outside of the loop fills."""
MEMORY = 0.9
"""Assumed share of the copy ceiling that a kernel reaches whose arithmetic does not count."""
SPECIAL_LANES = 16
"""Exponentials that a multiprocessor begins in a cycle (CUDA C++ Programming Guide, "Arithmetic
Instructions", https://docs.nvidia.com/cuda/cuda-c-programming-guide/#arithmetic-instructions)."""
LEAST_STEP = 0.15e-6
"""Assumed seconds that one step of a loop takes at least, however small its tile."""
BYTES_PER_CYCLE = 64
"""What one multiprocessor can take from the L2 cache in a cycle."""


@dataclass(frozen=True)
class Chip:
    """A GPU and its ceilings.

    Attributes:
        flops: per second, of a large float16 matrix product.
        bandwidth: bytes per second, of a large copy, read and written bytes counted.
        cache_bandwidth: bytes per second that all multiprocessors together take from the L2 cache.
        clock: cycles per second while the tensor cores are busy.
        memory_trip: seconds from a load to its value, from memory.
        cache_trip: the same from the L2 cache.
        gap: seconds from the end of one kernel to the first instruction of the next, in a CUDA graph.
        capability: whose limits say how many programs fit on a multiprocessor.

    The defaults are Hopper's. L2 bandwidth: 9.7 TB/s between 20 and 40 MB on an H200
    (https://github.com/te42kyfo/gpu-benches, ``gpu-l2-cache/h200.txt``). Latencies: 650 cycles from memory,
    265 to 475 from the two halves of the L2 cache, at 1755 MHz, on an H100 PCIe (same place,
    ``gpu-latency/h100_pcie.txt``). Gap: an addition of 1024 numbers takes 1.1 to 1.3 µs in a graph of 2000,
    start and round trip included (https://github.com/pytorch/pytorch/issues/161104, GPU not named).
    """

    name: str
    multiprocessors: int
    flops: float
    bandwidth: float
    cache_bandwidth: float = 9.7e12
    clock: float = 1.755e9
    memory_trip: float = 650 / 1.755e9
    cache_trip: float = 370 / 1.755e9
    gap: float = 0.8e-6
    capability: tuple[int, int] = (9, 0)

    @property
    def slots(self) -> float:
        """Instructions of warps that a multiprocessor can begin in a second."""
        return PARTITIONS * self.clock


H200 = Chip("NVIDIA H200", 132, 788e12, 4.3e12)
"""Both ceilings were measured on one, with random numbers."""


@dataclass(frozen=True)
class Code:
    """Instructions of one warp outside of the loop, read from the machine code for sm_90.

    Attributes:
        before: until the first product, whatever the tile.
        fixed: after the last one, whatever the tile.
        element: after the last one, for each element of the tile that a thread has.
        loaded: until the first product, for each such element.
    """

    before: int
    fixed: int
    element: float
    loaded: float = 0.0


CODE: Mapping[str, Code] = {
    "layernorm_linear": Code(250, 40, 4.2),
    "linear_residual": Code(250, 55, 6.0, 3.4),
    "patch_embed": Code(400, 55, 10.7),
    "head_linear": Code(140, 20, 2.5),
    "attention": Code(140, 150, 0.0),
    "layernorm_attention": Code(250, 150, 0.0),
    "absorbed_attention": Code(290, 180, 0.0),
    "add_layernorm": Code(60, 40, 12.0),
}
"""Of each kernel; ``linear_residual`` loads what it adds to before it multiplies."""
ACTIVATIONS: Mapping[str, float] = {
    "none": 0.0,
    "relu": 1.0,
    "silu": 6.0,
    "quick_gelu": 6.0,
    "gelu_tanh": 9.0,
    "gelu": 9.1,
}
"""Instructions that an activation adds for each element."""
STATISTICS = 36.0
"""Instructions for each part of a row's statistics that a thread reads."""
SOFTMAX = 5.1
"""Instructions of one step of attention for each score of a thread, its two products included."""
ABSORBED_STEP = 520
"""Instructions of one warp for one step of ``absorbed_attention``."""
PART = 64
"""Columns that ``patch_embed`` finishes at a time; each part begins with a load."""


@dataclass(frozen=True)
class Work:
    """What a launch must do, and how its programs do it.

    Attributes:
        flops: of its products.
        size: bytes that it must move.
        programs: of its grid.
        steps: of each program's loop, one after the other.
        step_flops: of one program's step, what is computed on padding included.
        step_bytes: that the step loads.
        step_instructions: of all warps of a program in a step, other than products and copies.
        step_specials: exponentials of a step.
        step_trips: round trips to the cache that a step waits for.
        before: instructions of all warps of a program until the first product.
        after: instructions of all its warps after the last one.
        trips: round trips to the memory before and after the loop, one after another, without the first.
        ahead: steps whose loads are under way at a time.
        resident: programs that fit on a multiprocessor at a time.
    """

    flops: int
    size: int
    programs: int
    steps: int
    step_flops: int = 0
    step_bytes: int = 0
    step_instructions: int = 0
    step_specials: int = 0
    step_trips: int = 0
    before: int = 0
    after: int = 0
    trips: int = 0
    ahead: int = 1
    resident: int = 1


def work(launch: Launch, capability: tuple[int, int] = (9, 0)) -> Work:
    """Of a launch, whose tensors may be meta tensors."""
    spec = spec_of(launch)
    of = {
        "add_layernorm": _norm_work,
        "attention": _attention_work,
        "layernorm_attention": _layernorm_attention_work,
        "absorbed_attention": _absorbed_work,
    }.get(spec.kernel, _gemm_work)
    return of(spec, launch, capability)


def _block(launch: Launch, name: str) -> int:
    return int(launch.constants[f"BLOCK_{name}"] or 1)


def _resident(capability: tuple[int, int], registers: int, shared: int, warps: int) -> int:
    nearest = max((each for each in LIMITS if each <= capability), default=min(LIMITS))
    found = programs_per_multiprocessor(nearest, registers=min(registers, 255), shared=shared, warps=warps)
    return max(found, 1)


def _gemm_work(spec: Spec, launch: Launch, capability: tuple[int, int]) -> Work:
    m, n, k = (_block(launch, name) for name in "MNK")
    steps, warps, code = tiles(spec.shape[2], k), launch.warps, CODE[spec.kernel]
    elements = m * n / (32 * warps)
    pixel = 4 if spec.kernel == "patch_embed" and not spec.number("nhwc") else 2
    step_bytes = k * (pixel * m + 2 * n)
    before, after, trips = code.before + code.loaded * elements, code.fixed + code.element * elements, 0
    if spec.kernel == "layernorm_linear":
        after += ACTIVATIONS[str(dict(spec.options)["activation"])] * elements
        after += STATISTICS * m * int(launch.constants["TILES_BLOCK"] or 1) / (32 * warps)
        trips = 1  # for the statistics
    elif spec.kernel == "linear_residual":
        trips = 1  # for what it adds to
    elif spec.kernel == "patch_embed":
        trips = tiles(n, PART)
    return Work(
        flops(spec),
        size(launch),
        math.prod(launch.grid),
        steps,
        step_flops=2 * m * n * k,
        step_bytes=step_bytes,
        before=round(warps * before),
        after=round(warps * after),
        trips=trips,
        ahead=max(launch.stages - 1, 1),
        resident=_resident(
            capability, round(elements) + 90, min(launch.stages, steps) * step_bytes, launch.warps
        ),
    )


def _attention_work(spec: Spec, launch: Launch, capability: tuple[int, int]) -> Work:
    """A step is a tile of keys with its two products; the last one, of what is left over, counts in part."""
    _, tokens, width = spec.shape
    m, n, warps, code = _block(launch, "M"), _block(launch, "N"), launch.warps, CODE[spec.kernel]
    columns, steps = power_of_two(width, 16), tiles(tokens, n)
    whole, rest = divmod(tokens, n)
    # Of the last tile only a power of two is computed.
    share = (whole * n + (power_of_two(rest, 16) if rest else 0)) / (steps * n)
    scores = m * n * share
    return Work(
        flops(spec),
        size(launch),
        math.prod(launch.grid),
        steps,
        step_flops=round(4 * scores * columns),
        step_bytes=round(4 * n * share * columns),
        step_instructions=round(SOFTMAX * scores / 32),
        step_specials=round(scores),
        before=warps * code.before,
        after=warps * code.fixed,
        ahead=max(launch.stages - 1, 1),
        resident=_resident(
            capability,
            m * (n + columns) // (32 * warps) + 44,
            2 * columns * (m + 2 * launch.stages * n),
            warps,
        ),
    )


def _layernorm_attention_work(spec: Spec, launch: Launch, capability: tuple[int, int]) -> Work:
    """Every head projects its queries, keys and values of the whole image before it attends to them."""
    (_, tokens, width), warps = spec.shape, launch.warps
    m, k, code = _block(launch, "M"), _block(launch, "K"), CODE[spec.kernel]
    columns, steps = power_of_two(width // spec.number("heads"), 16), 3 * tiles(width, k) * tiles(tokens, m)
    step_bytes = 2 * k * (m + columns)
    scores = tokens * tokens
    return Work(
        flops(spec),
        size(launch),
        math.prod(launch.grid),
        steps,
        step_flops=2 * m * k * columns + 4 * scores * columns // steps,
        step_bytes=step_bytes,
        step_instructions=round(SOFTMAX * scores / 32 / steps),
        step_specials=scores // steps,
        before=warps * code.before,
        after=warps * code.fixed,
        trips=2,
        ahead=max(launch.stages - 1, 1),
        resident=_resident(
            capability,
            200,
            4 * power_of_two(tokens, 16) * columns + launch.stages * step_bytes,
            warps,
        ),
    )


def _absorbed_work(spec: Spec, launch: Launch, capability: tuple[int, int]) -> Work:
    """A step normalises a few tokens, whose statistics it waits for, and multiplies them twice."""
    (_, tokens, width), warps, code = spec.shape, launch.warps, CODE[spec.kernel]
    m, n = _block(launch, "M"), _block(launch, "N")
    return Work(
        flops(spec),
        size(launch),
        math.prod(launch.grid),
        tiles(tokens, n),
        step_flops=4 * m * n * power_of_two(width, 16),
        step_bytes=2 * n * width,
        step_instructions=ABSORBED_STEP * warps,
        step_trips=1,
        before=warps * code.before,
        after=warps * code.fixed,
        trips=1,
        ahead=max(launch.stages - 1, 1),
        resident=_resident(capability, 140, 2 * width * (m + n * launch.stages), warps),
    )


def _norm_work(spec: Spec, launch: Launch, capability: tuple[int, int]) -> Work:
    rows, width = spec.shape
    warps, code = launch.warps, CODE[spec.kernel]
    elements = _block(launch, "M") * power_of_two(width) / (32 * warps)
    return Work(
        flops(spec),
        size(launch),
        math.prod(launch.grid),
        1,
        step_bytes=size(launch) // max(rows, 1) * _block(launch, "M"),
        before=warps * code.before,
        after=round(warps * (code.fixed + code.element * elements)),
        resident=_resident(capability, round(elements) + 24, 4096, warps),
    )


def floor(work: Work, chip: Chip) -> float:
    """Seconds that no version of the kernel beats: the larger of the two roofline terms."""
    return max(work.flops / chip.flops, work.size / chip.bandwidth)


@dataclass(frozen=True)
class Terms:
    """What a predicted time is made of, in seconds.

    Attributes:
        programs: until the busiest multiprocessor has done its share.
        memory: until everything has been moved.
        gap: to the next kernel.
        bound: what a step of the loop waits for: ``products``, ``cache``, ``latency`` or ``steps``; or
            ``memory``, if that is what the launch waits for.
    """

    programs: float
    memory: float
    gap: float
    bound: str

    @property
    def seconds(self) -> float:
        return max(self.programs, self.memory) + self.gap


def terms(work: Work, chip: Chip, *, loop: float = LOOP, apart: bool = True) -> Terms:
    """Predict a launch.

    A program that has a multiprocessor for itself takes its start, its loop, what follows and its round trips
    one after the other; several on one overlap, the loop of one with the end of another.

    Args:
        loop: share of the matrix ceiling that a loop reaches.
        apart: whether a program begins when another has ended, and not while that is still writing, as those
            of a persistent kernel with warps of their own for the loads do.
    """
    resident = min(work.resident, tiles(work.programs, chip.multiprocessors))
    busy = min(work.programs, chip.multiprocessors)
    taken = min(chip.cache_bandwidth / busy, BYTES_PER_CYCLE * chip.clock)
    products = work.step_flops / (chip.flops / chip.multiprocessors) / loop
    arithmetic = work.step_instructions / (chip.slots * ISSUE) + work.step_specials / (
        SPECIAL_LANES * chip.clock
    )
    transfer = work.step_bytes / taken
    waits = {
        "products": products + arithmetic,
        "cache": transfer,
        "latency": (chip.memory_trip + transfer) / work.ahead,
        "steps": LEAST_STEP,
    }
    bound = max(waits, key=lambda name: waits[name])
    step = waits[bound] + work.step_trips * chip.cache_trip
    outside = (work.before + work.after) / (chip.slots * ISSUE)
    alone = chip.memory_trip + transfer + outside + work.steps * step + work.trips * chip.memory_trip
    loops = work.steps * max(products + arithmetic, transfer)
    shared = max(loops, work.steps * arithmetic + outside)
    each = tiles(work.programs, chip.multiprocessors)
    if apart:
        programs = max(tiles(each, resident) * alone, each * shared + max(alone - shared, 0.0))
    else:
        programs = each * loops
    memory = chip.memory_trip + work.size / (chip.bandwidth * MEMORY)
    return Terms(programs, memory, chip.gap, "memory" if memory > programs else bound)


def predict(work: Work, chip: Chip) -> float:
    """Seconds from the launch of a kernel to that of the next: see :func:`terms`."""
    return terms(work, chip).seconds
