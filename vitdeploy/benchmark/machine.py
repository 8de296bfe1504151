"""The machine under a measurement: what it is, and whether it was left in peace."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitdeploy._version import __version__
from vitdeploy.benchmark.results import Cpu, Environment, Git
from vitdeploy.machine.gpus import query_gpus
from vitdeploy.machine.identity import LIBRARIES, find_cpu, installed_version

FOREIGN = 0.05
"""Share of the processors that other programs may take before a measurement counts as disturbed."""
STOLEN = 0.01
"""Share that the hypervisor may take."""
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def environment(folder: Path) -> Environment:
    """The machine, the libraries, and the git revision of ``folder``."""
    cpu = find_cpu()
    return Environment(
        vitdeploy=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=Cpu(
            name=cpu.name,
            flags=cpu.flags,
            threads=cpu.threads,
            memory=cpu.memory,
            affinity=_affinity(),
            governor=governor(),
        ),
        gpus=query_gpus()[0],
        libraries={name: installed_version(name) for name in LIBRARIES},
        git=git(folder),
    )


def _affinity() -> tuple[int, ...]:
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


def governor(root: Path = Path("/")) -> str | None:
    """How the clock of the first processor is chosen; None where the system does not say."""
    try:
        return (root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip() or None
    except OSError:
        return None


def git(folder: Path) -> Git | None:
    """The revision that is checked out; None outside a repository or without git."""

    def ask(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return Git(revision=ask("rev-parse", "HEAD"), dirty=bool(ask("status", "--porcelain", "-uno")))
    except (OSError, subprocess.SubprocessError):
        return None


@dataclass(frozen=True)
class Moment:
    """Counters of the machine at one time; seconds of processor time, summed over the processors."""

    clock: float
    busy: float
    stolen: float
    ours: float
    throttled: int

    def __sub__(self, before: Moment) -> Moment:
        return Moment(
            self.clock - before.clock,
            self.busy - before.busy,
            self.stolen - before.stolen,
            self.ours - before.ours,
            self.throttled - before.throttled,
        )

    def __add__(self, other: Moment) -> Moment:
        return Moment(
            self.clock + other.clock,
            self.busy + other.busy,
            self.stolen + other.stolen,
            self.ours + other.ours,
            self.throttled + other.throttled,
        )

    def disturbances(self, processors: int) -> list[str]:
        """What went on beside the measurement while this much passed; empty for peace."""
        capacity = max(self.clock, 1e-9) * processors
        found = []
        # The kernel counts in ticks: what is less than a few of them over the whole time is rounding.
        floor = 5 * processors / _TICKS
        foreign = self.busy - self.ours
        if foreign > max(FOREIGN * capacity, floor):
            found.append(f"other programs took {foreign / capacity:.0%} of the processors")
        if self.stolen > max(STOLEN * capacity, floor):
            found.append(f"the hypervisor took {self.stolen / capacity:.0%} of the processors")
        if self.throttled:
            found.append(f"the processor throttled {self.throttled} times")
        return found


NO_TIME = Moment(0.0, 0.0, 0.0, 0.0, 0)


class Watch:
    """Reads the counters; all zero, so never a disturbance, where the system has none."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def now(self, workers: Sequence[int]) -> Moment:
        """The counters; ``workers`` are the processes whose work is ours, this one besides."""
        busy, stolen = self._processors()
        ours = sum(self._process(str(pid)) for pid in (*workers, "self")) if busy else 0.0
        return Moment(time.perf_counter(), busy, stolen, ours, self._throttled())

    def _processors(self) -> tuple[float, float]:
        """Busy and stolen seconds, of the processors that this process may use."""
        mine = {f"cpu{number}" for number in _affinity()}
        busy = stolen = 0
        with contextlib.suppress(OSError, ValueError):
            for line in (self._root / "proc/stat").read_text().splitlines():
                name, *fields = line.split()
                if name in mine and len(fields) >= 8:
                    user, nice, system, _, _, irq, soft, steal = map(int, fields[:8])
                    busy, stolen = busy + user + nice + system + irq + soft, stolen + steal
        return busy / _TICKS, stolen / _TICKS

    def _process(self, pid: str) -> float:
        try:
            fields = (self._root / "proc" / pid / "stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / _TICKS
        except (OSError, ValueError, IndexError):
            return 0.0

    def _throttled(self) -> int:
        count = 0
        for path in (self._root / "sys/devices/system/cpu").glob("cpu0/thermal_throttle/*_throttle_count"):
            with contextlib.suppress(OSError, ValueError):
                count += int(path.read_text())
        return count


def device_memory(pid: int) -> int | None:
    """Bytes of GPU memory that a process holds now; None where no NVIDIA driver says."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        rows = [line.split(",") for line in done.stdout.splitlines()]
        used = [int(mebibytes) for owner, mebibytes in rows if int(owner) == pid]
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return sum(used) * 2**20 if used else None
