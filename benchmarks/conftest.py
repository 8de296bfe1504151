"""What the suites share: models, how often something is run, and a record without a host's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.spread import Rounds
from benchmarks.vits import SIZES, SMALL, save_vit


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="tiny models, one round: find out whether the benchmarks run, not how fast",
    )


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_gpu():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and PyTorch finds none"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether only a smoke run is wanted."""
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session")
def rounds(quick: bool) -> Rounds:
    """How many of so many rounds are run."""
    return lambda full: 1 if quick else full


@pytest.fixture(scope="session")
def vit_b16(quick: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT-B/16 of transformers with random weights, as its users save theirs; a small one for --quick."""
    size = SMALL if quick else SIZES["vit_base_patch16_224"]
    return save_vit(size, tmp_path_factory.mktemp("vit-b16"))


@pytest.fixture(scope="session")
def digits_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained digits model in fp32 and bf16."""
    import vitdeploy

    folder = tmp_path_factory.mktemp("digits") / "digits.bundle"
    return vitdeploy.export("digits", folder, precision=("fp32", "bf16"), format="onnx").root
