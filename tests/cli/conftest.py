"""Running a command line in this process."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.helpers.bundles import write_bundle
from tests.helpers.commands import Run, in_this_process
from vitdeploy.bundle.folder import Bundle


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """``run("verify", folder)`` in this process."""

    return functools.partial(in_this_process, capsys)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """The linear classifier, in fp32 and fp16."""
    return write_bundle(tmp_path / "linear.bundle", precisions=("fp32", "fp16"))
