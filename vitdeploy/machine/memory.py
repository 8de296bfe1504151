"""Giving memory back between the stages of a large export, and how much there was."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import sys
from pathlib import Path


def release() -> None:
    """Free what only cycles hold, and return what glibc keeps of it to the system.

    Tracers leave cycles that hold whole models, and glibc keeps freed blocks of up to 32 MB for later:
    together several times a model's weights. A C library without ``malloc_trim`` keeps what it keeps.
    """
    gc.collect()
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
