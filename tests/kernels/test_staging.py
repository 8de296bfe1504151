"""From the host and back: what is copied where, on which stream, and what waits for what."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from tests.fakes.torch_streams import FakeCuda
from tests.helpers import interpreter  # noqa: F401  (before anything imports a kernel)
from vitdeploy_kernels import staging
from vitdeploy_kernels.config import table_for
from vitdeploy_kernels.runner import VitRunner
from vitdeploy_kernels.staging import SLOTS, HostRunner, Memory
from vitdeploy_kernels.support import UnsupportedError
from vitdeploy_kernels.vit import VitShape, random_weights

SHAPE = VitShape(image_size=(16, 16), patch=8, width=32, depth=2, heads=2, mlp_width=64, classes=10)


class Doubling:
    """A runner whose GPU is not there: everything stays on the CPU, and the device is told all the same."""

    device = torch.device("cuda", 1)
    report = ("all fused",)

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda

    def __call__(self, images: Tensor) -> Tensor:
        if len(images) > 4:
            raise UnsupportedError("a batch of 5, and the runner was prepared for 1 to 4")
        self._cuda.log.append(f"compute on {self._cuda.current_stream(None).name}")
        return 2 * images.flatten(1).float()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    def allocate(size: int, device: torch.device | None) -> Tensor:
        cuda.log.append(f"{size} bytes " + ("pinned" if device is None else f"on {device}"))
        return torch.zeros(size, dtype=torch.uint8)

    cuda = FakeCuda(monkeypatch)
    monkeypatch.setattr(staging, "allocate", allocate)
    return cuda


def test_one_copy_each_way_on_streams_of_their_own(cuda: FakeCuda) -> None:
    run = HostRunner(Doubling(cuda))
    images = torch.arange(6, dtype=torch.uint8).view(2, 3)
    assert torch.equal(run(images), 2 * images.float())
    assert run.report == ("all fused",)
    up, work, down = "side 1", "side 2", "side 3"
    assert cuda.log == [
        *("6 bytes pinned", "6 bytes on cuda:1", "on cuda:1"),
        *(f"event 1 on {up}", f"{work} waits for event 1"),
        *(f"compute on {work}", f"event 2 on {work}", f"{down} waits for event 2"),
        *("24 bytes pinned", f"event 3 on {down}", "wait for event 3"),
    ]


def test_memory_is_taken_once_and_results_are_tensors_of_their_own(cuda: FakeCuda) -> None:
    run = HostRunner(Doubling(cuda))
    first = run(torch.full((4, 2), 1.0))
    for count in (3, 4, 1, 2):
        run(torch.full((count, 2), 5.0))
    assert torch.equal(first, torch.full((4, 2), 2.0))
    assert sum("bytes" in line for line in cuda.log) == 3 * SLOTS


def test_a_refused_batch_leaves_its_place_to_the_next(cuda: FakeCuda) -> None:
    run = HostRunner(Doubling(cuda))
    for _ in range(SLOTS + 1):
        with pytest.raises(UnsupportedError, match="a batch of 5"):
            run(torch.zeros(5, 2))
        assert cuda.log[-1] == "synchronize cuda:1"  # the copy that was begun
    assert torch.equal(run(torch.ones(1, 2)), torch.full((1, 2), 2.0))


def test_batches_of_several_threads_are_on_their_way_at_once(cuda: FakeCuda) -> None:
    together = threading.Barrier(SLOTS)

    class Meeting(Doubling):
        def __call__(self, images: Tensor) -> Tensor:
            together.wait(60)  # only if another thread's batch is on its way, too
            return super().__call__(images)

    run = HostRunner(Meeting(cuda))
    batches = [torch.full((2, 3), float(value)) for value in range(4 * SLOTS)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, batches))
    assert all(torch.equal(result, 2 * batch) for result, batch in zip(results, batches, strict=True))


def test_memory_serves_other_dtypes_and_shapes(cuda: FakeCuda) -> None:
    memory = Memory()
    assert memory.take(torch.Size([4, 3]), torch.float32).shape == (4, 3)
    assert memory.take(torch.Size([2, 6]), torch.uint8).is_contiguous()
    assert memory.take(torch.Size([3, 4]), torch.float16).dtype == torch.float16
    assert [line for line in cuda.log if "bytes" in line] == ["48 bytes pinned"]


def test_in_the_interpreter_a_batch_is_computed_where_it_lies(device: torch.device) -> None:
    """On a GPU: what comes back is what the runner gives, from several threads as well."""
    runner = VitRunner(
        SHAPE, random_weights(SHAPE, torch.float16, device), batches=[2], table=table_for(device)
    )
    run = HostRunner(runner)
    images = [torch.randn(SHAPE.image_shape(count)) for count in (2, 1, 2)]
    expected = [runner(image.to(device)).cpu() for image in images]
    assert run.report == runner.report
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, images))
    for result, wanted in zip(results, expected, strict=True):
        assert result.device.type == "cpu"
        assert torch.equal(result, wanted)
