"""GPUs as the CUDA driver tells of them, and nvidia-smi."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vitdeploy.machine.gpus import Gpu, find_gpus, query_gpus

DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return INIT; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (attribute == 75) *value = device ? 9 : 8;
    else if (attribute == 76) *value = device ? 0 : 9;
    else return 1;
    return 0;
}
int cuDeviceGetName(char *name, int length, int device) {
    strncpy(name, device ? "NVIDIA H200" : "NVIDIA L4", length);
    return 0;
}
"""


def driver(folder: Path, init: int) -> str:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = folder / "driver.c", folder / "libcuda.so"
    source.write_text(DRIVER)
    subprocess.run([compiler, "-shared", "-fPIC", f"-DINIT={init}", "-o", library, source], check=True)
    return str(library)


def test_gpus_have_a_name_and_a_capability(tmp_path: Path) -> None:
    found = find_gpus(driver(tmp_path, init=0))
    assert found == [Gpu("NVIDIA L4", (8, 9)), Gpu("NVIDIA H200", (9, 0))]
    assert [gpu.arch for gpu in found] == ["sm_89", "sm_90"]


def test_a_driver_that_does_not_start_finds_none(tmp_path: Path) -> None:
    assert find_gpus(driver(tmp_path, init=100)) == []


def test_no_driver_finds_none() -> None:
    assert find_gpus("libthere-is-no-such-driver.so") == []


def answers(code: int, out: str = "", err: str = "") -> Any:
    return lambda command, **_: subprocess.CompletedProcess(command, code, out, err)


def raises(error: Exception) -> Any:
    def run(*_: object, **__: object) -> None:
        raise error

    return run


def test_gpus_of_nvidia_smi() -> None:
    gpus, reason = query_gpus(
        answers(0, "NVIDIA H200, 143771 MiB, 570.1, 9.0\nNVIDIA L4, 23034 MiB, 570.1, 8.9\n")
    )
    assert [(gpu["name"], gpu["compute_cap"]) for gpu in gpus] == [
        ("NVIDIA H200", "9.0"),
        ("NVIDIA L4", "8.9"),
    ]
    assert reason == ""


@pytest.mark.parametrize(
    "run, reason",
    [
        (raises(FileNotFoundError()), "no NVIDIA driver"),
        (raises(subprocess.TimeoutExpired("nvidia-smi", 10)), "does not answer"),
        (answers(9, "", "driver mismatch"), "failed: driver mismatch"),
        (answers(0, "\n"), "lists none"),
    ],
)
def test_no_gpus_of_nvidia_smi(run: Any, reason: str) -> None:
    gpus, why = query_gpus(run)
    assert gpus == ()
    assert reason in why
