"""What every test runs under."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from tests.helpers import interpreter  # noqa: F401  (before anything imports Triton)
from vitdeploy.cli import main

# Tests run in several processes at once: one core each, or their thread pools fight over the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts what runs in the background with SIGINT ignored, which the programs under test would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("vitdeploy", deadline=None)  # a busy machine is not a slow function
settings.load_profile("vitdeploy")


@pytest.fixture(scope="session")
def digits_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits model as ONNX in three precisions: a bundle to look at or to copy, not to change."""
    folder = tmp_path_factory.mktemp("onnx") / "digits.bundle"
    flags = ("--fp32", "--fp16", "--bf16", "--format", "onnx", "--batch", "1,8,64")
    assert main(["export", "-m", "digits", *flags, "-o", str(folder)]) == 0
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--evidence",
        choices=("recorded", "run", "record"),
        default="recorded",
        help="checks of minutes that depend on files alone: as recorded for these files, run again, or run "
        "and recorded",
    )


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where a test writes its bundle: in a folder that is not there yet."""
    return tmp_path / "parent" / "bundle"
