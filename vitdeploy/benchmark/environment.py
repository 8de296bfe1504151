"""What a measurement runs on: the machine, the libraries, and the revision."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

from vitdeploy._version import __version__
from vitdeploy.backends.base import backend_names, library_extras
from vitdeploy.benchmark.results import Environment, Git, MeasuredCpu
from vitdeploy.machine.gpus import query_gpus
from vitdeploy.machine.identity import find_cpu, installed_version


def find_environment(folder: Path, backends: Iterable[str]) -> Environment:
    """The machine, the libraries of these backends of ours, and the git revision of ``folder``."""
    cpu, ours = find_cpu(), [name for name in backend_names() if name in set(backends)]
    return Environment(
        vitdeploy=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=MeasuredCpu(
            name=cpu.name,
            flags=cpu.flags,
            threads=cpu.threads,
            memory=cpu.memory,
            affinity=affinity(),
            governor=governor(),
        ),
        gpus=query_gpus()[0],
        libraries={name: installed_version(name) for name in library_extras(ours)},
        git=git_revision(folder),
    )


def affinity() -> tuple[int, ...]:
    """The logical processors that this process may use; empty where the system does not say."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


def governor(root: Path = Path("/")) -> str | None:
    """How the clock of the first processor is chosen; None where the system does not say."""
    try:
        return (root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip() or None
    except OSError:
        return None


def git_revision(folder: Path) -> Git | None:
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
