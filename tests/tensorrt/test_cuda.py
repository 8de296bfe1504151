"""The GPU that engines run on, where none is: what is taken of ``cuda.core``, and what its absence says."""

from __future__ import annotations

import importlib
import inspect
import sys
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from vitdeploy.errors import DeviceUnavailable, MissingDependency, UsageError
from vitdeploy.tensorrt import cuda


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, path, arguments, names",
    [
        ("cuda.core", "Device", 1, ()),
        ("cuda.core", "Device.set_current", 1, ()),
        ("cuda.core", "Device.create_stream", 1, ()),
        ("cuda.core", "Device.allocate", 2, ("stream",)),
        ("cuda.core", "LegacyPinnedMemoryResource.allocate", 2, ()),
        ("cuda.core", "Buffer.copy_from", 2, ("stream",)),
        ("cuda.core", "Buffer.copy_to", 2, ("stream",)),
        ("cuda.core", "Stream.sync", 1, ()),
        ("cuda.core", "Stream.record", 1, ("options",)),
        ("cuda.core", "Stream.create_graph_builder", 1, ()),
        ("cuda.core.graph", "GraphBuilder.begin_building", 2, ()),
        ("cuda.core.graph", "GraphBuilder.end_building", 1, ()),
        ("cuda.core.graph", "GraphBuilder.complete", 1, ()),
        ("cuda.core.graph", "Graph.launch", 2, ()),
        ("cuda.core.utils", "StridedMemoryView.from_any_interface", 1, ("stream_ptr",)),
        ("cuda.core.utils", "StridedMemoryView.from_buffer", 2, ("dtype",)),
    ],
)
def test_every_call_is_one_that_cuda_core_takes(
    module: str, path: str, arguments: int, names: tuple[str, ...]
) -> None:
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    inspect.signature(found).bind(*[None] * arguments, **dict.fromkeys(names))


def test_every_attribute_is_there() -> None:
    from cuda.core import Buffer, Event, EventOptions, LegacyPinnedMemoryResource, Stream
    from cuda.core.graph import GraphBuilder
    from cuda.core.utils import StridedMemoryView

    assert LegacyPinnedMemoryResource().is_host_accessible
    assert hasattr(Buffer, "handle")
    assert hasattr(Stream, "handle")
    assert hasattr(Event, "__sub__")
    assert EventOptions(timing_enabled=True).timing_enabled
    assert "thread_local" in GraphBuilder.begin_building.__doc__
    for name in ("ptr", "shape", "strides", "dtype", "is_device_accessible", "__dlpack__"):
        assert hasattr(StridedMemoryView, name)


def test_without_a_driver_there_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(index: int) -> None:
        raise RuntimeError("no\ndriver")

    monkeypatch.setattr("cuda.core.Device", refuse)
    with pytest.raises(DeviceUnavailable, match="cuda:3 does not answer: no driver") as caught:
        cuda.CudaDevice(3)
    assert caught.value.exit_code == 3


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda.cuda_core_installed()
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(MissingDependency, match="running engines needs the library 'cuda-core'") as caught:
        cuda.CudaDevice(0)
    assert caught.value.hint == 'pip install "vitdeploy[tensorrt]"'


@pytest.mark.parametrize("answer", [None, ModuleNotFoundError("No module named 'cuda'")])
def test_whether_it_is_installed(answer: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> None:
        assert name == "cuda.core"
        if answer:
            raise answer

    monkeypatch.setattr("importlib.util.find_spec", find)
    assert not cuda.cuda_core_installed()


def view(tensor: object) -> cuda.DeviceView:
    """What the real ``StridedMemoryView`` says of a tensor on the host; no stream is waited for."""
    return cuda.CudaDevice.view(cast(cuda.CudaDevice, SimpleNamespace(handle=-1)), tensor)


@pytest.mark.parametrize(
    "tensor, contiguous",
    [
        (torch.zeros(2, 3, dtype=torch.float16), True),
        (torch.zeros(2, 3).t(), False),
        (torch.zeros(3, 1).expand(3, 4), False),
        (torch.zeros(4, 3)[2:3, :3], True),
        (torch.zeros(4, 6)[2:3, :3], True),  # of one row the stride does not matter
        (torch.zeros(4, 6)[1:3, :3], False),
        (torch.zeros(0, 3), True),
        (np.zeros((2, 3), np.uint8), True),
        (np.zeros((2, 6), np.uint8)[:, ::2], False),
    ],
)
def test_where_a_tensor_lies(tensor: Any, contiguous: bool) -> None:
    found = view(tensor)
    assert found.shape == tuple(tensor.shape)
    assert str(found.dtype) == str(tensor.dtype).removeprefix("torch.")
    assert not found.on_device
    assert found.contiguous == contiguous
    if found.shape[0]:
        assert found.address == (tensor.data_ptr() if torch.is_tensor(tensor) else tensor.ctypes.data)


@pytest.mark.parametrize("thing", ["text", None, torch.zeros(1, requires_grad=True), np.zeros(3, ">f4")])
def test_what_is_no_tensor(thing: object) -> None:
    with pytest.raises(UsageError, match="is no tensor that DLPack can share"):
        view(thing)


def test_time_is_noted_on_the_stream_and_read_in_seconds() -> None:
    class Stream:
        def record(self, *, options: Any) -> str:
            assert options.timing_enabled
            return "event"

    device = cast(cuda.CudaDevice, SimpleNamespace(_stream=Stream()))
    assert cuda.CudaDevice.record(device) == "event"
    assert (
        cuda.CudaDevice.seconds_between(device, cast(Any, 3.5), cast(Any, 5.0)) == 0.0015
    )  # of milliseconds


def test_pinned_memory_is_written_through() -> None:
    memory = np.zeros(16, np.uint8)
    seen = cuda.host_bytes(memory.ctypes.data, memory.size)
    seen[3:5] = (7, 9)
    assert memory.tolist()[2:6] == [0, 7, 9, 0]
    assert (seen.dtype, seen.shape) == (np.uint8, (16,))
