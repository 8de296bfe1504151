"""A folder of cubins: what is written is what is launched, and a damaged folder is refused."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakes import cuda
from tests.fakes.cuda import FakeDriver
from tests.helpers.kernel_launches import layernorm_linear_launch
from tests.helpers.kernel_tensors import TOLERANCE
from vitdeploy_kernels import package
from vitdeploy_kernels.aot import AotError, launch_key
from vitdeploy_kernels.config import table_for
from vitdeploy_kernels.driver import DriverError
from vitdeploy_kernels.launch import Launch
from vitdeploy_kernels.package import Package, PackageError, architectures_for, load_package, write_package
from vitdeploy_kernels.plans import launches
from vitdeploy_kernels.runner import VitRunner
from vitdeploy_kernels.support import Unsupported
from vitdeploy_kernels.vit import VitShape, random_weights

WIDE = dataclasses.replace(
    layernorm_linear_launch(), constants={**layernorm_linear_launch().constants, "GROUP": 2}
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return cuda.build(tmp_path_factory.mktemp("fake_cuda"))


@pytest.fixture
def driver(library: ctypes.CDLL) -> FakeDriver:
    driver = FakeDriver(library)
    driver.layout("ppppppifpp")
    return driver


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package") / "kernels"
    batches = [layernorm_linear_launch(rows=rows) for rows in (197, 394)]
    write_package(folder, {"sm_80": [*batches, WIDE], "sm_90": batches})
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "kernels"))


def with_memory(launch: Launch) -> Launch:
    arguments = {
        name: torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
        for name, value in launch.arguments.items()
    }
    return dataclasses.replace(launch, arguments=arguments)


def opened(folder: Path, driver: FakeDriver, capability: tuple[int, int] = (9, 0)) -> Package:
    loaded = load_package(folder, capability, driver=driver)
    assert isinstance(loaded, Package), loaded
    return loaded


def edit(folder: Path, change: Callable[[dict[str, Any]], object], arch: str = "sm_90") -> None:
    """Change the index of an architecture."""
    path = folder / arch / "kernels.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def edit_kernel(folder: Path, name: str, value: object) -> None:
    """Change a field of the only kernel of sm_90."""
    edit(folder, lambda index: next(iter(index["kernels"].values())).update({name: value}))


def test_each_distinct_kernel_is_written_once(written: Path) -> None:
    narrow, wide = launch_key(layernorm_linear_launch()), launch_key(WIDE)
    names = {str(path.relative_to(written)) for path in written.rglob("*") if path.is_file()}
    assert names == {
        "sm_80/kernels.json", f"sm_80/{narrow}.cubin", f"sm_80/{wide}.cubin",
        "sm_90/kernels.json", f"sm_90/{narrow}.cubin",
    }  # fmt: skip
    index = json.loads((written / "sm_90/kernels.json").read_text())
    assert (index["schema"], index["arch"]) == (1, "sm_90")
    assert index["triton"].startswith("3.")
    row = index["kernels"][narrow]
    cubin = (written / f"sm_90/{narrow}.cubin").read_bytes()
    assert row["name"] == "layernorm_linear_kernel"
    assert row["parameters"][-3:] == ["fp32", "scratch", "scratch"]
    assert (row["size"], row["sha256"]) == (len(cubin), hashlib.sha256(cubin).hexdigest())
    assert row["warps"] == 4


def test_existing_architecture_is_not_overwritten(folder: Path) -> None:
    with pytest.raises(FileExistsError, match="sm_90 is there already"):
        write_package(folder, {"sm_100": [], "sm_90": []})
    assert not (folder / "sm_100").exists()


def test_nothing_is_written_if_a_kernel_does_not_compile(tmp_path: Path) -> None:
    broken = dataclasses.replace(WIDE, constants={**WIDE.constants, "BLOCK_K": 48})
    with pytest.raises(AotError):
        write_package(tmp_path / "kernels", {"sm_90": [broken]})
    assert not (tmp_path / "kernels").exists()
    with pytest.raises(AotError, match="unknown architecture"):
        write_package(tmp_path / "kernels", {"sm_91": []})


def test_run_launches_the_cubin(folder: Path, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiles(*_: object, **__: object) -> None:
        raise AssertionError("something was compiled")

    monkeypatch.setattr("triton.compile", compiles)
    monkeypatch.setattr("subprocess.Popen", compiles)
    loaded = opened(folder, driver)
    for rows in (197, 5):
        assert loaded.run(with_memory(layernorm_linear_launch(rows=rows)))
        assert f" {rows} 9.99999997e-07 0 0" in driver.log[-1]
    assert sum(line.startswith("load ") for line in driver.log) == 1
    assert sum(line.startswith("launch ") for line in driver.log) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_this_gpu_the_cubins_compute_what_kernels_compiled_in_place_do(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """Written, loaded and launched through the real driver, in CUDA graphs; nothing is compiled in place."""
    gpu = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(gpu)
    (arch, *_) = architectures_for(capability)
    shape = VitShape(image_size=(32, 48), patch=8, width=64, depth=3, heads=2, mlp_width=96, classes=10)
    weights, table = random_weights(shape, dtype, gpu), table_for(gpu)
    needed = [launch for batch in (1, 4) for _, launch in launches(shape, dtype, batch, table)]
    write_package(tmp_path / "kernels", {arch: needed}, processes=os.cpu_count() or 1)
    loaded = load_package(tmp_path / "kernels", capability)
    assert isinstance(loaded, Package), loaded

    def execute(launch: Launch) -> None:
        assert loaded.run(launch), f"there is no cubin for {launch.name}"

    packaged = VitRunner(shape, weights, batches=[1, 4], table=table, execute=execute)
    compiled = VitRunner(shape, weights, batches=[1, 4], table=table)
    for count in (1, 3, 4):
        images = torch.randn(shape.image_shape(count), device=gpu)
        expected = compiled(images).double()
        difference = (packaged(images).double() - expected).norm(dim=1) / expected.norm(dim=1)
        assert float(difference.max()) < TOLERANCE[dtype]


def test_run_leaves_what_it_has_no_cubin_for(folder: Path, driver: FakeDriver) -> None:
    loaded = opened(folder, driver)
    assert not loaded.run(with_memory(WIDE))
    assert not loaded.run(layernorm_linear_launch()), "meta tensors have no memory"
    launch = with_memory(layernorm_linear_launch())
    x = torch.zeros(394 * 128 + 4, dtype=torch.float16)[4:].view(394, 128)
    assert not loaded.run(dataclasses.replace(launch, arguments={**launch.arguments, "x_ptr": x}))
    assert not any(line.startswith("l") for line in driver.log)


def test_a_refusal_of_the_driver_is_raised(folder: Path, driver: FakeDriver) -> None:
    loaded = opened(folder, driver)
    driver.fail("cuModuleLoadData")
    with pytest.raises(DriverError, match="cuModuleLoadData"):
        loaded.run(with_memory(layernorm_linear_launch()))


@pytest.mark.parametrize(
    "capability, runs",
    [
        ((8, 0), ["sm_80"]),
        ((8, 6), ["sm_80"]),
        ((8, 9), ["sm_89", "sm_80"]),
        ((9, 0), ["sm_90"]),
        ((10, 0), ["sm_100"]),
        ((10, 3), []),
        ((12, 0), ["sm_120"]),
        ((12, 1), []),
        ((7, 5), []),
        ((13, 0), []),
    ],
)
def test_which_cubins_a_gpu_runs(capability: tuple[int, int], runs: list[str]) -> None:
    assert architectures_for(capability) == runs


def test_the_gpus_cubins_are_picked(folder: Path, driver: FakeDriver) -> None:
    assert opened(folder, driver, (8, 0)).arch == "sm_80"
    assert opened(folder, driver, (8, 9)).arch == "sm_80"
    missing = load_package(folder, (10, 3), driver=driver)
    assert isinstance(missing, Unsupported)
    assert missing.reason == "no cubins for compute capability 10.3 (there are sm_80, sm_90)"
    nothing = load_package(folder / "nowhere", (9, 0), driver=driver)
    assert isinstance(nothing, Unsupported)
    assert "there are none at all" in nothing.reason


def test_cubins_that_need_more_shared_memory_than_the_gpu_has_are_left_out(
    folder: Path, driver: FakeDriver
) -> None:
    def enlarge(index: dict[str, Any]) -> None:
        index["kernels"][launch_key(WIDE)]["shared"] = 128 * 1024

    edit(folder, enlarge, "sm_80")
    assert [*opened(folder, driver, (8, 6)).binaries] == [launch_key(layernorm_linear_launch())]
    assert len(opened(folder, driver, (8, 0)).binaries) == 2


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("name", "a;b", "is not the name of a function"),
        ("name", 3, "is not the name of a function"),
        ("parameters", "*fp16", "are not a list"),
        ("parameters", ["i32"] * 65, "at most 64"),
        ("parameters", ["*fp8"], "unknown type"),
        ("parameters", [["i32"]], "unknown type"),
        ("shared", -1, "shared must be from 0"),
        ("shared", True, "shared must be from 0"),
        ("shared", 2**40, "shared must be from 0"),
        ("warps", 33, "warps must be from 1 to 32"),
        ("warps", None, "warps must be from 1 to 32"),
        ("size", 1, "size or sha256 differ"),
        ("size", 2**62, "size must be from 1"),
        ("sha256", "0" * 64, "size or sha256 differ"),
        ("sha256", None, "size or sha256 differ"),
    ],
)
def test_damaged_row(folder: Path, driver: FakeDriver, field: str, value: object, said: str) -> None:
    edit_kernel(folder, field, value)
    with pytest.raises(PackageError, match=said):
        load_package(folder, (9, 0), driver=driver)


@pytest.mark.parametrize(
    "key", ["../" + "0" * 61, "/etc/passwd", "0" * 63, "0" * 65, "A" * 64, "0" * 64 + "\n", ""]
)
def test_a_key_is_no_path(folder: Path, driver: FakeDriver, key: str) -> None:
    edit(folder, lambda index: index["kernels"].update({key: {}}))
    with pytest.raises(PackageError, match="is not a key of a kernel"):
        load_package(folder, (9, 0), driver=driver)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda index: index.update(schema=2), "schema 2 is not known"),
        (lambda index: index.update(arch="sm_80"), "is for 'sm_80', in the folder of sm_90"),
        (lambda index: index.update(kernels=[]), "an object is wanted where list is"),
        (lambda index: index.update(kernels={"0" * 64: 1}), "an object is wanted where int is"),
        (lambda index: index.update(kernels={str(i): {} for i in range(4097)}), "4096 are the most"),
    ],
)
def test_damaged_index(
    folder: Path, driver: FakeDriver, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    edit(folder, change)
    with pytest.raises(PackageError, match=said):
        load_package(folder, (9, 0), driver=driver)


@pytest.mark.parametrize("text", ["", "[1", "[]", "\udcff", "[" * 100_000], ids=lambda text: repr(text[:9]))
def test_an_index_that_is_none(folder: Path, driver: FakeDriver, text: str) -> None:
    (folder / "sm_90/kernels.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(PackageError, match=r"kernels\.json"):
        load_package(folder, (9, 0), driver=driver)


def test_files_that_are_not_plain(folder: Path, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    (cubin,) = (folder / "sm_90").glob("*.cubin")
    elsewhere = cubin.rename(folder / "elsewhere")
    with pytest.raises(PackageError, match=r"\.cubin: cannot be read: No such file"):
        load_package(folder, (9, 0), driver=driver)
    cubin.symlink_to(elsewhere)
    with pytest.raises(PackageError, match=r"\.cubin: cannot be read"):
        load_package(folder, (9, 0), driver=driver)
    cubin.unlink()
    cubin.mkdir()
    with pytest.raises(PackageError, match=r"\.cubin"):
        load_package(folder, (9, 0), driver=driver)
    monkeypatch.setattr(package, "LARGEST_INDEX", 10)
    with pytest.raises(PackageError, match="is larger than 10 bytes"):
        load_package(folder, (9, 0), driver=driver)
