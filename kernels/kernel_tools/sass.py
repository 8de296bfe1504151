"""What a cubin costs and what it is made of, read with the cuobjdump that comes with Triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitdeploy_kernels.aot import ARCHITECTURES, AotError, Compiled
from vitdeploy_kernels.occupancy import programs_per_multiprocessor

COUNTED = ("HGMMA", "UTCMMA", "HMMA", "LDGSTS", "LDG", "STG", "MUFU")
"""Products on the tensor cores (of sm_90, of sm_100: UTC*MMA, of all), copies, loads, stores, functions."""

PRODUCT = re.compile(r"HGMMA|HMMA|UTC\w*MMA")
COPY = re.compile(r"LDGSTS|UTMALDG")

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)
_DRAINED = re.compile(r"\.DEPBAR\S*\s+gsb0,\s+0x0\b")


@dataclass(frozen=True)
class Resources:
    """Of a compiled kernel.

    Attributes:
        registers: per thread.
        stack: bytes per thread.
        shared: bytes of dynamic shared memory per program.
        spill_stores: instructions that write registers to local memory.
        spill_loads: instructions that read them back.
        instructions: how many of each of :data:`COUNTED`, by name.
        total: all instructions.
        before: instructions before the first asynchronous copy; 0 where nothing is copied so.
        early_loads: loads from global memory among these.
        after: instructions behind the last product.
        serialised: waits for products of sm_90 that the PTX does not have. ptxas makes each product wait for
            the one before it where it cannot prove that nothing else touches their registers.
        programs: that fit on a multiprocessor at a time.
    """

    registers: int
    stack: int
    shared: int
    spill_stores: int
    spill_loads: int
    instructions: Mapping[str, int]
    total: int
    before: int
    early_loads: int
    after: int
    serialised: int
    programs: int


def resources(compiled: Compiled) -> Resources:
    """Registers, spills, instruction mix and occupancy of a compiled kernel.

    Raises:
        AotError: cuobjdump is not there, or does not understand the cubin.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.cubin)
        usage, listing = _cuobjdump("-res-usage", path), _cuobjdump("-sass", path)
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    mix, order = count_instructions(listing), in_order(listing)
    before, after = around(order)
    waits = len(_DRAINED.findall(listing)) - compiled.ptx.count("wgmma.wait_group.sync.aligned 0;")
    if {"REG", "STACK"} - used.keys() or not mix:
        raise AotError(f"cuobjdump says nothing about {compiled.name} for {compiled.arch}")
    return Resources(
        registers=used["REG"],
        stack=used["STACK"],
        shared=compiled.shared,
        spill_stores=mix["STL"],
        spill_loads=mix["LDL"],
        instructions={name: mix[name] for name in COUNTED},
        total=mix.total() - mix["UTCMMA"],
        before=len(before),
        early_loads=before.count("LDG"),
        after=len(after),
        serialised=max(waits, 0),
        programs=programs_per_multiprocessor(
            ARCHITECTURES[compiled.arch],
            registers=used["REG"],
            shared=compiled.shared,
            warps=compiled.warps,
            tensor_columns=compiled.tensor_columns,
        ),
    )


def count_instructions(listing: str) -> Counter[str]:
    """Instructions of a SASS listing by name without suffix; UTCMMA counts every UTC*MMA once more."""
    mix = Counter(_INSTRUCTION.findall(listing))
    mix["UTCMMA"] = sum(number for name, number in mix.items() if re.fullmatch(r"UTC\w*MMA", name))
    return mix


def in_order(listing: str) -> list[str]:
    """The instructions of a SASS listing as they stand there, by name without suffix; no padding."""
    return [name for name in _INSTRUCTION.findall(listing) if name != "NOP"]


def around(names: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """What stands before the first asynchronous copy and what behind the last product; empty without one."""
    copies = [place for place, name in enumerate(names) if COPY.fullmatch(name)]
    products = [place for place, name in enumerate(names) if PRODUCT.fullmatch(name)]
    return names[: copies[0]] if copies else [], names[products[-1] + 1 :] if products else []


def _cuobjdump(option: str, path: Path) -> str:
    import triton

    tool = triton.knobs.nvidia.cuobjdump.path
    done = subprocess.run([tool, option, path], capture_output=True, text=True, check=False)
    if done.returncode:
        raise AotError(f"cuobjdump {option} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
