"""How many processors are ours: those that this process may run on, less what its container's quota takes;
and how sessions can share them out.
"""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import NamedTuple

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


class Share(NamedTuple):
    """So many sessions at the same time, each with so many threads."""

    sessions: int
    threads: int | None
    """Of each; None is the runtime's own choice."""


def cores(root: Path = Path("/")) -> int:
    """As ``processors``, but those that are one core (hyperthreads) count once."""
    ours = processors(root)
    if not hasattr(os, "sched_getaffinity"):
        return ours
    siblings = set()
    for number in os.sched_getaffinity(0):
        name = f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list"
        text = str(number)
        with contextlib.suppress(OSError):
            text = (root / name).read_text().strip()
        siblings.add(text)
    return min(ours, len(siblings))


def shares(processors: int, cores: int | None = None) -> tuple[Share, ...]:
    """The ways to have all processors at work, and all cores where these are fewer, fewest sessions first.

    One session takes the threads that the runtime itself chooses: it knows which cores belong together.
    """
    totals = {processors, cores or processors}
    several = {
        Share(count, total // count)
        for total in totals
        for count in range(2, total + 1)
        if total % count == 0
    }
    return (Share(1, None), *sorted(several))
