"""Kernels run in Triton's interpreter, or on a GPU with ``pytest -m gpu``: the same tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers import interpreter

QUICK = ("test_config.py", "test_cost.py", "test_runner.py")
"""What `make check` runs of them; the runner's tests launch every kernel of a forward pass."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.parent == here and item.path.name not in QUICK:
            item.add_marker(pytest.mark.slow)


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
