"""What a multiprocessor of each compute capability holds, and how many programs of a kernel fit into it.

Source of the numbers: CUDA C++ Programming Guide, "Compute Capabilities", the table of technical
specifications per compute capability
(https://docs.nvidia.com/cuda/cuda-c-programming-guide/#compute-capabilities); tensor memory: PTX ISA,
"Tensor Memory" (https://docs.nvidia.com/cuda/parallel-thread-execution/#tensor-memory).
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
REGISTERS = 64 * KIB
"""32-bit registers of a multiprocessor, the same for every capability here."""
REGISTER_UNIT = 256
"""Registers are given to a warp in multiples of this."""
PARTITIONS = 4
"""A multiprocessor's warps and registers are split between this many schedulers."""
RESERVED_SHARED = KIB
"""Shared memory that the system takes from every program."""
SHARED_UNIT = 128
"""Shared memory is given to a program in multiples of this."""
TENSOR_COLUMNS = 512
"""Columns of tensor memory, where there is any."""


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor.

    Attributes:
        warps: resident at a time.
        programs: resident at a time.
        shared: bytes of shared memory.
    """

    warps: int
    programs: int
    shared: int

    @property
    def shared_per_program(self) -> int:
        """The most that one program can have."""
        return self.shared - RESERVED_SHARED


LIMITS = {
    (8, 0): Limits(64, 32, 164 * KIB),
    (8, 6): Limits(48, 16, 100 * KIB),
    (8, 7): Limits(48, 16, 164 * KIB),
    (8, 9): Limits(48, 24, 100 * KIB),
    (9, 0): Limits(64, 32, 228 * KIB),
    (10, 0): Limits(64, 32, 228 * KIB),
    (12, 0): Limits(48, 24, 100 * KIB),
}


def programs_per_multiprocessor(
    capability: tuple[int, int], *, registers: int, shared: int, warps: int, tensor_columns: int = 0
) -> int:
    """How many programs of a kernel run on one multiprocessor at a time; 0 if not even one fits.

    Args:
        capability: of :data:`LIMITS`.
        registers: per thread.
        shared: bytes of shared memory per program.
        warps: per program.
        tensor_columns: of tensor memory per program.
    """
    limits = LIMITS[capability]
    if shared > limits.shared_per_program:
        return 0
    # Warps are placed in groups of one per scheduler.
    spread = _round_up(warps, PARTITIONS)
    per_warp = _round_up(max(registers, 1) * 32, REGISTER_UNIT)
    by_registers = REGISTERS // PARTITIONS // per_warp * PARTITIONS // spread
    by_shared = limits.shared // _round_up(shared + RESERVED_SHARED, SHARED_UNIT)
    by_tensor = TENSOR_COLUMNS // tensor_columns if tensor_columns else limits.programs
    return min(by_registers, by_shared, by_tensor, limits.warps // spread, limits.programs)


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
