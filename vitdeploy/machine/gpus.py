"""The NVIDIA GPUs of this machine: those that CUDA lets a process use, and all that there are."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

_MAJOR, _MINOR = 75, 76
"""The driver's numbers for CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""
_NAME_BYTES = 256


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str
    capability: tuple[int, int]

    @property
    def arch(self) -> str:
        """``sm_89``, as compilers name it."""
        major, minor = self.capability
        return f"sm_{major}{minor}"


def find_gpus(driver: str = "libcuda.so.1") -> list[Gpu]:
    """The GPUs that the CUDA driver finds, in its order; none without a driver."""
    try:
        cuda = ctypes.CDLL(driver)
    except OSError:
        return []
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = [_describe(cuda, device) for device in range(count.value)]
    return [gpu for gpu in found if gpu is not None]


def query_gpus(
    run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run,
) -> tuple[tuple[dict[str, str], ...], str]:
    """All NVIDIA GPUs as nvidia-smi describes them, and a reason where there are none.

    More of each than :func:`find_gpus` says, and those that CUDA_VISIBLE_DEVICES hides, too.
    """
    fields = ("name", "memory.total", "driver_version", "compute_cap")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = run(query, capture_output=True, text=True, timeout=10, check=False)
    except FileNotFoundError:
        return (), "no NVIDIA driver (nvidia-smi is not there)"
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), f"nvidia-smi does not answer: {error}"
    if done.returncode:
        return (), f"nvidia-smi failed: {' '.join((done.stdout + done.stderr).split())[:200]}"
    rows = [[value.strip() for value in row.split(",")] for row in done.stdout.splitlines() if row.strip()]
    gpus = tuple(dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields))
    return gpus, "" if gpus else "nvidia-smi lists none"


def _describe(cuda: ctypes.CDLL, device: int) -> Gpu | None:
    pair, value = [], ctypes.c_int()
    for attribute in (_MAJOR, _MINOR):
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        pair.append(value.value)
    text = ctypes.create_string_buffer(_NAME_BYTES)
    if cuda.cuDeviceGetName(text, _NAME_BYTES, device):
        return None
    return Gpu(text.value.decode(errors="replace"), (pair[0], pair[1]))
