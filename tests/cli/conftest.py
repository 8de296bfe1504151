"""Running a command line in this process, and one real export for all who look at its result."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.helpers.bundles import write_bundle
from tests.helpers.commands import Exported, Run, in_a_process, in_this_process
from vitdeploy.bundle.folder import Bundle


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """``run("verify", folder)`` in this process."""

    return functools.partial(in_this_process, capsys)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """The linear classifier, in fp32 and fp16."""
    return write_bundle(tmp_path / "linear.bundle", precisions=("fp32", "fp16"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The digits model, really exported, in fp32 and fp16."""
    folder = tmp_path_factory.mktemp("digits") / "digits.bundle"
    result = in_a_process("export", "-m", "digits", "-o", folder, "--fp32", "--fp16")
    assert result.code == 0, result.err
    return Exported(folder, result)
