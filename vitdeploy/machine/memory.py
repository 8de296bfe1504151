"""How much memory there is and was, and giving it back between the stages of a large export."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import sys
from pathlib import Path

from vitdeploy.machine.cgroups import memory_limit


def total_memory(root: Path = Path("/")) -> int | None:
    """The bytes of the machine, or of the container where it may take fewer; None where nothing says it.

    Args:
        root: where /proc and /sys are.
    """
    limits = []
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if (limit := memory_limit(root)) is not None:
        limits.append(limit)
    return min(limits, default=None)


def release() -> None:
    """Free what only cycles hold, and give it back: tracers leave cycles that hold whole models.

    Takes tenths of a second, since the collector goes through every object of the libraries that are loaded.
    """
    gc.collect()
    give_back()


def give_back() -> None:
    """Return what glibc keeps of freed memory, blocks of up to 32 MB, to the system.

    Together several times a model's weights. A C library without ``malloc_trim`` keeps what it keeps.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_memory() -> int:
    """The largest resident memory that this process has had, in bytes."""
    try:
        # What getrusage says of a child begins with its parent's size; the kernel's own mark begins at zero.
        marks = re.findall(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        marks = []
    if marks:
        return int(marks[0]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> None:
    """Let ``peak_memory`` begin anew at what is in use now, where the kernel can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
