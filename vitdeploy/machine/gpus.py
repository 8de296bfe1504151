"""The NVIDIA GPUs of this machine, as the CUDA driver describes them."""

from __future__ import annotations

import ctypes
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
    gpus = [_describe(cuda, device) for device in range(count.value)]
    return [gpu for gpu in gpus if gpu is not None]


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
