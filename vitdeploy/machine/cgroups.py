"""What a container may use: the limits of this process's control groups (Linux), of version 2 and 1.

A limit of a group holds for all groups inside of it, so each is looked at, from the process's own up.
https://docs.kernel.org/admin-guide/cgroup-v2.html
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_MOUNT = "sys/fs/cgroup"


def processor_quota(root: Path = Path("/")) -> float | None:
    """How many processors' time this process may take; None where that is not limited.

    Args:
        root: where /proc and /sys are.
    """
    quotas = []
    for group in _groups(root, "cpu"):
        with contextlib.suppress(OSError, ValueError):  # not this version, or "max"
            quota, period = (group / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            quotas.append(int(quota) / int(period))
    return min((quota for quota in quotas if quota > 0), default=None)  # -1 is no limit


def memory_limit(root: Path = Path("/")) -> int | None:
    """How many bytes of memory this process may take; None where that is not limited."""
    limits = []
    for group in _groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                limits.append(int((group / name).read_text()))
    return min(limits, default=None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's groups that have this controller, and of those around them."""
    yield from ((root / _MOUNT), (root / _MOUNT / controller))  # a container sees its own group there
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if names and controller not in names.split(","):
            continue
        mount = root / _MOUNT / (controller if names else "")
        parts = [part for part in PurePosixPath(path).parts[1:] if part != ".."]
        for depth in range(1, len(parts) + 1):
            yield mount.joinpath(*parts[:depth])
