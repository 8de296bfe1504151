"""Kernels run in Triton's interpreter, or on a GPU with ``pytest -m gpu``: the same tests."""

from __future__ import annotations

from collections.abc import Iterator

import interpreter
import pytest
import torch


@pytest.fixture(scope="module", params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the test's tensors lie."""
    if request.param == "cuda":
        yield torch.device("cuda")
        return
    if interpreter.ON_GPU:
        pytest.skip("a GPU is here: `pytest -m gpu` runs this test on it")
    with interpreter.environment():
        yield torch.device("cpu")
