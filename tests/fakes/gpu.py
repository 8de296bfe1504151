"""A GPU without a GPU, for engines of TensorRT's double: ``CudaDevice`` on host memory.

What lies "on the GPU" is memory of its own, filled with junk when it is new, so that a forgotten copy shows.
While a graph is captured nothing runs, neither a copy nor an engine; launching the graph does what was
captured, and fails if the engine's context was given other shapes or addresses since: to TensorRT that is
undefined. It proves the order of things and nothing of CUDA.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from tests.fakes.tensorrt_names import inside
from vitdeploy.errors import UsageError
from vitdeploy.tensorrt.cuda import DeviceView, Staging, is_contiguous

JUNK = 0xAB
STREAM = 77


class Buffer:
    """Memory of one owner."""

    def __init__(self, size: int) -> None:
        self.bytes = np.full(size, JUNK, np.uint8)

    @property
    def handle(self) -> int:
        return int(self.bytes.ctypes.data)


Graph = list[Callable[[], None]]


class FakeGpu:
    """Takes the place of ``CudaDevice``; ``library`` is the double whose engines it runs."""

    handle = STREAM

    def __init__(self, library: ModuleType | None = None) -> None:
        self.alive: weakref.WeakSet[Buffer] = weakref.WeakSet()
        self.allocations = self.captures = self.launches = self.waits = 0
        self.queued: list[str] = []
        """What was queued and not waited for."""
        self.clock = 0.0
        """Seconds; everything queued takes one."""
        self._capturing: Graph | None = None
        if library is not None:
            _intercept(library, self)

    def activate(self) -> None:
        """There is one GPU, and every thread has it."""

    def allocate(self, size: int) -> Buffer:
        assert self._capturing is None, "memory allocated while a graph is captured"
        buffer = Buffer(size)
        self.alive.add(buffer)
        self.allocations += 1
        return buffer

    def stage(self, size: int) -> Staging:
        pinned = self.allocate(size)
        return Staging(self.allocate(size), pinned, pinned.bytes)  # type: ignore[arg-type]

    def upload(self, staging: Any) -> None:
        self.queue("upload", lambda: _copy(staging.device, staging.pinned))

    def download(self, staging: Any) -> None:
        self.queue("download", lambda: _copy(staging.pinned, staging.device))

    def queue(self, what: str, work: Callable[[], None]) -> None:
        """Do it now, or when the graph is launched that is being captured."""
        if self._capturing is not None:
            self._capturing.append(work)
        else:
            self.queued.append(what)
            self.clock += 1
            work()

    @property
    def capturing(self) -> bool:
        return self._capturing is not None

    def capture(self, work: Callable[[], None]) -> Graph:
        assert not self.queued, "a graph is captured while work is queued"
        self._capturing = graph = []
        self.captures += 1
        try:
            work()
        finally:
            self._capturing = None
        return graph

    def launch(self, graph: Graph) -> None:
        self.launches += 1
        self.queued.append("graph")
        for work in graph:
            self.clock += 1
            work()

    def record(self) -> float:
        assert self._capturing is None, "an event with its time recorded while a graph is captured"
        self.queued.append("event")
        return self.clock

    def seconds_between(self, start: float, end: float) -> float:
        assert "event" not in self.queued, "an event read before it was waited for"
        return end - start

    def synchronize(self) -> None:
        assert self._capturing is None, "waited while a graph is captured"
        self.waits += 1
        self.queued.clear()

    def view(self, tensor: Any) -> DeviceView:
        """PyTorch's tensors stand for those on the GPU, numpy's for those on the host."""
        if not hasattr(tensor, "__dlpack__"):
            raise UsageError(f"{type(tensor).__name__} is no tensor that DLPack can share")
        if isinstance(tensor, np.ndarray):
            return DeviceView(tensor.ctypes.data, tensor.shape, tensor.dtype, False, True)
        dtype, shape = np.dtype(str(tensor.dtype).removeprefix("torch.")), tuple(tensor.shape)
        return DeviceView(tensor.data_ptr(), shape, dtype, True, is_contiguous(shape, tensor.stride()))

    def share(self, buffer: Buffer, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        return buffer.bytes.view(dtype).reshape(shape)


def _copy(to: Buffer, source: Buffer) -> None:
    to.bytes[:] = source.bytes


def _intercept(library: ModuleType, gpu: FakeGpu) -> None:
    """Have the double's execution contexts queue on the GPU: what a graph captures does not run yet."""

    def execute_async_v3(self: Any, stream_handle: int) -> bool:
        assert stream_handle == STREAM
        played = inside(self, always=True)
        state = {"active_optimization_profile": played.active_optimization_profile}
        state |= {"_shapes": dict(played._shapes), "_addresses": dict(played._addresses)}

        def replay() -> None:
            assert all(getattr(played, name) == value for name, value in state.items()), "not as captured"
            assert played.execute_async_v3(stream_handle)

        if gpu.capturing:
            gpu.queue("engine", replay)
            return True
        gpu.queued.append("engine")
        gpu.clock += 1
        return bool(original(self, stream_handle))

    original = library.IExecutionContext.execute_async_v3
    library.IExecutionContext.execute_async_v3 = execute_async_v3
