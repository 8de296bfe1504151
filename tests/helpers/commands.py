"""Running a command line and keeping what it said."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.prefork import Prefork
from vitdeploy.cli import main

COMMAND = (sys.executable, "-c", "import sys, vitdeploy.cli; sys.exit(vitdeploy.cli.main())")


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on stdout."""
        found: dict[str, Any] = json.loads(self.out)
        return found


Run = Callable[..., Result]


def in_this_process(capsys: pytest.CaptureFixture[str], *arguments: object) -> Result:
    """Run ``vitdeploy`` here."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return Result(code, captured.out, captured.err)


def in_a_process(*arguments: object, cwd: Path | None = None, **environment: str) -> Result:
    """Run ``vitdeploy`` in a process of its own: a fork, where the environment is what it was."""
    words = [*map(str, arguments)]
    if not environment and _prefork()[1] == _environment():
        done = _prefork()[0].run(arguments=words, cwd=cwd or Path.cwd())
    else:
        done = subprocess.run(
            [*COMMAND, *words],
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**os.environ, **environment},
            check=False,
        )
    return Result(done.returncode, done.stdout, done.stderr)


@functools.cache
def _prefork() -> tuple[Prefork, dict[str, str]]:
    """One for all commands of this process, and its environment."""
    environment = _environment()
    return Prefork(environment), environment


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
