"""Whether an engine may be given to the library and the GPU that are here, found out before they see it.

TensorRT answers a foreign engine with a line in its log, or with a crash. Here it is one error that says what
to build instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError

from vitdeploy.bundle.manifest import REBUILD, first_problem
from vitdeploy.errors import BundleError, DeviceUnavailable
from vitdeploy.machine.gpus import Gpu
from vitdeploy.tensorrt.flavours import parse_version
from vitdeploy.tensorrt.header import HEADER_BYTES, check_size, read_header
from vitdeploy.tensorrt.records import EngineRecord

_MAX_RECORD_BYTES = 16 * 2**20
_TARGET = re.compile(r"sm_(?P<major>[0-9]{1,3})(?P<minor>[0-9])(?P<later>\+?)")


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
    said: dict[str, tuple[object, object]] = {
        "kind": (header.flavour.name, record.flavour),
        "version": (header.version, parse_version(record.version)),
        "size": (size, record.size),
    }
    if header.targets:
        said["architectures"] = (set(header.targets), set(record.targets))
    for what, (found, expected) in said.items():
        if found != expected:
            raise BundleError(
                f"{engine}: its {what} is {found}, and its record says {expected}", hint=REBUILD
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
        found = _TARGET.fullmatch(target)
        if found is None:  # nothing that was built here; whatever it is, it is not this GPU
            continue
        wanted = (int(found["major"]), int(found["minor"]))
        if capability == wanted or (found["later"] and capability >= wanted):
            return True
    return False


def foreign_to(targets: Sequence[str], gpus: Sequence[Gpu]) -> str | None:
    """Why none of the GPUs here runs an engine for these targets; None if one does, or if there is no GPU."""
    if not gpus or any(runs_on(targets, gpu.capability) for gpu in gpus):
        return None
    here = ", ".join(dict.fromkeys(gpu.arch for gpu in gpus))
    return f"it is for {', '.join(targets)}, and the GPU here is {here}"
