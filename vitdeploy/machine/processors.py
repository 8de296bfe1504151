"""How many processors are ours: those that this process may run on, less what its container's quota takes."""

from __future__ import annotations

import math
import os
from pathlib import Path

from vitdeploy.machine.cgroups import processor_quota


def processors(root: Path = Path("/")) -> int:
    """The processors whose time this process gets: its affinity, or its quota rounded up where that is less.

    Args:
        root: where /proc and /sys are.
    """
    quota = processor_quota(root)
    return visible_processors() if quota is None else max(1, min(visible_processors(), math.ceil(quota)))


def visible_processors() -> int:
    """The processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int | None:
    """The threads of a session for which nobody asks for any; None is the runtime's own choice.

    Runtimes start a thread for each processor that they see. Where a quota allows fewer, those would be
    stopped in the middle of their work, again and again.
    """
    ours = processors()
    return ours if ours < visible_processors() else None
