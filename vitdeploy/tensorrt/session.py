"""An engine in memory: its profiles, its buffers, and a CUDA graph for each batch size that comes again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np

from vitdeploy.bundle.manifest import TensorSpec
from vitdeploy.config import BatchRange
from vitdeploy.errors import BundleError, UsageError
from vitdeploy.tensorrt.api import (
    ICudaEngine,
    IExecutionContext,
    IRuntimeCache,
    RtxCudaEngine,
    TensorRt,
    TensorRtForRtx,
)
from vitdeploy.tensorrt.caches import KernelCache
from vitdeploy.tensorrt.cuda import DeviceView, Staging

Array = np.ndarray[Any, Any]
_GRAPHS = 16
"""Batch sizes that have a graph of their own at most; others are queued call by call."""


class Device(Protocol):
    """What running needs of a GPU; ``vitdeploy.tensorrt.cuda.CudaDevice`` is the real one."""

    @property
    def handle(self) -> int: ...
    def activate(self) -> None: ...
    def allocate(self, size: int) -> Any: ...
    def stage(self, size: int) -> Staging: ...
    def upload(self, staging: Staging) -> None: ...
    def download(self, staging: Staging) -> None: ...
    def capture(self, work: Any) -> Any: ...
    def launch(self, graph: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record(self) -> Any: ...
    def seconds_between(self, start: Any, end: Any) -> float: ...
    def view(self, tensor: object) -> DeviceView: ...
    def share(self, buffer: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> object: ...


@dataclass
class Slot:
    """One optimization profile, ready to run."""

    index: int
    context: IExecutionContext
    runs: dict[int, int] = field(default_factory=dict)
    """How often each batch size has run without a graph."""
    graphs: dict[int, tuple[Any, IExecutionContext]] = field(default_factory=dict)
    """Graphs, each with a context that serves nothing else: what is changed in it would break its graph."""


class Engine:
    """A deserialised engine. Serves one thread at a time.

    Args:
        library: TensorRT.
        engine: what the runtime made of the bytes.
        inputs, outputs: its tensors, the batch as the first axis.
        profiles: batch sizes of each optimization profile.
        graphs: whether to replay CUDA graphs; TensorRT for RTX records its own.
        kernels: where TensorRT for RTX keeps what it compiles.

    Raises:
        BundleError: its tensors are not those of the manifest, or no context can be made.
    """

    def __init__(
        self,
        library: TensorRt,
        engine: ICudaEngine,
        device: Device,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        profiles: tuple[BatchRange, ...],
        *,
        graphs: bool,
        kernels: KernelCache | None = None,
    ) -> None:
        self._library, self._engine, self._device = library, engine, device
        self._inputs, self._outputs = inputs, outputs
        self._profiles = profiles
        self._graphs, self._kernels = graphs, kernels
        self._runtime_cache: IRuntimeCache | None = None
        self._slots: dict[int, Slot] = {}
        self._scratch: Any = None
        self.device_seconds: float | None = None
        """Of the last run, from its first copy to its last on the GPU's clock, if it was to be timed."""
        largest = max(profile.max for profile in profiles)
        self._staging = {spec.name: device.stage(tensor_bytes(spec, largest)) for spec in (*inputs, *outputs)}
        self._check_profiles()

    def run(self, arrays: Mapping[str, Array], *, timed: bool = False) -> dict[str, Array]:
        """Compute all outputs of arrays on the host; checked already, C-contiguous.

        Args:
            timed: whether ``device_seconds`` is to say how long the GPU was at it, its copies included.
        """
        self._device.activate()
        batch = next(iter(arrays.values())).shape[0]
        slot = self._slot(batch)
        for name, array in arrays.items():
            self._staging[name].host[: array.nbytes] = array.reshape(-1).view(np.uint8)
        events = [self._device.record()] if timed else []
        graph = slot.graphs.get(batch)
        if graph is not None:
            self._device.launch(graph[0])
        else:
            self._queue(slot.context, batch)
        if timed:
            events.append(self._device.record())
        if graph is None:
            self._remember(slot, batch)
        self._device.synchronize()
        self.device_seconds = self._device.seconds_between(*events) if timed else None
        return {spec.name: self._result(spec, batch) for spec in self._outputs}

    def run_tensors(self, tensors: Mapping[str, object]) -> dict[str, object]:
        """Compute all outputs of tensors that lie on the GPU, without a copy to the host.

        Args:
            tensors: by name, anything that speaks DLPack or the CUDA array interface, C-contiguous.

        Returns:
            Tensors on the GPU, complete, that other libraries take by DLPack.

        Raises:
            UsageError: a tensor has another dtype or shape, or lies elsewhere.
            BundleError: the engine fails.
        """
        self._device.activate()
        views = {spec.name: self._checked(spec, tensors) for spec in self._inputs}
        batch = next(iter(views.values())).shape[0]
        slot = self._slot(batch)
        addresses = {name: view.address for name, view in views.items()}
        results = {}
        for spec in self._outputs:
            buffer = self._device.allocate(tensor_bytes(spec, batch))
            addresses[spec.name] = int(buffer.handle)
            results[spec.name] = self._device.share(buffer, tensor_shape(spec, batch), np.dtype(spec.dtype))
        self._execute(slot.context, batch, addresses)
        self._device.synchronize()
        return results

    def close(self) -> None:
        """Keep what was compiled, and free the memory."""
        if self._kernels is not None and self._runtime_cache is not None:
            self._kernels.save(self._runtime_cache)
        self._slots.clear()
        self._staging.clear()
        self._scratch = None

    def _check_profiles(self) -> None:
        """Hold the engine's own profiles against what its record says."""
        spec = self._inputs[0]
        if not isinstance(spec.shape[0], str):
            return
        ranges = []
        for index in range(self._engine.num_optimization_profiles):
            shapes = self._engine.get_tensor_profile_shape(spec.name, index)
            ranges.append(tuple(int(shape[0]) for shape in shapes))
        recorded = [(batch.min, batch.opt, batch.max) for batch in self._profiles]
        if ranges != recorded:
            raise BundleError(f"the engine's profiles are {ranges}, and its record says {recorded}")

    def _slot(self, batch: int) -> Slot:
        """The tightest profile that serves a batch size, with its context."""
        fits = [i for i, profile in enumerate(self._profiles) if profile.min <= batch <= profile.max]
        if not fits:
            served = ", ".join(f"{profile.min} to {profile.max}" for profile in self._profiles)
            raise UsageError(f"batch size {batch}, but the engine's profiles serve {served}")
        index = min(fits, key=lambda i: (self._profiles[i].max - self._profiles[i].min, i))
        if index not in self._slots:
            context = self._ready(index)
            if context is None:
                raise BundleError("the engine gives no execution context: is the GPU's memory full?")
            self._slots[index] = Slot(index, context)
        return self._slots[index]

    def _ready(self, index: int) -> IExecutionContext | None:
        """A new context with an optimization profile; None if there is no memory for it."""
        context = self._rtx_context() if self._kernels is not None else self._context()
        ok = context is not None and context.set_optimization_profile_async(index, self._device.handle)
        return context if ok else None

    def _context(self) -> IExecutionContext | None:
        """A context that shares its working memory with all others: one after the other runs."""
        strategy = self._library.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is not None:
            size = max(1, self._engine.device_memory_size_v2)
            if self._scratch is None:
                self._scratch = self._device.allocate(size)
            context.set_device_memory(int(self._scratch.handle), size)
        return context

    def _rtx_context(self) -> IExecutionContext | None:
        """A context of TensorRT for RTX, which keeps the kernels it compiles and records graphs by itself."""
        assert self._kernels is not None
        engine = cast(RtxCudaEngine, self._engine)
        config = engine.create_runtime_config()
        config.cuda_graph_strategy = cast(TensorRtForRtx, self._library).CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._runtime_cache is None:
            self._runtime_cache = config.create_runtime_cache()
            self._kernels.load(self._runtime_cache)
        config.set_runtime_cache(self._runtime_cache)
        return engine.create_execution_context(config)

    def _queue(self, context: IExecutionContext, batch: int) -> None:
        """Queue the copies and the engine for one batch."""
        for spec in self._inputs:
            self._device.upload(self._staging[spec.name])
        self._execute(context, batch, {name: staging.address for name, staging in self._staging.items()})
        for spec in self._outputs:
            self._device.download(self._staging[spec.name])

    def _execute(self, context: IExecutionContext, batch: int, addresses: Mapping[str, int]) -> None:
        ok = all(context.set_input_shape(spec.name, tensor_shape(spec, batch)) for spec in self._inputs)
        ok = ok and all(context.set_tensor_address(name, address) for name, address in addresses.items())
        if not ok or not context.execute_async_v3(self._device.handle):
            raise BundleError(f"TensorRT could not run the engine at batch size {batch}")

    def _remember(self, slot: Slot, batch: int) -> None:
        """Record a graph once a batch size has run and comes again: the first run sets up what it needs."""
        slot.runs[batch] = slot.runs.get(batch, 0) + 1
        if not self._graphs or slot.runs[batch] != 2 or len(slot.graphs) >= _GRAPHS:
            return
        self._device.synchronize()
        if (context := self._ready(slot.index)) is None:
            return
        self._queue(context, batch)  # takes over the shapes, which a capture cannot
        self._device.synchronize()
        slot.graphs[batch] = self._device.capture(lambda: self._queue(context, batch)), context

    def _result(self, spec: TensorSpec, batch: int) -> Array:
        shape, dtype = tensor_shape(spec, batch), np.dtype(spec.dtype)
        data = self._staging[spec.name].host[: tensor_bytes(spec, batch)]
        return data.view(dtype).reshape(shape).copy()

    def _checked(self, spec: TensorSpec, tensors: Mapping[str, object]) -> DeviceView:
        if spec.name not in tensors:
            raise UsageError(f"the engine needs the input {spec.name!r}")
        view = self._device.view(tensors[spec.name])
        batch = view.shape[0] if view.shape else 0
        if view.dtype != np.dtype(spec.dtype) or view.shape != tensor_shape(spec, batch):
            shape = ", ".join(str(size) for size in spec.shape)
            raise UsageError(f"{spec.name} must be ({shape}) {spec.dtype}, not {view.shape} {view.dtype}")
        if not view.on_device or not view.contiguous:
            raise UsageError(f"{spec.name} must lie on the GPU, row by row without gaps")
        return view


def tensor_shape(spec: TensorSpec, batch: int) -> tuple[int, ...]:
    """A tensor's shape at a batch size."""
    return tuple(batch if isinstance(size, str) else size for size in spec.shape)


def tensor_bytes(spec: TensorSpec, batch: int) -> int:
    """A tensor's bytes at a batch size."""
    return int(np.prod(tensor_shape(spec, batch))) * np.dtype(spec.dtype).itemsize
