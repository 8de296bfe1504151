"""Environments of the peers whose dependencies clash with ours: ``.venv-peers-<name>`` beside ``.venv``.

    python -m benchmarks.peers.environments        # makes those that are missing or out of date

Each holds what ``requirements-<name>.txt`` pins, and this repository without its dependencies, so that a
peer is measured by the same code as vitdeploy's own backends.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMES = ("loadgen", "nncf", "optimum", "serving", "timm")
_LAST_WORDS = 300
"""Characters of a failed command's output that are worth showing."""

Run = Callable[[Sequence[str]], None]


class EnvironmentFailure(Exception):
    """An environment cannot be made; says why."""


def requirements(name: str) -> Path:
    """The file that pins an environment's packages."""
    return Path(__file__).with_name(f"requirements-{name}.txt")


def run_command(command: Sequence[str]) -> None:
    """Run a command quietly.

    Raises:
        EnvironmentFailure: it fails.
    """
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        last = " ".join(done.stdout.split())[-_LAST_WORDS:]
        raise EnvironmentFailure(f"{Path(command[0]).name} {command[1]} ended with {done.returncode}: {last}")


def ensure(name: str, root: Path = ROOT, run: Run = run_command) -> Path:
    """The environment's interpreter; makes the environment where it is absent or its file has changed.

    Raises:
        EnvironmentFailure: it cannot be made.
    """
    folder = root / f".venv-peers-{name}"
    python, mark = folder / "bin" / "python", folder / ".made-from"
    wanted = requirements(name).read_text(encoding="utf-8")
    if mark.is_file() and mark.read_text(encoding="utf-8") == wanted and python.exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    try:
        run([sys.executable, "-m", "venv", str(folder)])
        run([*pip, "-r", str(requirements(name))])
        run([*pip, "--no-deps", "-e", str(root)])
        mark.write_text(wanted, encoding="utf-8")
    except OSError as error:
        raise EnvironmentFailure(f"{folder.name}: {error.strerror}") from error
    return python


def main() -> int:
    """Make all of them; returns how many cannot be made."""
    failed = 0
    for name in NAMES:
        try:
            print(f"{name}: {ensure(name).relative_to(ROOT)}")
        except EnvironmentFailure as error:
            failed += 1
            print(f"{name}: {error}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main())
