"""CUDA graphs, and whose turn it is: how a runner shares a GPU with other threads, streams and runners."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch

_CAPTURING = threading.Lock()
"""One graph at a time in a process: the generators of random numbers and the allocator know one capture."""


def capture(run: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """What ``run`` queues on a GPU, as a graph. It runs once before, so that kernels are compiled and loaded.

    Other threads may use the GPU meanwhile, load a model on it or capture a graph of their own: what they do
    is no part of this graph ("thread_local"), and captures take turns. The graph has a workspace of cuBLAS of
    its own. That of the stream would be shared with every graph that was captured on the same stream, and
    PyTorch deals streams from a small pool: two graphs that run side by side would both write into it.

    Args:
        run: queues work on the current stream, on memory that stays where it is.
        device: of that memory.
    """
    with _CAPTURING, torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        torch._C._cuda_clearCublasWorkspaces()
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                run()
        finally:
            torch._C._cuda_clearCublasWorkspaces()
    return graph


class Turns:
    """Lets callers at one set of buffers one after the other, whatever thread or stream they are on.

    On a GPU a caller's work is queued, not done, when its turn ends: the next one's stream waits for it.

    Args:
        device: of the buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._done = torch.cuda.Event() if device.type == "cuda" else None

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for one's turn; in it, the device of the buffers is the current one."""
        with self._lock:
            if self._done is None:
                yield
                return
            with torch.cuda.device(self._device):
                stream = torch.cuda.current_stream(self._device)
                stream.wait_event(self._done)
                try:
                    yield
                finally:
                    self._done.record(stream)
