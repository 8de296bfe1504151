"""Import before anything imports Triton: the kernels run in its interpreter where there is no GPU.

Triton decides when a kernel is defined, so all are imported here; the environment is put back, so that
this changes no other test of the process.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import sys
from collections.abc import Iterator

import pytest
import torch

ON_GPU = torch.cuda.is_available()


@contextlib.contextmanager
def environment() -> Iterator[None]:
    """What the interpreter needs while a kernel runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield


if not ON_GPU:
    assert "triton" not in sys.modules or "vitdeploy_kernels" in sys.modules, "Triton was imported too early"
    with environment():
        package = importlib.import_module("vitdeploy_kernels")
        for module in pkgutil.iter_modules(package.__path__, "vitdeploy_kernels."):
            importlib.import_module(module.name)
