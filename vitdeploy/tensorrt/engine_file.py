"""Whether an engine may be given to the library and the GPU that are here, found out before they see it.

TensorRT answers a foreign engine with a line in its log, or with a crash. Here it is one error that says what
to build instead.

Both TensorRTs begin an engine with a magic word and keep the version that built it in bytes 24 to 27, major
first. TensorRT for RTX says more in its 64 bytes: the size of the whole (u64 at 16) and a mask of the compute
capabilities that it was built for (u64 at 32).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from vitdeploy.bundle.manifest import REBUILD, first_problem
from vitdeploy.errors import BundleError, DeviceUnavailable
from vitdeploy.machine.gpus import Gpu
from vitdeploy.tensorrt.flavours import FLAVOURS, Flavour, parse_version
from vitdeploy.tensorrt.records import EngineRecord

HEADER_BYTES = 64
_VERSION = slice(24, 28)
_MAX_RECORD_BYTES = 16 * 2**20
_TARGET = re.compile(r"sm_(?P<major>[0-9]{1,3})(?P<minor>[0-9])(?P<later>\+?)")


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


def read_record(path: Path) -> EngineRecord:
    """Read the record beside an engine.

    Raises:
        BundleError: it is not readable as one.
    """
    if path.stat().st_size > _MAX_RECORD_BYTES:
        raise BundleError(f"{path}: too large for the record of an engine")
    try:
        return EngineRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise BundleError(f"{path}: not the record of an engine ({first_problem(error)})") from error


def check_files(engine: Path, record: EngineRecord) -> None:
    """Hold an engine's own header against the record beside it.

    Raises:
        BundleError: it is truncated, no engine, or another one than the record describes.
    """
    with engine.open("rb") as file:
        header = read_header(file.read(HEADER_BYTES), str(engine))
    size = engine.stat().st_size
    check_size(header, size, str(engine))
    stated: dict[str, tuple[object, object]] = {
        "kind": (header.flavour.name, record.flavour),
        "version": (header.version, parse_version(record.version)),
        "size": (size, record.size),
    }
    if header.targets:
        stated["architectures"] = (set(header.targets), set(record.targets))
    for what, (actual, expected) in stated.items():
        if actual != expected:
            raise BundleError(
                f"{engine}: its {what} is {actual}, and its record says {expected}", hint=REBUILD
            )


def check_machine(record: EngineRecord, version: str, gpu: Gpu, rebuild: str) -> None:
    """Hold an engine against the library that runs here and the GPU it is to run on.

    Args:
        version: of the library.
        rebuild: the command that builds it anew.

    Raises:
        BundleError: the library is another version than the engine needs.
        DeviceUnavailable: it was built for other GPUs.
    """
    built, running = parse_version(record.version), parse_version(version)
    newer = record.settings.version_compatible and running >= built
    if built != running and not newer:
        relation = "older" if running < built else "newer"
        raise BundleError(
            f"the engine was built by version {record.version}, and the library is {relation}: {version}",
            hint=f"install that version, or build it anew: {rebuild}",
        )
    if not runs_on(record.targets, gpu.capability):
        raise DeviceUnavailable(
            f"the engine is for {', '.join(record.targets)}, and this GPU ({gpu.name}) is {gpu.arch}",
            hint=f"build one for it: {rebuild}",
        )


def runs_on(targets: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether one of an engine's targets is this compute capability; ``sm_80+`` is it and all later ones."""
    for target in targets:
        match = _TARGET.fullmatch(target)
        if match is None:  # nothing that was built here; whatever it is, it is not this GPU
            continue
        target_capability = (int(match["major"]), int(match["minor"]))
        if capability == target_capability or (match["later"] and capability >= target_capability):
            return True
    return False


def foreign_to(targets: Sequence[str], gpus: Sequence[Gpu]) -> str | None:
    """Why none of the GPUs here runs an engine for these targets; None if one does, or if there is no GPU."""
    if not gpus or any(runs_on(targets, gpu.capability) for gpu in gpus):
        return None
    archs = ", ".join(dict.fromkeys(gpu.arch for gpu in gpus))
    return f"it is for {', '.join(targets)}, and the GPU here is {archs}"
