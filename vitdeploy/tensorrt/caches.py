"""What TensorRT measures or compiles once, kept in the user's cache folder for the next time.

A file there belongs to one version of the library and one GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from vitdeploy.machine.cache import CacheFile
from vitdeploy.tensorrt.api import IBuilderConfig, IRuntimeCache


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
