"""Import before anything imports Triton: the kernels run in its interpreter where there is no GPU.

Triton decides when a kernel is defined, so all are imported here; the environment is put back, so that
this changes no other test of the process.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from vitdeploy_kernels.launch import Launch

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


def run_inside(launch: Launch) -> None:
    """Run a launch; interpreted, it may read and write between its tensors' first and last elements only.

    That shows accesses which change no result: rows past the end that are computed and never stored.
    """
    tensors = [value for value in launch.arguments.values() if isinstance(value, Tensor)]
    if tensors[0].device.type == "cuda":
        launch.run()
        return
    starts = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.uint64)
    ends = starts + np.array([_extent(tensor) for tensor in tensors], dtype=np.uint64)

    def checked(access: Callable[..., Any], mask_at: int) -> Callable[..., Any]:
        def method(builder: Any, pointers: Any, *rest: Any) -> Any:
            touched = pointers.data[np.broadcast_to(rest[mask_at].data, pointers.data.shape)].astype(
                np.uint64
            )
            size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
            inside = (touched[:, None] >= starts) & (touched[:, None] + np.uint64(size) <= ends)
            assert inside.any(axis=1).all(), "the kernel reaches outside of its tensors"
            return access(builder, pointers, *rest)

        return method

    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    with pytest.MonkeyPatch.context() as patch:
        for name, mask_at in (("create_masked_load", 0), ("create_masked_store", 1)):
            patch.setattr(builder, name, checked(getattr(builder, name), mask_at))
        launch.run()


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
