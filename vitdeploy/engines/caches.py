"""What TensorRT measures or compiles once, kept in the user's cache folder for the next time.

A file there belongs to one version of the library and one GPU. Processes may share it: each reads a whole
file and replaces it as a whole, under a lock.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from vitdeploy.engines.protocol import IBuilderConfig, IRuntimeCache


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
        temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(self.path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()

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


@dataclass(frozen=True)
class TimingCache:
    """How long the builder found each kernel to take on one GPU."""

    file: CacheFile

    @classmethod
    def of(cls, version: str, gpu: str) -> Self:
        return cls(CacheFile.of("timing", version, gpu))

    def load(self, config: IBuilderConfig) -> None:
        """Give the builder what earlier builds have measured; nothing, if the file is damaged."""
        for data in (self.file.read(), b""):
            cache = config.create_timing_cache(data)
            if cache is not None and config.set_timing_cache(cache, False):
                return

    def save(self, config: IBuilderConfig) -> None:
        """Keep what this build has measured, beside what others have kept meanwhile."""
        cache = config.get_timing_cache()
        if cache is None:
            return
        with self.file.locked():
            others = config.create_timing_cache(self.file.read())
            if others is not None:
                cache.combine(others, False)
            self.file.write(bytes(memoryview(cache.serialize())))


@dataclass(frozen=True)
class KernelCache:
    """Kernels that TensorRT for RTX has compiled for one engine on one GPU."""

    file: CacheFile

    @classmethod
    def of(cls, version: str, gpu: str, engine_sha256: str) -> Self:
        return cls(CacheFile.of("kernels", version, gpu, engine_sha256[:32]))

    def load(self, cache: IRuntimeCache) -> None:
        """Give the runtime what earlier sessions have compiled."""
        if data := self.file.read():
            cache.deserialize(data)

    def save(self, cache: IRuntimeCache) -> None:
        """Keep what this session has compiled, if it compiled anything new."""
        data = bytes(memoryview(cache.serialize()))
        with self.file.locked():
            if data != self.file.read():
                self.file.write(data)
