"""From the host and back: pinned buffers, and copies that overlap with what the GPU computes meanwhile."""

from __future__ import annotations

import queue
from typing import Protocol

import torch
from torch import Tensor

SLOTS = 2
"""Batches on their way at a time: one is computed while the next one is copied in, or the last one out."""


class Runner(Protocol):
    """What is run; :class:`vitdeploy_kernels.runner.VitRunner` is the real one."""

    @property
    def device(self) -> torch.device: ...
    @property
    def report(self) -> tuple[str, ...]: ...
    def __call__(self, images: Tensor) -> Tensor: ...


class HostRunner:
    """Runs batches that lie on the host. Threads may share it; their copies and computations then overlap.

    The driver copies memory of the host that is not pinned piece by piece through a small buffer of its own,
    while caller and GPU wait. Here a batch is written to pinned memory once, goes to the GPU in one copy on a
    stream of its own, and its output comes back in one, on another: while one thread's batch is computed, the
    next one's is copied. In the interpreter a batch is computed where it lies.

    Args:
        runner: of the model.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner, self._gpu = runner, runner.device
        self._idle: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        if self._gpu.type == "cuda":
            self._up, self._work, self._down = (torch.cuda.Stream(self._gpu) for _ in range(3))
            for _ in range(SLOTS):
                self._idle.put(_Slot())

    @property
    def report(self) -> tuple[str, ...]:
        """The runner's fusion report."""
        return self._runner.report

    def __call__(self, images: Tensor) -> Tensor:
        """Compute the output of a batch.

        Args:
            images: on the host, as the runner takes them.

        Returns:
            The output on the host, complete, a tensor of its own.

        Raises:
            UnsupportedError: a shape, dtype or batch size that was not prepared.
        """
        if self._gpu.type != "cuda":
            return self._runner(images)
        slot = self._idle.get()
        try:
            return self._through(slot, images)
        except BaseException:
            torch.cuda.synchronize(self._gpu)  # what was begun uses the slot's memory
            raise
        finally:
            self._idle.put(slot)

    def _through(self, slot: _Slot, images: Tensor) -> Tensor:
        source = slot.source.take(images.shape, images.dtype)
        near = slot.near.take(images.shape, images.dtype, self._gpu)
        source.copy_(images)
        with torch.cuda.device(self._gpu):
            with torch.cuda.stream(self._up):
                near.copy_(source, non_blocking=True)
                slot.arrived.record(self._up)
            self._work.wait_event(slot.arrived)
            with torch.cuda.stream(self._work):
                output = self._runner(near)
                slot.computed.record(self._work)
            self._down.wait_event(slot.computed)
            with torch.cuda.stream(self._down):
                result = slot.result.take(output.shape, output.dtype)
                result.copy_(output, non_blocking=True)
                slot.done.record(self._down)
            # Until then the memory of slot and output is in use, on streams that the allocator has not seen.
            slot.done.synchronize()
        return result.clone()


class _Slot:
    """Memory of one batch on its way, and the events of its stations."""

    def __init__(self) -> None:
        self.arrived, self.computed, self.done = (torch.cuda.Event() for _ in range(3))
        self.source, self.near, self.result = Memory(), Memory(), Memory()


class Memory:
    """Memory that grows to the largest tensor that was asked for, and serves smaller ones."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: torch.Size, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """A contiguous tensor in it: on a GPU, or pinned on the host where no device is named."""
        size = shape.numel() * dtype.itemsize
        if self._bytes.numel() < size:
            self._bytes = allocate(size, device)
        return self._bytes[:size].view(dtype).view(shape)


def allocate(size: int, device: torch.device | None) -> Tensor:
    """Bytes on a GPU, or pinned on the host."""
    if device is None:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return torch.empty(size, dtype=torch.uint8, device=device)
