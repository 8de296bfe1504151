"""Triton 3.6, the oldest that the kernels are for, beside the checkout; on the path it hides the other one.

Everything else is that of the tests' own environment. The first test that asks installs it, and later runs
find it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.helpers.paths import ROOT

VERSION = "3.6.0"
FOLDER = ROOT / ".venv-triton-3.6"


def run(arguments: Sequence[object]) -> subprocess.CompletedProcess[str]:
    """Run this Python where ``import triton`` gives 3.6."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(_packages()), str(ROOT), str(ROOT / "kernels")]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def _packages() -> Path:
    """The folder that has it; safe to call from several processes."""
    FOLDER.mkdir(exist_ok=True)
    packages, mark = FOLDER / "packages", FOLDER / ".ready"
    wanted = f"triton=={VERSION}"
    with (FOLDER / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not mark.exists() or mark.read_text() != wanted:
            shutil.rmtree(packages, ignore_errors=True)
            pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages)
            done = subprocess.run([*pip, wanted], capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{wanted}: {done.stderr[-2000:]}"
            mark.write_text(wanted)
    return packages
