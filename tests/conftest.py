"""What every test runs under."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.helpers.commands import in_a_process
from tests.helpers.exports import Exported, Exports

if TYPE_CHECKING:
    from tests.helpers.strangers import Strangers
    from vitdeploy.bundle.folder import Bundle

# Tests run in several processes at once: one core each, or their thread pools fight over the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts what runs in the background with SIGINT ignored, which the programs under test would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("vitdeploy", deadline=None)  # a busy machine is not a slow function
settings.load_profile("vitdeploy")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Set the kernels up before anything imports Triton, but not in a process that only hands tests out."""
    if session.config.getoption("dist", "no") == "no" or hasattr(session.config, "workerinput"):
        importlib.import_module("tests.helpers.interpreter")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with Ray: it waits for processes longer than it computes, which the other tests do meanwhile."""
    items.sort(key=lambda item: "tests/ray/" not in item.nodeid)


def pytest_collection_finish() -> None:
    """Leave what was imported for the tests out of every garbage collection: an export has ten of them."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or nanobind tells of leaks


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """One for all processes of this test run."""
    folder = factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Exports, each made once for all processes of this test run."""
    return Exports(shared_folder(tmp_path_factory) / "exports")


@pytest.fixture(scope="session")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Strangers:
    """A checkpoint of transformers, and what other people's exporters make of it."""
    from tests.helpers.strangers import Strangers

    return Strangers(shared_folder(tmp_path_factory) / "strangers")


@pytest.fixture(scope="session")
def real_model_folder() -> Path:
    """A real trained model and its images (``make real-model``); built once for the checkout, in minutes."""
    from benchmarks.real_model import build

    return build()


@pytest.fixture(scope="session")
def digits(exports: Exports) -> Exported:
    """The digits model, really exported, in fp32 and fp16."""
    return export_digits(exports, "--fp32", "--fp16")


@pytest.fixture(scope="session")
def digits_onnx(exports: Exports) -> Path:
    """The digits model as ONNX in three precisions."""
    flags = ("--fp32", "--fp16", "--bf16", "--format", "onnx", "--batch", "1,8,64")
    return export_digits(exports, *flags).folder


@pytest.fixture(scope="session")
def digits_embedding(exports: Exports) -> Path:
    """The digits model as ONNX that gives embeddings: its pooled vector, of length 1."""
    return export_digits(exports, "--output", "embedding", "--format", "onnx").folder


@pytest.fixture(scope="session")
def digits_int8(exports: Exports) -> Bundle:
    """The digits model in int8, calibrated with its own pictures."""
    from vitdeploy.bundle.folder import Bundle
    from vitdeploy.data import digits_folder

    images = str(digits_folder() / "images")
    flags = ("--int8", "--calibration", images, "--data", images, "--batch", "1,2,4", "--format", "onnx")
    exported = export_digits(exports, *flags)
    assert "top-1 100.00 % of 20 images, 0.00 points below" in exported.result.err
    return Bundle.open(exported.folder)


def export_digits(exports: Exports, *flags: str) -> Exported:
    return exports.get(
        " ".join(flags), lambda folder: in_a_process("export", "-m", "digits", *flags, "-o", folder)
    )


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
