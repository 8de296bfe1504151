"""Runs cubins through the CUDA driver API: nothing is compiled, and a CUDA graph can capture the launch.

A kernel of a compute capability that is not the GPU's, a damaged binary or a launch that does not fit is
an error of the driver and raised as such.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitdeploy_kernels.aot import ALIGNMENT, SCRATCH, parameter_names, type_of
from vitdeploy_kernels.launch import Launch

LARGE_SHARED = 48 * 1024
"""Bytes of dynamic shared memory above which a kernel has to ask first."""

# Of the enumerations CUfunction_attribute and CUfunc_cache.
_MAX_DYNAMIC_SHARED = 8
_PREFER_SHARED = 1

_HANDLE = POINTER(c_void_p)
_ARGUMENTS: dict[str, list[Any]] = {
    "cuGetErrorName": [c_int, POINTER(c_char_p)],
    "cuGetErrorString": [c_int, POINTER(c_char_p)],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDevicePrimaryCtxRetain": [_HANDLE, c_int],
    "cuCtxGetCurrent": [_HANDLE],
    "cuCtxSetCurrent": [c_void_p],
    "cuModuleLoadData": [_HANDLE, c_char_p],
    "cuModuleGetFunction": [_HANDLE, c_void_p, c_char_p],
    "cuFuncSetCacheConfig": [c_void_p, c_int],
    "cuFuncSetAttribute": [c_void_p, c_int, c_int],
    "cuLaunchKernel": [c_void_p, *[c_uint] * 7, c_void_p, _HANDLE, _HANDLE],
}


class DriverError(RuntimeError):
    """The CUDA driver refused a call, or was not asked because the arguments are wrong."""


@dataclass(frozen=True)
class Binary:
    """A cubin and what one has to know to launch it; see :class:`vitdeploy_kernels.aot.Compiled`."""

    name: str
    cubin: bytes
    parameters: tuple[str, ...]
    shared: int
    warps: int


class CudaDriver:
    """The calls of the driver API that a launch takes, each one checked.

    Args:
        library: the CUDA driver; ``libcuda.so.1`` when omitted.

    Raises:
        DriverError: there is no driver.
    """

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1") if library is None else library
            for name, arguments in _ARGUMENTS.items():
                getattr(self._library, name).argtypes = arguments
        except (OSError, AttributeError) as error:
            raise DriverError(f"no usable CUDA driver: {error}") from error
        self._contexts: dict[int, int] = {}

    def ordinal(self, device: torch.device) -> int | None:
        """The number of the GPU that a tensor is on; None if its device is not one."""
        return device.index if device.type == "cuda" else None

    def stream(self, ordinal: int) -> int:
        """The handle of torch's current stream."""
        return int(torch.cuda.current_stream(ordinal).cuda_stream)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver.

        Raises:
            DriverError: it returned anything but success.
        """
        code = getattr(self._library, name)(*arguments)
        if code:
            raise DriverError(f"{name}: {self._describe(code)}")

    def _describe(self, code: int) -> str:
        texts = []
        for function in ("cuGetErrorName", "cuGetErrorString"):
            text = c_char_p()
            getattr(self._library, function)(code, ctypes.byref(text))
            texts.append(text.value.decode() if text.value else f"error {code}")
        return f"{texts[0]}: {texts[1]}"

    @contextlib.contextmanager
    def on(self, ordinal: int) -> Iterator[None]:
        """Make the context that torch uses on a GPU current, which a new thread does not have."""
        if ordinal not in self._contexts:
            device, context = c_int(), c_void_p()
            self.call("cuDeviceGet", ctypes.byref(device), ordinal)
            # Never released: torch keeps this context as long as the process lives.
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            self._contexts[ordinal] = context.value or 0
        before = c_void_p()
        self.call("cuCtxGetCurrent", ctypes.byref(before))
        if before.value == self._contexts[ordinal]:
            yield
            return
        self.call("cuCtxSetCurrent", self._contexts[ordinal])
        try:
            yield
        finally:
            if before.value:
                self.call("cuCtxSetCurrent", before)


class CubinKernel:
    """A binary that is loaded on one GPU, for the rest of the process: graphs may hold its launches.

    Args:
        driver: of CUDA.
        binary: what to load.
        ordinal: number of the GPU.

    Raises:
        DriverError: the GPU cannot run it.
    """

    def __init__(self, driver: CudaDriver, binary: Binary, ordinal: int) -> None:
        self._driver, self._binary, self._ordinal = driver, binary, ordinal
        module, self._function = c_void_p(), c_void_p()
        with driver.on(ordinal):
            driver.call("cuModuleLoadData", ctypes.byref(module), binary.cubin)
            driver.call("cuModuleGetFunction", ctypes.byref(self._function), module, binary.name.encode())
            if binary.shared > LARGE_SHARED:
                driver.call("cuFuncSetCacheConfig", self._function, _PREFER_SHARED)
                driver.call("cuFuncSetAttribute", self._function, _MAX_DYNAMIC_SHARED, binary.shared)

    def launch(self, launch: Launch) -> None:
        """Queue a launch on torch's current stream of this GPU.

        Raises:
            DriverError: arguments the binary was not compiled for, or a refusal of the driver.
        """
        grid = (*launch.grid, 1, 1)[:3]
        if not all(grid):
            return
        values = pack(self._binary.parameters, launch)
        addresses = (c_void_p * len(values))(*map(ctypes.addressof, values))
        with self._driver.on(self._ordinal):
            self._driver.call(
                "cuLaunchKernel", self._function, *grid, 32 * self._binary.warps, 1, 1,
                self._binary.shared, self._driver.stream(self._ordinal), addresses, None,
            )  # fmt: skip


def aligned(launch: Launch) -> bool:
    """Whether all tensors lie where compiled kernels assume them to."""
    return all(
        value.data_ptr() % ALIGNMENT == 0 for value in launch.arguments.values() if isinstance(value, Tensor)
    )


def pack(parameters: Sequence[str], launch: Launch) -> list[ctypes._SimpleCData[Any]]:
    """The arguments of a launch as C values, by the types that were recorded when it was compiled.

    Raises:
        DriverError: other arguments than those types.
    """
    names = [name for name in parameter_names(launch.kernel) if name in launch.arguments]
    visible = [kind for kind in parameters if kind != SCRATCH]
    given = [type_of(name, launch.arguments[name]) for name in names]
    if visible != given:
        raise DriverError(f"{launch.name} was compiled for {visible}, and is given {given}")
    if not aligned(launch):
        raise DriverError(f"{launch.name}: a tensor is not aligned to {ALIGNMENT} bytes")
    packed = [_c_value(launch.arguments[name], kind) for name, kind in zip(names, visible, strict=True)]
    return packed + [c_uint64(0) for _ in range(len(parameters) - len(visible))]


def _c_value(value: Tensor | int | float, kind: str) -> ctypes._SimpleCData[Any]:
    if isinstance(value, Tensor):
        return c_uint64(value.data_ptr())
    if kind == "fp32":
        return c_float(value)
    return c_int32(int(value)) if kind == "i32" else c_int64(int(value))
