"""Cubins are launched with the right parameters: a recording library takes the CUDA driver's place."""

from __future__ import annotations

import ctypes
import dataclasses
import re
import threading
from pathlib import Path

import pytest
import torch

from tests.fakes import cuda
from tests.fakes.cuda import STREAM, FakeDriver
from tests.helpers.kernel_launches import layernorm_linear_launch
from vitdeploy_kernels.driver import Binary, CubinKernel, CudaDriver, DriverError, aligned
from vitdeploy_kernels.launch import Launch

TYPES = ("*fp16", "*fp32", "*fp16", "*fp32", "*fp32", "*fp16", "i32", "fp32", "scratch", "scratch")
SMALL = Binary("layernorm_linear_kernel", b"\x7fELF and more", TYPES, shared=49152, warps=4)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return cuda.build(tmp_path_factory.mktemp("fake_cuda"))


@pytest.fixture
def driver(library: ctypes.CDLL) -> FakeDriver:
    driver = FakeDriver(library)
    driver.layout("ppppppifpp")
    return driver


@pytest.fixture
def launch() -> Launch:
    """With tensors that have memory."""
    made = layernorm_linear_launch()
    arguments = {
        name: torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
        for name, value in made.arguments.items()
    }
    return dataclasses.replace(made, arguments=arguments)


def addresses(launch: Launch) -> str:
    return " ".join(
        str(value.data_ptr()) for value in launch.arguments.values() if isinstance(value, torch.Tensor)
    )


def test_launch_passes_what_the_kernel_reads(driver: FakeDriver, launch: Launch) -> None:
    CubinKernel(driver, SMALL, 0).launch(launch)
    tiles = 7 * 4
    assert driver.log == [
        "retain 10",
        "context 700000000a",
        "load \x7fELF and",
        "function 5000000000 layernorm_linear_kernel",
        f"launch 6000000000 grid {tiles} 1 1 block 128 1 1 shared 49152 stream {STREAM:x} extra (nil) :"
        f" {addresses(launch)} 394 9.99999997e-07 0 0",
    ]


@pytest.mark.parametrize("rows, letter", [(-1, "i"), (2**31 - 1, "i"), (2**31, "l"), (-(2**40), "l")])
def test_integers_keep_their_value(driver: FakeDriver, launch: Launch, rows: int, letter: str) -> None:
    kind = {"i": "i32", "l": "i64"}[letter]
    driver.layout(f"pppppp{letter}fpp")
    binary = dataclasses.replace(SMALL, parameters=(*TYPES[:6], kind, *TYPES[7:]))
    arguments = {**launch.arguments, "rows": rows, "eps": 0.1}
    CubinKernel(driver, binary, 0).launch(dataclasses.replace(launch, arguments=arguments))
    assert driver.log[-1].endswith(f" {rows} 0.100000001 0 0")


def test_order_is_the_kernels_not_the_launchs(driver: FakeDriver, launch: Launch) -> None:
    backwards = dataclasses.replace(launch, arguments=dict(reversed(launch.arguments.items())))
    CubinKernel(driver, SMALL, 0).launch(backwards)
    assert f": {addresses(launch)} 394 " in driver.log[-1]


def test_grid_has_three_axes_and_an_empty_one_is_no_launch(driver: FakeDriver, launch: Launch) -> None:
    kernel = CubinKernel(driver, SMALL, 0)
    kernel.launch(dataclasses.replace(launch, grid=(2, 3, 4)))
    assert " grid 2 3 4 block " in driver.log[-1]
    before = driver.log
    kernel.launch(dataclasses.replace(launch, grid=(2, 0)))
    assert driver.log == before


def test_large_shared_memory_is_asked_for(driver: FakeDriver, launch: Launch) -> None:
    CubinKernel(driver, dataclasses.replace(SMALL, shared=98304, warps=8), 0).launch(launch)
    assert driver.log[-3:-1] == ["cache 6000000000 1", "attribute 6000000000 8 98304"]
    assert " block 256 1 1 shared 98304 " in driver.log[-1]


def test_the_context_of_the_gpu_is_made_current_and_put_back(driver: FakeDriver, launch: Launch) -> None:
    first, second = CubinKernel(driver, SMALL, 0), CubinKernel(driver, SMALL, 1)
    start = len(driver.log)
    second.launch(launch)
    first.launch(launch)
    said = [line for line in driver.log[start:] if not line.startswith("launch")]
    assert said == ["context 700000000b", "context 700000000a"]
    assert f"stream {STREAM + 1:x} " in driver.log[start + 1]
    thread = threading.Thread(target=first.launch, args=(launch,))
    thread.start()
    thread.join()
    assert driver.log[-1].startswith("launch")


@pytest.mark.parametrize(
    "function",
    [
        "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxGetCurrent", "cuCtxSetCurrent", "cuModuleLoadData",
        "cuModuleGetFunction", "cuFuncSetCacheConfig", "cuFuncSetAttribute", "cuLaunchKernel",
    ],
)  # fmt: skip
def test_every_code_is_checked(driver: FakeDriver, launch: Launch, function: str) -> None:
    driver.fail(function)
    with pytest.raises(DriverError, match=f"{function}: CUDA_ERROR_INVALID_VALUE: invalid argument"):
        CubinKernel(driver, dataclasses.replace(SMALL, shared=98304), 0).launch(launch)


def test_a_code_without_a_name(driver: FakeDriver, launch: Launch) -> None:
    driver.fail("cuLaunchKernel", 12345)
    with pytest.raises(DriverError, match="cuLaunchKernel: error 12345: error 12345"):
        CubinKernel(driver, SMALL, 0).launch(launch)


def test_other_types_than_compiled_are_refused(driver: FakeDriver, launch: Launch) -> None:
    kernel = CubinKernel(driver, SMALL, 0)
    for name, value in (("rows", 2**31), ("eps", 1), ("x_ptr", torch.zeros(394, 128))):
        with pytest.raises(DriverError, match=r"was compiled for .*, and is given"):
            kernel.launch(dataclasses.replace(launch, arguments={**launch.arguments, name: value}))
    assert not any(line.startswith("launch") for line in driver.log)


def test_misaligned_tensors_are_refused(driver: FakeDriver, launch: Launch) -> None:
    shifted = torch.zeros(394 * 128 + 4, dtype=torch.float16)[4:].view(394, 128)
    assert shifted.data_ptr() % 16 == 8
    moved = dataclasses.replace(launch, arguments={**launch.arguments, "x_ptr": shifted})
    assert aligned(launch)
    assert not aligned(moved)
    with pytest.raises(DriverError, match="not aligned to 16 bytes"):
        CubinKernel(driver, SMALL, 0).launch(moved)


def test_no_driver(tmp_path: Path) -> None:
    with pytest.raises(DriverError, match="no usable CUDA driver"):
        CudaDriver(ctypes.CDLL(None))
    if not Path("/proc/driver/nvidia").exists() and not torch.cuda.is_available():
        with pytest.raises(DriverError, match=re.escape("libcuda.so.1")):
            CudaDriver()


def test_only_gpus_have_an_ordinal(library: ctypes.CDLL) -> None:
    driver = CudaDriver(library)
    assert driver.ordinal(torch.device("cpu")) is None
    assert driver.ordinal(torch.device("meta")) is None
    assert driver.ordinal(torch.device("cuda", 3)) == 3
