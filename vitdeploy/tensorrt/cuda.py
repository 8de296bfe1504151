"""Memory, streams and graphs of one GPU, as engines need them, on NVIDIA's ``cuda.core``."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vitdeploy.errors import DeviceUnavailable, MissingDependency, UsageError

if TYPE_CHECKING:
    from cuda.core import Buffer, Event
    from cuda.core.graph import Graph

Array = np.ndarray[Any, Any]


def cuda_core_installed() -> bool:
    """Whether ``cuda.core`` is there; imports nothing."""
    try:
        return importlib.util.find_spec("cuda.core") is not None
    except ModuleNotFoundError:  # no package ``cuda`` at all
        return False


@dataclass(frozen=True)
class Staging:
    """Memory of one tensor: on the GPU, and pinned on the host, where copies to and from the GPU are fast."""

    device: Buffer
    pinned: Buffer
    host: Array
    """The pinned bytes as numpy sees them."""

    @property
    def address(self) -> int:
        """Of the memory on the GPU."""
        return int(self.device.handle)


class CudaDevice:
    """One GPU with one stream; everything here is queued on it.

    Raises:
        MissingDependency: ``cuda.core`` is not installed.
        DeviceUnavailable: there is no such GPU.
    """

    def __init__(self, index: int) -> None:
        try:
            from cuda.core import Device, LegacyPinnedMemoryResource
        except ImportError as error:
            raise MissingDependency("cuda-core", extra="tensorrt", purpose="running engines") from error
        try:
            self._device = Device(index)
            self._device.set_current()
            self._stream = self._device.create_stream()
        except Exception as error:  # its errors have no base class of their own
            raise DeviceUnavailable(
                f"cuda:{index} does not answer: {' '.join(str(error).split())}"
            ) from error
        self._pinned = LegacyPinnedMemoryResource()

    def activate(self) -> None:
        """Make this the GPU of the calling thread; another thread may have made it."""
        self._device.set_current()

    @property
    def handle(self) -> int:
        """The stream, as TensorRT takes it."""
        return int(self._stream.handle)

    def allocate(self, size: int) -> Buffer:
        """Memory on the GPU."""
        return self._device.allocate(size, stream=self._stream)

    def stage(self, size: int) -> Staging:
        """Memory for a tensor of ``size`` bytes, on both sides."""
        pinned = self._pinned.allocate(size)
        return Staging(self.allocate(size), pinned, host_bytes(int(pinned.handle), size))

    def upload(self, staging: Staging) -> None:
        """Queue the copy from the host to the GPU."""
        staging.device.copy_from(staging.pinned, stream=self._stream)

    def download(self, staging: Staging) -> None:
        """Queue the copy from the GPU to the host."""
        staging.device.copy_to(staging.pinned, stream=self._stream)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what ``work`` queues, to be launched as one."""
        builder = self._stream.create_graph_builder().begin_building("thread_local")
        work()
        return builder.end_building().complete()

    def launch(self, graph: Graph) -> None:
        graph.launch(self._stream)

    def synchronize(self) -> None:
        """Wait until everything queued is done."""
        self._stream.sync()

    def record(self) -> Event:
        """Queue a note of the time; the GPU writes it down when it comes to it."""
        from cuda.core import EventOptions

        return self._stream.record(options=EventOptions(timing_enabled=True))

    def seconds_between(self, start: Event, end: Event) -> float:
        """Between two notes, both written: ``synchronize`` first."""
        return float(end - start) / 1000

    def view(self, tensor: object) -> DeviceView:
        """Look at another library's tensor without copying it.

        Raises:
            UsageError: it speaks neither DLPack nor the CUDA array interface.
        """
        from cuda.core.utils import StridedMemoryView

        try:
            memory = StridedMemoryView.from_any_interface(tensor, stream_ptr=self.handle)
        except (BufferError, TypeError, RuntimeError) as error:
            raise UsageError(
                f"{type(tensor).__name__} is no tensor that DLPack can share: {error}"
            ) from error
        return DeviceView(
            int(memory.ptr),
            tuple(memory.shape),
            np.dtype(memory.dtype),
            bool(memory.is_device_accessible),
            memory.strides is None or is_contiguous(memory.shape, memory.strides),
        )

    def share(self, buffer: Buffer, shape: tuple[int, ...], dtype: np.dtype[Any]) -> object:
        """Memory on the GPU as a tensor that other libraries take by DLPack."""
        from cuda.core.utils import StridedMemoryView

        return StridedMemoryView.from_buffer(buffer, shape, dtype=dtype)


@dataclass(frozen=True)
class DeviceView:
    """Where another library's tensor lies, and what it is."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    on_device: bool
    contiguous: bool


def host_bytes(address: int, size: int) -> Array:
    """Memory of this process as numpy sees it; numpy before 2.1 would take it by DLPack to read only."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements lie row by row without gaps; strides count elements, and of one row there are none."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != step:
            return False
        step *= size
    return True
