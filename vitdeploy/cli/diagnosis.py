"""What this machine is and what runs on it: processor, memory, GPUs, libraries, backends."""

from __future__ import annotations

import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from typing import Any

from vitdeploy._version import __version__
from vitdeploy.backends.base import all_backends, library_extras
from vitdeploy.errors import DeviceUnavailable
from vitdeploy.machine.gpus import query_gpus
from vitdeploy.machine.identity import Cpu, find_cpu, installed_version
from vitdeploy.machine.temporary import temporary_folder
from vitdeploy.verification.gemms import processor_note


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend runs here, and if not, why and what would change that."""

    name: str
    summary: str
    available: bool
    reason: str
    hint: str | None


@dataclass(frozen=True)
class Diagnosis:
    """Everything ``vitdeploy doctor`` shows."""

    vitdeploy: str
    python: str
    platform: str
    cpu: Cpu
    int8: str | None
    """What to know before int8 runs on this processor; None where it has the instructions."""
    gpus: tuple[dict[str, str], ...]
    gpu_reason: str
    """Why there are none."""
    libraries: dict[str, str | None]
    backends: tuple[BackendStatus, ...]
    providers: tuple[str, ...]
    """ONNX Runtime's execution providers."""
    temporary_folder: str | None
    """None where none can be written to."""
    free_disk: int | None
    """Bytes, there."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look at this machine. Imports ONNX Runtime, if it is there, to ask for its providers."""
    cpu, (gpus, reason) = find_cpu(), query_gpus()
    temporary = _temporary_folder()
    return Diagnosis(
        vitdeploy=__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        platform=platform.platform(),
        cpu=cpu,
        int8=processor_note(cpu, weight_bits=7),
        gpus=gpus,
        gpu_reason=reason,
        libraries={name: installed_version(name) for name in library_extras()},
        backends=tuple(_status()),
        providers=_providers(),
        temporary_folder=temporary,
        free_disk=None if temporary is None else shutil.disk_usage(temporary).free,
    )


def _temporary_folder() -> str | None:
    try:
        return temporary_folder()
    except DeviceUnavailable:
        return None


def _status() -> list[BackendStatus]:
    return [
        BackendStatus(backend.name, backend.traits.summary, state.ok, state.reason, state.hint)
        for backend in all_backends()
        for state in [backend.availability()]
    ]


def _providers() -> tuple[str, ...]:
    from vitdeploy.backends.onnxruntime import available_providers

    return available_providers()
