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
from types import MappingProxyType
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
    """Run ``vitdeploy`` in a process of its own: a fork, where the environment allows it."""
    words = [*map(str, arguments)]
    wanted = {**_environment(), **ISOLATED, **environment}
    given = prefork().environment
    changed = {name: wanted.get(name) for name in {*given, *wanted} if given.get(name) != wanted.get(name)}
    if changed.keys() <= _READ_LATE:
        done = prefork().run(arguments=words, cwd=cwd or Path.cwd(), changed=changed)
    else:
        done = subprocess.run(
            [*COMMAND, *words], capture_output=True, text=True, cwd=cwd, env=wanted, check=False
        )
    return Result(done.returncode, done.stdout, done.stderr)


ISOLATED = MappingProxyType({"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"})
"""What commands find in their environment: they ask nobody, and write what the tests read."""

_READ_LATE = frozenset(
    (
        *("ORT_DISABLE_TELEMETRY", "RAY_USAGE_STATS_ENABLED", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"),
        "XDG_CACHE_HOME",
    )
)
"""Variables that nothing reads when it is imported; libraries set most of them where the tests run."""


@functools.cache
def prefork() -> Prefork:
    """One for all commands of this process."""
    return Prefork({**_environment(), **ISOLATED})


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
