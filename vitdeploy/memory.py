"""Giving memory back between the stages of a large export."""

from __future__ import annotations

import ctypes
import gc


def release() -> None:
    """Free what only cycles hold, and return what glibc keeps of it to the system.

    Tracers leave cycles that hold whole models, and glibc keeps freed blocks of up to 32 MB for later:
    together several times a model's weights. A C library without ``malloc_trim`` keeps what it keeps.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
