"""Running a command line and keeping what it said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

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


@dataclass(frozen=True)
class Exported:
    """A bundle, and what the command that wrote it said."""

    folder: Path
    result: Result


def in_this_process(capsys: pytest.CaptureFixture[str], *arguments: object) -> Result:
    """Run ``vitdeploy`` here."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return Result(code, captured.out, captured.err)


def in_a_process(*arguments: object, cwd: Path | None = None, **environment: str) -> Result:
    """Run ``vitdeploy`` in a process of its own."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)
