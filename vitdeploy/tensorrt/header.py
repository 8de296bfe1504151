"""The first bytes of an engine, read without TensorRT: which one built it, in which version, for which GPUs.

Both TensorRTs begin an engine with a magic word and keep the version that built it in bytes 24 to 27, major
first. TensorRT for RTX says more in its 64 bytes: the size of the whole (u64 at 16) and a mask of the compute
capabilities that it was built for (u64 at 32).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vitdeploy.errors import BundleError
from vitdeploy.tensorrt.flavours import FLAVOURS, Flavour

HEADER_BYTES = 64
_VERSION = slice(24, 28)


@dataclass(frozen=True)
class EngineHeader:
    """What an engine says of itself."""

    flavour: Flavour
    version: tuple[int, ...]
    targets: tuple[str, ...]
    """Architectures; empty where the header does not say."""
    size: int | None
    """Of the whole engine in bytes, where the header says."""

    @property
    def version_text(self) -> str:
        return ".".join(str(part) for part in self.version)


def read_header(head: bytes, where: str) -> EngineHeader:
    """Read the header from an engine's first bytes; ``where`` names it in errors.

    Raises:
        BundleError: too short, or no engine.
    """
    if len(head) < HEADER_BYTES:
        raise BundleError(f"{where}: {len(head)} bytes are too few for an engine: it is truncated")
    flavour = next((f for f in FLAVOURS.values() if head.startswith(f.magic)), None)
    if flavour is None:
        raise BundleError(f"{where}: not an engine of TensorRT (it begins with {head[:4]!r})")
    if not flavour.portable:
        return EngineHeader(flavour, tuple(head[_VERSION]), (), None)
    (size,) = struct.unpack_from("<Q", head, 16)
    (mask,) = struct.unpack_from("<Q", head, 32)
    targets = tuple(arch for bit, arch in enumerate(flavour.targets) if mask >> bit & 1)
    return EngineHeader(flavour, tuple(head[_VERSION]), targets, size)


def check_size(header: EngineHeader, size: int, where: str) -> None:
    """Hold the size that the header states against the file's.

    Raises:
        BundleError: the file is shorter or longer.
    """
    if header.size is not None and header.size != size:
        what = "truncated" if size < header.size else "followed by something else"
        raise BundleError(f"{where}: {what}: it has {size} bytes, and its header says {header.size}")
