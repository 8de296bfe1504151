"""Compiling ahead, in the interpreter's environment and with a compiler of the test's own."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.kernel_launches import layernorm_linear_launch
from vitdeploy_kernels import warming
from vitdeploy_kernels.config import table_for
from vitdeploy_kernels.vit import VitShape
from vitdeploy_kernels.warming import Warmer, warm


def test_the_stub_of_the_launcher_is_built_with_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton builds it when ``run`` is read, which nobody but the launching process would do."""
    done: list[str] = []

    class Compiled:
        @property
        def run(self) -> object:
            done.append("stub")
            return None

    def warmup(**given: Any) -> Compiled:
        assert given["num_warps"] == 4
        done.append("kernel")
        return Compiled()

    launch = dataclasses.replace(layernorm_linear_launch(), kernel=SimpleNamespace(warmup=warmup))
    monkeypatch.setattr(warming, "interpreted", lambda: False)
    warm(launch)
    assert done == ["kernel", "stub"]


def test_there_is_nothing_to_compile_for_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    def warmup(**given: Any) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(warming, "interpreted", lambda: True)
    warm(dataclasses.replace(layernorm_linear_launch(), kernel=SimpleNamespace(warmup=warmup)))


def test_distinct_binaries_of_a_plan_are_compiled_once_each() -> None:
    """Batches share theirs where the configuration is the same."""
    shape = VitShape(image_size=(16, 16), patch=8, width=32, depth=3, heads=2, mlp_width=64, classes=10)
    table = table_for(torch.device("cpu"))
    submitted: list[int] = []
    warmer = Warmer(torch.float16, 1)
    with warmer:
        warmer._pool = SimpleNamespace(  # type: ignore[assignment]
            submit=lambda job, *given: submitted.append(given[-1]), shutdown=lambda **_: None
        )
        warmer.submit_plan(shape, 2, table)
        once = len(submitted)
        warmer.submit_plan(shape, 2, table)
    assert 5 < once == len(submitted) < 20
