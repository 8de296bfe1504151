"""Processes of a test, found by a mark in their environment, whoever started them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

MARK = "VITDEPLOY_TEST_MARK"


def marked(mark: str) -> dict[int, str]:
    """Command lines of the living processes with this mark."""
    found = {}
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal() or int(folder.name) == os.getpid():
            continue
        try:
            command = (folder / "cmdline").read_bytes()  # empty for a zombie
            if command and wanted in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = command.replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], object], seconds: float, step: float = 0.05) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(step)
    return bool(condition())
