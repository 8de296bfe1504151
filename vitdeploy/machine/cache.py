"""The user's cache folder: what is measured or compiled once, and kept for the next time.

Processes may share a file there: each reads a whole file and replaces it as a whole, under a lock.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from vitdeploy.machine.atomic import atomic_write


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/vitdeploy``, as a rule ``~/.cache/vitdeploy``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "vitdeploy"


@dataclass(frozen=True)
class CacheFile:
    """One file of the cache. A folder that cannot be read or written is an empty cache, and no error."""

    path: Path

    @classmethod
    def of(cls, kind: str, *parts: str) -> Self:
        """The file for a kind of data and what it belongs to; parts become one plain file name."""
        name = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", part) for part in parts)
        return cls(cache_folder() / kind / name)

    def read(self) -> bytes:
        """What was kept; nothing where there is none."""
        try:
            return self.path.read_bytes()
        except OSError:
            return b""

    def write(self, data: bytes) -> None:
        """Replace the file at once: whoever reads meanwhile reads the old or the new one, whole."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as file:
                file.write(data)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold off other processes that would read, change and write this file."""
        with contextlib.ExitStack() as stack:
            if sys.platform != "win32":
                import fcntl

                with contextlib.suppress(OSError):
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    file = stack.enter_context(self.path.with_name(f"{self.path.name}.lock").open("w"))
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield
