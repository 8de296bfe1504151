"""A CUDA driver for tests: compiled C that writes down what it is called with."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from vitdeploy_kernels.driver import CudaDriver

STREAM = 0x123456789A
"""What a test takes for torch's current stream; longer than 32 bits, as handles are."""


class FakeDriver(CudaDriver):
    """The driver over the recording library; memory of the CPU passes for that of GPU 0."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        self.recorder = library
        library.fake_log.restype = ctypes.c_char_p
        library.fake_reset()

    def ordinal(self, device: torch.device) -> int | None:
        return 0 if device.type == "cpu" else None

    def stream(self, ordinal: int) -> int:
        return STREAM + ordinal

    @property
    def log(self) -> list[str]:
        text: bytes = self.recorder.fake_log()
        return text.decode().splitlines()

    def layout(self, types: str) -> None:
        self.recorder.fake_layout(types.encode())

    def fail(self, function: str, code: int = 1) -> None:
        self.recorder.fake_fail(function.encode(), code)


def build(folder: Path) -> ctypes.CDLL:
    """Compile the recording library; skips the test where there is no C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = Path(__file__).with_suffix(".c"), folder / "fake_cuda.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    return ctypes.CDLL(str(library))
